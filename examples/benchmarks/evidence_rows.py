"""The rows of `evidence.py`: what each method predicts for the test texts."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from peft import PeftModel
from pyro import distributions as dist
from small_task import BATCH, Task, logits
from text_data import Batch, Encoded
from torch import Tensor, nn
from trained_nets import Pair, factor_lora, gate_lora, lora

import lrvd_pyro as lrvd
from lrvd_pyro.diagnostics import fit_temperature
from lrvd_pyro.gauge import Evidence, bayesianize, evidence, noise_by_evidence
from lrvd_pyro.guides import RankDiagonal, RowDiagonal
from lrvd_pyro.guides.weight_noise import WeightNoise
from lrvd_pyro.likelihoods import Categorical, CategoricalPrediction
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.rank_space.rows import Side
from lrvd_pyro.selection import select

SAMPLES, KEPT = 8, 8  # draws; one rank in how many stays
Method = Literal["linearized", "sample"]
METHODS: tuple[Method, ...] = ("linearized", "sample")
SIDES: tuple[Side, ...] = ("lora_A", "lora_B")
Noise = Literal["scaled", "fisher", "tied"]
Made = TypeVar("Made")


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        name: What the table calls it.
        test: The prediction for the test texts.
        other: The prediction for texts of another kind.
        extra: Numbers that it has beyond those of LoRA.
        seconds: What it took after training.
    """

    name: str
    test: CategoricalPrediction
    other: CategoricalPrediction
    extra: int
    seconds: float


@dataclass
class Bench:
    """What the rows of one seed share.

    Attributes:
        task: The texts and the schedule.
        other: Texts of another kind.
        folder: Where trained networks lie.
        began: When the present row began.
    """

    task: Task
    other: Encoded
    folder: Path
    began: float = field(default_factory=time.perf_counter)

    @property
    def batches(self) -> list[Batch]:
        """The training set."""
        return self.task.train.grouped(BATCH)

    def start(self, made: Made) -> Made:
        """Begin a row, after what it starts from has been trained or loaded."""
        self.began = time.perf_counter()
        return made

    def at_a_point(self, name: str, net: PeftModel) -> Iterator[Row]:
        """A network without noise, as it is and with a temperature."""
        test, other = (logits(net, data) for data in (self.task.test, self.other))
        yield self._row(name, collected(test), collected(other), 0)
        fitted = fit_temperature(logits(net, self.task.dev), self.task.dev.labels)
        scaled, far = (collected(each / fitted) for each in (test, other))
        yield self._row(f"{name} + temperature", scaled, far, 1)

    def posterior(
        self, name: str, pair: Pair, method: Method, *, temperature: bool = False
    ) -> Iterator[Row]:
        """A pair, predicted by one method; with a temperature on top if asked for."""
        way = "linearized" if method == "linearized" else f"{SAMPLES} samples"
        extra = sum(p.numel() for p in pair[1].parameters())

        def predicted(data: Encoded) -> CategoricalPrediction:
            prediction: CategoricalPrediction = lrvd.predict(
                *pair,
                data.in_order(),
                SAMPLES,
                method=method,
                return_samples=temperature,
            )
            return prediction

        test, other = map(predicted, (self.task.test, self.other))
        yield self._row(f"{name}, {way}", test, other, extra)
        if temperature:
            dev = predicted(self.task.dev).samples
            assert dev is not None
            fitted = fit_temperature(dev.log(), self.task.dev.labels)
            scaled, far = (tempered(each, fitted) for each in (test, other))
            yield self._row(f"{name}, {way} + temperature", scaled, far, extra + 1)

    def evident(
        self,
        name: str,
        pair: Pair,
        noise: Noise,
        methods: tuple[Method, ...] = ("linearized",),
        *,
        temperature: bool = False,
    ) -> Iterator[Row]:
        """A trained pair with its noise by evidence."""
        pair = noise_by_evidence(*pair, self.batches, noise=noise)
        for method in methods:
            rows = self.posterior(
                f"{name}, {noise}", pair, method, temperature=temperature
            )
            yield from rows

    def _row(
        self,
        name: str,
        test: CategoricalPrediction,
        other: CategoricalPrediction,
        extra: int,
    ) -> Row:
        seconds, self.began = time.perf_counter() - self.began, time.perf_counter()
        return Row(name, test, other, extra, seconds)


def collected(drawn: Tensor) -> CategoricalPrediction:
    """The prediction of logits, ``n x C``, or of draws of them."""
    likelihood = Categorical()
    draws = drawn if drawn.dim() == 3 else drawn[None]
    return likelihood.collect(likelihood.summarize(draws))


def tempered(prediction: CategoricalPrediction, by: float) -> CategoricalPrediction:
    """Every draw at a temperature."""
    assert prediction.samples is not None
    return collected(prediction.samples.log() / by)


class ElementDiagonal(WeightNoise):
    """A diagonal Laplace approximation: a variance for each element of A and B."""

    apart = True

    def __init__(self, model: FactorLoRA, found: Evidence) -> None:
        super().__init__(model)
        precision = mackay(found.curvature, self.mean())
        self.log_variance = nn.Parameter(-(found.curvature + precision).log())

    def distributions(self) -> dict[str, dist.TorchDistribution]:
        """The posterior of each weight."""
        scale = (0.5 * self.log_variance).exp()
        return {"factor": dist.Normal(self.mean(), scale)}

    @property
    def log_alpha(self) -> Tensor:
        """There is none: elements of a rank differ."""
        raise NotImplementedError("a diagonal Laplace approximation has no log alpha")


