"""Several labels per datum: of classes that go together, and of tokens."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import nets
import pyro
import pytest
import torch
from inferred import QUIET, az
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForSequenceClassification, BertForTokenClassification

import lrvd_pyro as lrvd
from lrvd_pyro.diagnostics import calibration, plots
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods import Categorical, data_plate, samples_first
from lrvd_pyro.models import GateLoRA

close = torch.testing.assert_close
pytestmark = QUIET
N, CLASSES, LENGTH = 5, nets.CLASSES, 6


class Bits:
    """Each example has a label 0 or 1 for every class."""

    def __call__(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        with data_plate(len(predictions), labels, num_data):
            bits = dist.Bernoulli(logits=predictions)
            pyro.sample("labels", bits.to_event(predictions.dim() - 1), obs=labels)

    def summarize(self, predictions: Tensor) -> dict[str, Tensor]:
        probs = predictions.sigmoid()
        return {"probs": probs.mean(0), "samples": probs.transpose(0, 1)}

    def collect(self, fields: dict[str, Tensor]) -> Any:
        return SimpleNamespace(**samples_first(fields))


class Tags(Categorical):
    """Each token has a class; a label of -100 does not count."""

    def __call__(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        tags = dist.Categorical(logits=predictions, validate_args=False)
        if labels is not None:
            tags = tags.mask(labels != -100)
            labels = labels.clamp(min=0)
        with data_plate(len(predictions), labels, num_data):
            pyro.sample("labels", tags.to_event(1), obs=labels)


class Half(Bits):
    """As `Bits`, but the second half of the data does not count."""

    def __call__(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        counts = torch.arange(len(predictions)) < len(predictions) // 2
        with poutine.mask(mask=counts):
            super().__call__(predictions, labels, num_data)


class Unnamed(Bits):
    def __call__(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        with data_plate(len(predictions), labels, num_data):
            pyro.sample(
                "bits", dist.Bernoulli(logits=predictions).to_event(1), obs=labels
            )


class Flat(Categorical):
    """All tokens of a batch as data of their own."""

    def __call__(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        assert labels is not None
        tags = dist.Categorical(logits=predictions.flatten(0, 1))
        pyro.sample("labels", tags, obs=labels.flatten())


def made(likelihood: Any, *, tokens: bool) -> tuple[GateLoRA, RankDiagonal]:
    kind = BertForTokenClassification if tokens else BertForSequenceClassification
    net = nets.lora(kind(nets.bert_config()).double(), target_modules=["query"])
    model = GateLoRA(net, num_data=2 * N, likelihood=likelihood)
    return model, RankDiagonal(model, init_log_alpha=-1.0)


def batch(
    labels: Callable[[int], Tensor] | None, length: int = LENGTH
) -> dict[str, Any]:
    inputs = nets.tokens(N, labels=False, length=length)
    return inputs if labels is None else inputs | {"labels": labels(length)}


def bits(length: int) -> Tensor:
    return torch.randint(0, 2, (N, CLASSES)).double()


def token_bits(length: int) -> Tensor:
    return torch.randint(0, 2, (N, length, CLASSES)).double()


def tags(length: int) -> Tensor:
    labels = torch.randint(0, CLASSES, (N, length))
    labels[:, -2:] = -100
    return labels


def bernoulli(logits: Tensor, labels: Tensor) -> Tensor:
    each = -F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return each.flatten(1).sum(1)


def categorical(logits: Tensor, labels: Tensor) -> Tensor:
    each = -F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
    return each.sum(1)


KINDS: dict[str, tuple[Any, bool, Any, Any]] = {
    "classes": (Bits, False, bits, bernoulli),
    "token classes": (Bits, True, token_bits, bernoulli),
    "tags": (Tags, True, tags, categorical),
}


def logits_of(model: Any, gates: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The logits under each draw, by hand."""
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    outputs = []
    for gate in gates:
        with torch.no_grad(), model.space.bind(gate):
            outputs.append(model.base_net.eval()(**inputs).logits)
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_likelihood_of_a_datum_is_that_of_all_its_labels(kind: str) -> None:
    likelihood, tokens, labels, log_prob = KINDS[kind]
    model, guide = made(likelihood(), tokens=tokens)
    batches = [batch(labels), batch(labels)]
    data = lrvd.to_arviz(model, guide, batches, 4)
    gates = torch.as_tensor(data.posterior["gate"].values[0])
    expected = [
        torch.stack([log_prob(z, b["labels"]) for z in logits_of(model, gates, b)])
        for b in batches
    ]
    found = data.log_likelihood["labels"]
    assert found.dims == ("chain", "draw", "datum_id")
    close(torch.as_tensor(found.values[0]), torch.cat(expected, 1))
    observed = data.observed_data["labels"]
    shape = torch.cat([b["labels"] for b in batches]).shape
    extra = tuple(f"labels_dim_{i}" for i in range(len(shape) - 1))
    assert observed.dims == ("datum_id", *extra) and observed.shape == shape
    close(observed.values, torch.cat([b["labels"] for b in batches]).numpy())
    drawn = data.posterior_predictive["labels"]
    assert drawn.dims == ("chain", "draw", "datum_id", *extra)
    assert drawn.shape == (1, 4, *shape)


def test_arviz_compares_models_of_several_labels() -> None:
    model, guide = made(Bits(), tokens=False)
    data = lrvd.to_arviz(model, guide, [batch(bits), batch(bits)], 40)
    loo = az.loo(data, reff=1)
    assert loo.n_data_points == 2 * N
    assert float(getattr(loo, "elpd_loo", None) or loo.elpd) < 0


