"""Sums over examples where a layer mixes rows: each example has a pass of its own."""

import warnings
from typing import Any

import pytest
import torch
from mixed import EXAMPLES, MIXED, Batch, Make, deberta, single, texts
from nets import bert, lora
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import bayesianize, gramians
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.guides.fisher_laplace import gate_fisher
from lrvd_pyro.likelihoods.categorical import Categorical
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.predictive.linearized import Linearized, gate_gaussian

close = torch.testing.assert_close
ONE_AT_A_TIME = "the examples run one at a time instead"
NUM_DATA = 20
mixing = pytest.mark.parametrize("make", MIXED, ids=lambda make: make.__name__)


def log_probs(model: GateLoRA, gate: Tensor, row: Batch) -> Tensor:
    """The log probabilities of one example's classes, the example alone."""
    inputs = {name: value for name, value in row.items() if name != "labels"}
    with model.bind(gate):
        return model.predictions(**inputs)[0].log_softmax(-1)


def slopes(model: GateLoRA, row: Batch) -> Tensor:
    """The derivative of those in the gates, ``classes x R``."""
    gate = torch.ones(model.space.size)
    J: Any = torch.autograd.functional.jacobian(
        lambda z: log_probs(model, z, row), gate
    )
    return J


def observed(model: GateLoRA, batch: Batch) -> Tensor:
    """The Fisher information of the observed labels, by brute force."""
    rows = [single(batch, i) for i in range(len(batch["labels"]))]
    own = [slopes(model, row)[int(row["labels"])] for row in rows]
    return torch.stack(own).square().sum(0) * NUM_DATA / len(rows)


@mixing
def test_gramians_are_those_of_examples_alone(make: Make) -> None:
    model, batch = GateLoRA(make(), num_data=NUM_DATA), texts()
    name = MIXED[make].replace(".", r"\.")
    with pytest.warns(UserWarning, match=f"LoRA layer '{name}'.*{ONE_AT_A_TIME}"):
        found = gramians(model, [batch], labels="observed")
    close(found.gate_fisher, observed(model, batch))
    singles = [single(batch, i) for i in range(EXAMPLES)]
    alone = gramians(model, singles, labels="observed")
    for module in model.space.modules:
        close(found.activations[module], alone.activations[module])
        close(found.gradients[module], alone.gradients[module])


@mixing
def test_laplaces_curvature_is_that_of_examples_alone(make: Make) -> None:
    model, batch = GateLoRA(make(), num_data=NUM_DATA), texts()
    model.base_net.train()  # the pass itself is in eval mode
    gate, expected = torch.ones(model.space.size), 0.0
    for i in range(EXAMPLES):
        row = single(batch, i)
        J = slopes(model, row)
        probs = log_probs(model, gate, row).exp().detach()
        expected = expected + J.T @ (probs[:, None] * J)
    with pytest.warns(UserWarning, match=ONE_AT_A_TIME):
        found = gate_fisher(model, gate, [batch])
    # DeBERTa computes in float32 in parts, whatever the precision of its weights: its
    # gradients of a difference differ from the differences of gradients by 4e-7.
    close(found, expected * NUM_DATA / EXAMPLES, rtol=1e-5, atol=1e-6)


@mixing
def test_the_linearized_predictive_is_that_of_examples_alone(make: Make) -> None:
    model, batch = GateLoRA(make(), num_data=NUM_DATA), texts()
    guide = RankDiagonal(model, init_log_alpha=-1.0)
    variance = guide.distributions()["gate"].variance.detach()
    inputs = {"input_ids": batch["input_ids"]}
    linearized = Linearized(model, gate_gaussian(model, guide, inputs))
    with pytest.warns(UserWarning, match=ONE_AT_A_TIME):
        mean, covariance = linearized.contrasts(inputs)
    for i in range(EXAMPLES):
        J = slopes(model, single(batch, i))
        J = J[1:] - J[:1]
        logs = log_probs(model, torch.ones(model.space.size), single(batch, i))
        close(mean[i], (logs[1:] - logs[:1]).detach())
        close(covariance[i], (J * variance) @ J.T)


def test_rows_of_the_examples_own_still_share_a_pass() -> None:
    model, batch = GateLoRA(bert(), num_data=NUM_DATA), texts()
    passes: list[int] = []
    model.base_net.register_forward_pre_hook(lambda *_: passes.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gramians(model, [batch, batch], labels="observed")
    assert len(passes) == 4  # two more for the check
    close(found.gate_fisher, observed(model, batch))


def test_one_warning_serves_all_passes_over_a_model() -> None:
    model, batch = GateLoRA(deberta(), num_data=NUM_DATA), texts()
    with pytest.warns(UserWarning, match=ONE_AT_A_TIME) as said:
        gramians(model, [batch, texts()])
        gramians(model, [batch], gates="subsets")
    assert len(said) == 1


def test_deberta_is_bayesianized_as_by_batches_of_one() -> None:
    net, batch = deberta(), texts()
    options: dict[str, Any] = {"likelihood": Categorical(), "balance": False}
    rows = [single(batch, i) for i in range(EXAMPLES)]
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    with pytest.warns(UserWarning, match=ONE_AT_A_TIME):
        model, guide = bayesianize(net, [batch], generator=seeds[0], **options)
    model.space.close()
    _, other = bayesianize(net, rows, generator=seeds[1], **options)
    close(guide.log_variance, other.log_variance)
    assert guide.log_variance.std() > 0.1


@mixing
@pytest.mark.filterwarnings("ignore:.*cannot share passes:UserWarning")
def test_predictions_are_those_of_each_draw_and_each_example_alone(make: Make) -> None:
    model, batch = GateLoRA(make(), num_data=NUM_DATA), texts()
    gates = 1 + torch.randn(3, model.space.size)
    options: dict[str, Any] = {"posterior_samples": {"gate": gates}}
    found = lrvd.predict(model, None, [batch], return_samples=True, **options).samples
    for gate, probs in zip(gates, found, strict=True):
        for i in range(EXAMPLES):
            close(probs[i], log_probs(model, gate, single(batch, i)).exp().detach())


class InBatch(nn.Module):
    """Texts against the other texts of the batch, as contrastive losses have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(50, 16), nn.Linear(16, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.layer(self.embed(input_ids).mean(1))
        return h @ h.T


class Sequences(nn.Module):
    """A network that is itself called with the sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        return h.mean(0)


def test_examples_that_see_each_other_or_cannot_be_told_apart_are_refused() -> None:
    cases: list[tuple[nn.Module, Batch]] = [
        (InBatch(), texts()),
        (Sequences(), {"x": torch.randn(8, 4, 5), "labels": torch.arange(4) % 3}),
    ]
    for net, batch in cases:
        model = GateLoRA(lora(net, target_modules=["layer"]), num_data=NUM_DATA)
        with pytest.raises(ValueError, match="'layer'.*alone has other predictions"):
            gramians(model, [batch], labels="observed")
        with pytest.raises(ValueError, match="'layer'.*batches of one"):
            gate_fisher(model, torch.ones(model.space.size), [batch])


def test_dora_is_refused_by_name() -> None:
    model = GateLoRA(bert(use_dora=True), num_data=NUM_DATA)
    with pytest.raises(ValueError, match="the DoRA layer 'bert.*use plain LoRA"):
        gate_fisher(model, torch.ones(model.space.size), [texts()])
