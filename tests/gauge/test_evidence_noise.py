"""Noise by evidence: what it costs, and where it goes."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import tokens
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import evidence, noise_by_evidence
from lrvd_pyro.guides import RankDiagonal, RowDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA

SIDES = ("lora_A", "lora_B")
# Small batches stand for large data here.
pytestmark = pytest.mark.filterwarnings("ignore:the batches have:UserWarning")


@pytest.mark.parametrize("noise", ["scaled", "fisher"])
def test_the_quadratic_cost_of_the_gates_noise_becomes_gamma_loo(noise: Any) -> None:
    model = GateLoRA(nets.perceptron(), num_data=60)
    guide = RankDiagonal(model, init_log_alpha=-5.0)
    with torch.no_grad():
        guide.log_variance += torch.linspace(-1, 1, 8)
    before, batches = guide.log_alpha, [nets.rows(8)]
    found = evidence(model, guide, batches)
    same, its = noise_by_evidence(model, guide, batches, noise=noise)
    assert same is model and its is guide
    alpha = guide.log_alpha.exp() * guide.linearized_scale
    cost = (alpha * found.gate_fisher).sum()
    assert float(cost) == pytest.approx(found.gamma_loo, rel=1e-4)
    if noise == "scaled":  # the ratios of the noise stay
        factor = guide.log_alpha - before
        torch.testing.assert_close(factor, factor.mean().expand(8))
    else:
        worth = alpha * found.gate_fisher
        torch.testing.assert_close(worth, worth.mean().expand(8))


def test_the_tied_noise_follows_the_mean_curvature_of_rows_and_costs_gamma_loo() -> (
    None
):
    model = GateLoRA(nets.perceptron(), num_data=10**6)
    batch = nets.rows(8)
    drawn, guide = noise_by_evidence(model, RankDiagonal(model), [batch], noise="tied")
    assert isinstance(drawn, FactorLoRA) and isinstance(guide, RowDiagonal)
    found = evidence(model, RankDiagonal(model), [batch])
    variance = guide.log_variance.detach().exp() * guide.linearized_scale
    cost = (found.curvature * variance[guide.owner]).sum()
    assert float(cost) == pytest.approx(found.gamma_loo, rel=1e-4)
    h = torch.stack([found.curvature[guide.owner == i].mean() for i in range(16)])
    worth = variance * (h + found.precision)
    torch.testing.assert_close(worth, worth.mean().expand(16))
    assert drawn.likelihood is not model.likelihood


@pytest.fixture
def scaled() -> Iterator[tuple[Any, Any, dict[str, Tensor]]]:
    model = GateLoRA(nets.bert(), num_data=10**9)
    guide, batch = RankDiagonal(model), tokens()
    noise_by_evidence(model, guide, [batch])
    guide.linearized_scale = 7.0
    yield model, guide, batch


@pytest.mark.parametrize("noise", ["scaled", "fisher", "tied"])
@pytest.mark.parametrize("num_data", [60, 10**7])
def test_the_cost_is_gamma_loo_where_the_guides_bounds_cut_variances(
    num_data: int, noise: Any
) -> None:
    """At 10^7 data the lower bound does so; at 60 the upper, for a rank that is off."""
    model, batch = GateLoRA(nets.perceptron(), num_data=num_data), nets.rows(12)
    guide = RankDiagonal(model)
    with torch.no_grad():
        model.space.weights("lora_B")[0][:, 0] *= 1e-4
    found = evidence(model, guide, [batch])
    _, guide = noise_by_evidence(model, guide, [batch], noise=noise)
    (law,) = guide.distributions().values()
    worth = found.curvature if noise == "tied" else found.gate_fisher
    cost = guide.linearized_scale * float((law.variance.detach() * worth).sum())
    assert cost == pytest.approx(found.gamma_loo, rel=1e-4)
    low, high = (-20, 2) if noise == "tied" else (-10, 8)
    at = guide.log_variance.detach()
    cut = {"tied": False, "fisher": True, "scaled": num_data > 60}[noise]
    assert bool(((at == low) | (at == high)).any()) == cut


def test_the_two_noises_come_back_from_disk(scaled: Any, tmp_path: Path) -> None:
    model, guide, batch = scaled
    lrvd.save(tmp_path / "run", model, guide)
    base = copy.deepcopy(model.base_net).unload().requires_grad_(True)
    loaded = lrvd.load(tmp_path / "run", base)
    assert loaded[1].linearized_scale == 7.0
    for method in ("sample", "linearized"):
        ours, theirs = (
            lrvd.predict(*pair, [batch], 4, method=method).probs
            for pair in ((model, guide), loaded)
        )
        assert torch.equal(ours, theirs)


def test_tied_noise_is_pruned_saved_exported_and_goes_to_arviz(tmp_path: Path) -> None:
    model = GateLoRA(nets.bert(), num_data=10**9)
    batch = tokens()
    drawn, guide = noise_by_evidence(model, RankDiagonal(model), [batch], noise="tied")
    before = guide.log_variance.detach().clone()
    threshold = float(guide.log_alpha.median())
    keep = lrvd.prune(drawn, guide, log_alpha_threshold=threshold)
    assert 0 < int(keep.sum()) < 16
    assert torch.equal(guide.log_variance, before[keep.repeat(2)])
    lrvd.save(tmp_path / "run", drawn, guide)
    lrvd.export_peft(tmp_path / "plain", drawn, guide, probe=batch)
    base = copy.deepcopy(drawn.base_net).unload().requires_grad_(True)
    loaded = lrvd.load(tmp_path / "run", base)
    ours, theirs = (
        lrvd.predict(*pair, [batch], 4, method="linearized").probs
        for pair in ((drawn, guide), loaded)
    )
    torch.testing.assert_close(ours, theirs)
    data = lrvd.to_arviz(drawn, guide, [batch], 3)
    assert data["posterior"]["factor"].shape[-1] == drawn.space.flatten(*SIDES).numel()


def test_draws_of_another_noise_than_the_linearized_are_refused(scaled: Any) -> None:
    model, guide, batch = scaled
    draws = {"gate": torch.randn(50, model.space.size) * 0.1 + 1}
    with pytest.raises(
        ValueError, match=r"linearized_scale=7 besides; .*\(model, None"
    ):
        lrvd.predict(
            model, guide, [batch], method="linearized", posterior_samples=draws
        )
    given = lrvd.predict(
        model, None, [batch], method="linearized", posterior_samples=draws
    )
    guide.linearized_scale = 1.0
    same = lrvd.predict(
        model, guide, [batch], method="linearized", posterior_samples=draws
    )
    assert torch.equal(given.probs, same.probs)


def test_state_dicts_have_the_scale_and_those_of_before_have_none(scaled: Any) -> None:
    model, guide, _ = scaled
    state = guide.state_dict()
    other = RankDiagonal(model)
    other.load_state_dict(state)
    assert other.linearized_scale == 7.0
    earlier = {name: t for name, t in state.items() if name == "log_variance"}
    other.load_state_dict(earlier)
    assert other.linearized_scale == 1.0 and list(earlier) == ["log_variance"]
    assert copy.deepcopy((model, guide))[1].linearized_scale == 7.0


class Tokens(lrvd.likelihoods.Categorical):
    """Roots without contrasts, of as many tokens as a batch has."""

    contrasts = from_contrasts = None  # type: ignore[assignment]

    def fisher_roots(self, predictions: Tensor) -> Tensor:
        return 0.5 * (predictions[..., 1] - predictions[..., 0]).sum(1, keepdim=True)


def test_batches_of_two_lengths_need_no_contrasts() -> None:
    model = GateLoRA(nets.perceptron(), likelihood=Tokens(), num_data=20)
    batches = [{"x": 3 * torch.randn(10, length, 5)} for length in (4, 6)]
    guide = RankDiagonal(model)
    noise_by_evidence(model, guide, batches)
    assert guide.log_variance.isfinite().all()
