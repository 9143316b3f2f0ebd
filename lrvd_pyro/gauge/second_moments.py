"""Second moments of the rank activations and of their gradients, module by module."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm.std import tqdm

from lrvd_pyro.batches import batch_size, check_several, gate_rows, without_labels
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.models.base import evaluating
from lrvd_pyro.predictive.draws import seeded

OVERFLOW = (
    "nothing was changed. Is a row all padding, or the network in float16? Run it in "
    "float32 or bfloat16"
)
ROUNDING = 1e-12  # of a covariance, relative to the second moment
Labels = Literal["sampled", "observed"]
Gates = Literal["ones", "subsets"]
Found = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Gramians:
    """What `gramians` found, in float64.

    Attributes:
        activations: For each module G, the mean over tokens of ``h h^T``, r x r.
        gradients: For each module M, the sum over tokens and data of ``g g^T``, r x r,
            in nats^2 per data set.
        gate_fisher: ``F_i = sum_n (sum_t h_ti g_ti)^2``, the exact diagonal Fisher
            information of the gates in the present gauge, (R,), per data set; empty
            where nobody took it (`BalanceSchedule`).
        means: For each module the mean of h over the same tokens, r.
    """

    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]
    gate_fisher: Tensor = field(default_factory=lambda: torch.empty(0))
    means: dict[str, Tensor] = field(default_factory=dict)

    def centered(self, about: Mapping[str, Tensor] | None = None) -> "Gramians":
        """The gradients, and ``mean (h - c) (h - c)^T`` for the activations; no more.

        Args:
            about: c of each module, r; None for the means: G is then a covariance, and
                0 where that is rounding beside the mean, of inputs that never change.

        Raises:
            ValueError: If there are no means: of moments centered before, say.
        """
        means = self.require_means()
        activations = {}
        for name, gram in self.activations.items():
            mean = means[name]
            off = mean - (mean if about is None else about[name].to(mean))
            found = gram - torch.outer(mean, mean)
            varies = found.trace() > ROUNDING * gram.trace()
            activations[name] = found * varies + torch.outer(off, off)
        return Gramians(activations, self.gradients)

    def require_means(self) -> dict[str, Tensor]:
        """The means of all modules, or a ValueError."""
        if self.means.keys() != self.gradients.keys():
            raise ValueError(
                "the moments have no means, or are centered already; take them again: "
                "gramians(model, batches)"
            )
        return self.means


def gramians(
    model: GateLoRA,
    batches: Iterable[Mapping[str, Any]],
    *,
    labels: Labels = "sampled",
    gates: Gates = "ones",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Gramians:
    """The second moments that `balance` makes equal, from one pass over data.

    With h = A x the rank activations of a module and ``g = d log p(y | x) / d h`` their
    gradients, at gates of 1 in eval mode: ``G = mean h h^T`` over tokens,
    ``M = (N/n) sum g g^T`` over tokens and the n examples of ``batches``. Tokens whose
    gradient is exactly 0, such as padding, count in neither. One forward and one backward
    pass per batch; beyond them O(r^2) memory per module.

    Args:
        model: The network as a `GateLoRA`; its guide plays no part.
        batches: Dicts of tensors as the model takes them.
        labels: "sampled" draws them from the network's own predictive, so that M
            belongs to the true Fisher information; "observed" takes those of the
            batches (the empirical Fisher, which vanishes where the network fits).
        gates: "ones" for `balance` and `optimal_alpha`. With "subsets" each example
            has gates of 1 in a random subset of the ranks, its size uniform from 0 to
            R, and 0 elsewhere: ``gate_fisher``, all that is returned then, says what a
            rank is worth when others are missing, and orders ranks for keeping few.
        generator: Of labels and subsets; None goes on from torch's global state.
        progress: Show a bar over the batches.

    Raises:
        TypeError: If the model is no `GateLoRA`, or ``batches`` is one batch.
        ValueError: If there are no batches, the likelihood cannot sample, labels are
            missing, a gradient is not finite, the network takes no gate per example
            (DoRA), or a choice is none of those above.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted.

    Source: the true Fisher by sampled labels, Kunstner, Balles and Hennig (2019, arXiv
    1905.12558); factored moments, Martens and Grosse (2015, arXiv 1503.05671); subsets
    weighted as by Shapley (1953), for the Fisher information derived here.
    """
    if not isinstance(model, GateLoRA):
        raise TypeError(
            f"model is a {type(model).__name__}, which binds {model.binds}; the gauge "
            f"is defined only for gates: GateLoRA(net, num_data=len(train))"
        )
    if labels not in get_args(Labels):
        raise ValueError(f'labels={labels!r}; expected "sampled" or "observed"')
    if gates not in get_args(Gates):
        raise ValueError(f'gates={gates!r}; expected "ones" or "subsets"')
    check_several(batches, "gramians(model, [batch])")
    if dora := model.space.dora:
        raise ValueError(
            f"the DoRA layer {dora[0]!r} takes one draw for the whole batch, so that "
            f"no example has a gradient of its own; the gauge needs plain LoRA "
            f"(LoraConfig(use_dora=False))"
        )
    sums, count = Sums(model.space.ranks), 0
    fisher = torch.zeros(model.space.size, dtype=torch.float64)
    with evaluating(model), seeded_by(generator):
        for batch in tqdm(batches, disable=not progress, desc="gramians"):
            gradients = _gate_gradients(model, batch, labels, gates, sums)
            fisher += gradients.square().sum(0).cpu()
            count += batch_size(dict(batch))
    if count == 0:
        raise ValueError("got no batches; expected the training set")
    modules, whole = model.space.modules, model.num_data / count
    if gates == "subsets":
        return Gramians({}, {}, whole * fisher)
    return Gramians(
        activations=dict(zip(modules, sums.mean_activations(), strict=True)),
        gradients={m: whole * s for m, s in zip(modules, sums.gradients, strict=True)},
        gate_fisher=whole * fisher,
        means=dict(zip(modules, sums.means(), strict=True)),
    )


class Sums:
    """Running sums of ``h h^T`` and ``g g^T`` over tokens whose gradient is not 0."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.activations = [torch.zeros(r, r, dtype=torch.float64) for r in ranks]
        self.gradients = [torch.zeros_like(gram) for gram in self.activations]
        self.totals = [gram.new_zeros(len(gram)) for gram in self.activations]
        self.tokens = [0.0] * len(ranks)

    def add(self, index: int, h: Tensor, g: Tensor) -> None:
        """Count the tokens of module ``index``: ``... x r`` activations and gradients.

        Raises:
            ValueError: If one is not finite.
        """
        h, g = (x.detach().flatten(0, -2).double() for x in (h, g))
        live = (g != 0).any(-1, keepdim=True)
        h = h * live
        gram_h, gram_g = h.T @ h, g.T @ g
        if not (gram_h.isfinite().all() and gram_g.isfinite().all()):
            raise ValueError(
                f"rank activations or their gradients are not finite in LoRA module "
                f"number {index}; {OVERFLOW}"
            )
        self.activations[index] += gram_h.cpu()
        self.totals[index] += h.sum(0).cpu()
        self.gradients[index] += gram_g.cpu()
        self.tokens[index] += float(live.sum())

    def mean_activations(self) -> list[Tensor]:
        """The mean of ``h h^T`` over the tokens counted."""
        return self._averages(self.activations)

    def means(self) -> list[Tensor]:
        """The mean of h over the tokens counted."""
        return self._averages(self.totals)

    def _averages(self, sums: list[Tensor]) -> list[Tensor]:
        pairs = zip(sums, self.tokens, strict=True)
        return [each / max(tokens, 1) for each, tokens in pairs]