def test_drawn_labels_follow_each_label_of_a_datum() -> None:
    model, guide = made(Bits(), tokens=False)
    inputs = batch(bits)
    data = lrvd.to_arviz(model, guide, [inputs], 500)
    drawn = torch.as_tensor(data.posterior_predictive["labels"].values[0])
    probs = lrvd.predict(model, guide, [inputs], 500).probs
    error = (drawn.mean(0) - probs).abs()
    assert error.max() < 4 * 0.5 / 500**0.5
    assert (drawn.mean(0) - probs.roll(1, 1)).abs().max() > error.max(), "the twin"


@pytest.mark.parametrize("kind", KINDS)
def test_predict_averages_each_label_of_a_datum(kind: str) -> None:
    likelihood, tokens, _, _ = KINDS[kind]
    model, guide = made(likelihood(), tokens=tokens)
    batches = [batch(None), batch(None)]
    draws = {"gate": 1 + 0.5 * torch.randn(6, model.space.size)}
    found = lrvd.predict(
        model, guide, batches, posterior_samples=draws, return_samples=True
    )
    logits = torch.cat([logits_of(model, draws["gate"], b) for b in batches], 1)
    samples = logits.softmax(-1) if likelihood is Tags else logits.sigmoid()
    close(found.samples, samples)
    close(found.probs, samples.mean(0))


@pytest.mark.parametrize("kind", ["token classes", "tags"])
def test_batches_of_other_lengths_are_refused_where_they_cannot_be_joined(
    kind: str,
) -> None:
    likelihood, tokens, labels, _ = KINDS[kind]
    model, guide = made(likelihood(), tokens=tokens)
    batches = [batch(labels, 6), batch(labels, 5), batch(labels, 6)]
    with pytest.raises(ValueError, match=r"probs of one datum .*\(6, 3\).*\(5, 3\).*p"):
        lrvd.predict(model, guide, batches, 2)
    with pytest.raises(ValueError, match=r"labels of one datum .*padding='max_length'"):
        lrvd.to_arviz(model, guide, batches, 2)
    padded = [batch(labels, 6)] * 2
    assert len(lrvd.predict(model, guide, padded, 2).probs) == 2 * N


def test_masked_labels_count_neither_in_arviz_nor_in_the_gramians() -> None:
    model, guide = made(Half(), tokens=False)
    inputs = batch(bits)
    found = lrvd.to_arviz(model, guide, [inputs], 3).log_likelihood["labels"].values[0]
    assert (found[:, N // 2 :] == 0).all() and (found[:, : N // 2] < 0).all()
    options: Any = {"labels": "observed"}
    half = lrvd.gauge.gramians(model, [inputs], **options).gate_fisher
    model.likelihood = Bits()
    first = {name: value[: N // 2] for name, value in inputs.items()}
    whole = lrvd.gauge.gramians(model, [first], **options).gate_fisher
    close(half, whole * (N // 2) / N)


def test_tags_train_and_their_scores_are_those_of_the_tokens_that_count() -> None:
    model, guide = made(Tags(), tokens=True)
    inputs = batch(tags)
    svi = SVI(model, guide, lrvd.optim.AdamW(lr=0.02), lrvd.RankELBO(kl_weight=0.01))
    losses = [svi.step(**inputs) for _ in range(30)]
    assert losses[-1] < losses[0]
    labels = inputs["labels"]
    prediction = lrvd.predict(model, guide, [inputs], 8, return_samples=True)
    kept = labels != -100
    flat = prediction[kept]
    assert flat.samples is not None and flat.samples.shape == (8, *flat.probs.shape)
    close(flat.samples.mean(0), flat.probs)
    report = calibration.calibration_report(flat, labels[kept], num_bootstrap=5)
    nll = -prediction.probs.log().gather(-1, labels.clamp(min=0)[..., None])
    assert report.nll.value == pytest.approx(float(nll.squeeze(-1)[kept].mean()))
    assert report.num_data == int(kept.sum()) == N * (LENGTH - 2)
    hit = (prediction.probs.argmax(-1) == labels)[kept].double().mean()
    scores = calibration.scores(flat.probs, labels[kept])
    assert scores["accuracy"] == pytest.approx(float(hit))


def test_what_takes_one_prediction_per_datum_says_how_to_give_it() -> None:
    model, guide = made(Tags(), tokens=True)
    inputs = batch(tags)
    prediction = lrvd.predict(model, guide, [inputs], 2)
    labels = inputs["labels"]
    kept = prediction[labels != -100]
    calls: list[Callable[[], object]] = [
        lambda: calibration.calibration_report(prediction, labels),
        lambda: calibration.calibration_report(
            kept, labels[labels != -100], out_of_distribution=prediction
        ),
        lambda: calibration.scores(prediction.probs, labels),
        lambda: plots.reliability_diagram(prediction, labels),
        lambda: plots.risk_coverage_curve(prediction, labels),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"shape \(5, 6, 3\).*prediction\[kept\]"):
            call()


def test_a_likelihood_without_a_row_of_labels_per_datum_is_refused() -> None:
    model, guide = made(Flat(), tokens=True)
    inputs = batch(lambda length: torch.randint(0, CLASSES, (N, length)))
    with pytest.raises(ValueError, match=r"shape \(30,\) for 5 data.*to_event\(labels"):
        lrvd.to_arviz(model, guide, [inputs], 2)
    model, guide = made(Unnamed(), tokens=False)
    with pytest.raises(ValueError, match="Unnamed observes no site 'labels'; name it"):
        lrvd.to_arviz(model, guide, [batch(bits)], 2)


def test_the_classifier_names_the_way_to_several_labels() -> None:
    model, _ = made(None, tokens=True)
    with pytest.raises(ValueError, match=r"likelihood of your own.*to_event\(labels"):
        model(**batch(tags))