def mackay(curvature: Tensor, weights: Tensor) -> float:
    """The precision of the prior by MacKay's fixed point, which peers take."""
    h, size = curvature.double(), float(weights.double().square().sum())
    precision = 1.0
    for _ in range(500):  # it contracts slowly
        gamma = float((h / (h + precision)).sum())
        precision = (precision * gamma / size) ** 0.5
    return precision


def at_points(bench: Bench) -> Iterator[Row]:
    """LoRA after the last epoch and after the best one, with temperatures."""
    for name, stopped in {"last epoch": False, "early stopped": True}.items():
        net = bench.start(lora(bench.task, bench.folder, stopped=stopped))
        yield from bench.at_a_point(f"LoRA, {name}", net)


def diagonal_laplace(bench: Bench) -> Iterator[Row]:
    """LoRA with a Laplace approximation over each element of A and B."""
    net = bench.start(lora(bench.task, bench.folder))
    model = FactorLoRA(net, num_data=len(bench.task.train), sides=SIDES)
    found = evidence(model, RowDiagonal(model), bench.batches)
    pair = model, ElementDiagonal(model, found)
    yield from bench.posterior("LoRA, diagonal Laplace", pair, "linearized")


def on_lora(bench: Bench, noise: Noise) -> Iterator[Row]:
    """Plain LoRA with noise by evidence."""
    model = GateLoRA(lora(bench.task, bench.folder), num_data=len(bench.task.train))
    pair = bench.start((model, RankDiagonal(model)))
    yield from bench.evident("LoRA", pair, noise)


def as_trained(bench: Bench) -> Iterator[Row]:
    """GateLoRA with the noise of the true ELBO."""
    pair = bench.start(gate_lora(bench.task, bench.folder))
    yield from bench.posterior("GateLoRA, as trained", pair, "sample")


def on_gates(bench: Bench, noise: Noise) -> Iterator[Row]:
    """GateLoRA with noise by evidence, and a temperature on top."""
    pair = bench.start(gate_lora(bench.task, bench.folder))
    yield from bench.evident("GateLoRA", pair, noise, temperature=noise == "scaled")


def by_draws(bench: Bench, noise: Noise) -> Iterator[Row]:
    """GateLoRA with noise by evidence, at the scale for draws."""
    pair = bench.start(gate_lora(bench.task, bench.folder))
    yield from bench.evident("GateLoRA", pair, noise, ("sample",))


def estimated(bench: Bench) -> Iterator[Row]:
    """GateLoRA trained at the multiplicity that the evidence finds after each epoch."""
    pair = bench.start(gate_lora(bench.task, bench.folder, estimated=True))
    name = "GateLoRA, multiplicity by evidence"
    for method in METHODS:
        yield from bench.posterior(name, pair, method)
    yield from bench.evident(name, pair, "scaled")


def on_weights(bench: Bench, noise: Noise) -> Iterator[Row]:
    """FactorLoRA with noise by evidence."""
    pair = bench.start(factor_lora(bench.task, bench.folder))
    yield from bench.evident("FactorLoRA", pair, noise, METHODS)


def one_pass(
    bench: Bench, start: Literal["LoRA", "GateLoRA"], gauge: str
) -> Iterator[Row]:
    """`bayesianize` in a gauge, with all ranks and with an eighth of them."""
    if start == "LoRA":
        net = lora(bench.task, bench.folder)
    else:  # its gates have mean 1
        model, guide = gate_lora(bench.task, bench.folder)
        net = model.base_net
        model.space.close()
        model.release()
        guide.release()
    pair = bench.start(
        bayesianize(
            net,
            bench.batches,
            likelihood=Categorical(),
            balance=gauge != "trained",
            centered=gauge == "centered",
            generator=torch.Generator().manual_seed(0),
        )
    )
    size = pair[0].space.size
    for kept in (size, size // KEPT):
        keep = torch.zeros(size, dtype=torch.bool)
        keep[pair[1].log_alpha.argsort()[:kept]] = True
        if kept < size:
            select(*pair, keep=keep)
        name = f"{start}, {gauge} gauge, {kept} ranks"
        yield from bench.evident(name, pair, "fisher")


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "points": at_points,
    "diagonal": diagonal_laplace,
    "trained": as_trained,
    "scaled": partial(on_gates, noise="scaled"),
    "tied": partial(on_gates, noise="tied"),
    "lora-tied": partial(on_lora, noise="tied"),
    "lora-fisher": partial(on_lora, noise="fisher"),
    "scaled-draws": partial(by_draws, noise="scaled"),
    "tied-draws": partial(by_draws, noise="tied"),
    "factor-scaled": partial(on_weights, noise="scaled"),
    "factor-tied": partial(on_weights, noise="tied"),
    "estimated": estimated,
    **{
        f"one-pass-{start}-{gauge}": partial(one_pass, start=start, gauge=gauge)
        for start in ("LoRA", "GateLoRA")
        for gauge in ("trained", "balanced", "centered")
    },
}