@contextmanager
def tapped(model: GateLoRA, found: Found) -> Iterator[None]:
    """Within the block, hand over each module's rank activations and their gradients.

    ``found(index, h, g)`` is called in the backward pass, with h before the gate and g
    behind it, as ``... x r``.
    """
    handles = []
    for index, layer in enumerate(model.space.layers):
        lora_B: nn.Module = layer.lora_B[model.space.adapter]
        tap = Tap(index, len(getattr(lora_B, "kernel_size", ())), found)
        handles.append(lora_B.register_forward_pre_hook(tap.before, prepend=True))
        handles.append(lora_B.register_forward_pre_hook(tap.behind))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Tap:
    """Forward pre-hooks on one ``lora_B``, before its gate and behind it."""

    def __init__(self, index: int, trailing: int, found: Found) -> None:
        self.index, self.trailing, self.found = index, trailing, found

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.h = args[0].detach()

    def behind(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        h = self.h
        if args[0].requires_grad:
            args[0].register_hook(
                lambda g: self.found(self.index, *map(self.last, (h, g)))
            )

    def last(self, x: Tensor) -> Tensor:
        """Rank components on the last axis, as linear layers have them."""
        return x.movedim(1, -1) if self.trailing else x


def _gate_gradients(
    model: GateLoRA, batch: Mapping[str, Any], labels: Labels, gates: Gates, sums: Sums
) -> Tensor:
    """Each example's gradient in its gates, ``B x R``; adds its tokens to ``sums``."""
    inputs = without_labels(batch)
    observed = batch.get("labels") if labels == "observed" else None
    if labels == "observed" and observed is None:
        raise ValueError('a batch has no labels; expected labels, or labels="sampled"')
    rows = gate_rows(model.space.ones(), inputs)
    if gates == "subsets":
        share = torch.rand_like(rows[:, :1])
        rows = (torch.rand_like(rows) < share).to(rows).requires_grad_()
    with torch.enable_grad(), tapped(model, sums.add), model.bind(rows):
        log_prob = _log_likelihood(model, model.predictions(**inputs), observed)
        (gradients,) = torch.autograd.grad(log_prob, rows)
    return gradients.double()


def _log_likelihood(model: GateLoRA, predictions: Tensor, labels: Any) -> Tensor:
    """The log density of a batch of labels, sampled if None; in nats, not scaled."""
    if not predictions.isfinite().all():
        raise ValueError("the network's predictions are not finite; " + OVERFLOW)
    try:
        with poutine.block(), pyro.validation_enabled(False):
            program = poutine.trace(model.likelihood)
            run = program.get_trace(predictions, labels, model.num_data)
        site: Any = run.nodes["labels"]
        log_prob: Tensor = site["fn"].log_prob(site["value"].detach()).sum()
    except (NotImplementedError, KeyError) as error:
        raise ValueError(
            f"{type(model.likelihood).__name__} draws no site 'labels' ({error!r}); "
            f'give gramians(..., labels="observed") or a likelihood that samples'
        ) from error
    return log_prob


@contextmanager
def seeded_by(generator: torch.Generator | None) -> Iterator[None]:
    """Draw from torch's global state in the block, or from a seed of a generator."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with seeded(seed):
        yield
