"""Noise by evidence: what it costs, where it goes, and what has none."""

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


def test_noise_by_fisher_refuses_a_layer_that_the_batches_leave_out() -> None:
    net = nets.lora(nets.TwoExperts(), target_modules=["0", "1"]).eval()
    model = GateLoRA(net, num_data=3000)
    guide, batch = RankDiagonal(model), {"x": -torch.rand(40, 5)}
    before = guide.log_variance.detach().clone()
    with pytest.raises(ValueError, match=r"gates of \['experts.1'\] move no predicti"):
        noise_by_evidence(model, guide, [batch], noise="fisher")
    assert torch.equal(guide.log_variance, before)
    _, guide = noise_by_evidence(model, guide, [batch])
    assert guide.log_variance.isfinite().all()


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


class NoCurvature(lrvd.likelihoods.Categorical):
    fisher_roots = None  # type: ignore[assignment]


def test_what_has_no_evidence_is_refused_and_the_pair_stays() -> None:
    model, batch = GateLoRA(nets.perceptron(), num_data=60), nets.rows()
    guide = RankDiagonal(model)
    before = guide.log_variance.detach().clone()
    with pytest.raises(ValueError, match="got no batches"):
        noise_by_evidence(model, guide, [])
    with pytest.raises(TypeError, match="one batch; expected several"):
        noise_by_evidence(model, guide, batch)
    with pytest.raises(TypeError, match=r"only once, .*guide, list\(batches\), ...\)"):
        noise_by_evidence(model, guide, iter([batch]))  # it is read twice
    with pytest.raises(ValueError, match='expected "scaled", "fisher" or "tied"'):
        noise_by_evidence(model, guide, [batch], noise="own")  # type: ignore[arg-type]
    with torch.no_grad():
        for side in SIDES:
            for weight in model.space.weights(side):
                weight.mul_(1e-3)
    with pytest.raises(ValueError, match="has no maximum: it rises until delta"):
        noise_by_evidence(model, guide, [batch])
    with torch.no_grad():
        for side in SIDES:
            for weight in model.space.weights(side):
                weight.zero_()
    with pytest.raises(
        ValueError, match="has no maximum: .*of the curvature is 0; train"
    ):
        noise_by_evidence(model, guide, [batch])
    assert torch.equal(guide.log_variance, before) and guide.linearized_scale == 1.0
    plain = GateLoRA(nets.perceptron(), likelihood=NoCurvature(), num_data=60)
    with pytest.raises(TypeError, match="noise by evidence needs .*fisher_roots"):
        noise_by_evidence(plain, RankDiagonal(plain), [batch])


def test_guides_and_networks_of_another_kind_are_refused() -> None:
    batch = tokens()
    horseshoe = GateLoRA(nets.bert(), prior=lrvd.priors.Horseshoe(), num_data=60)
    with pytest.raises(TypeError, match="needs one variance per gate: RankDiagonal on"):
        noise_by_evidence(horseshoe, RankDiagonal(horseshoe), [batch])
    model = GateLoRA(nets.bert(), prior=lrvd.priors.Normal(), num_data=60)
    learned = RankDiagonal(model, learn_mean=True)
    with torch.no_grad():
        learned.loc.mul_(0.5)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="some gates have a mean other than 1"):
        noise_by_evidence(model, learned, [batch], noise="tied")
    dora = GateLoRA(nets.bert(use_dora=True), num_data=60)
    with pytest.raises(ValueError, match="use plain LoRA"):
        noise_by_evidence(dora, RankDiagonal(dora), [batch])
    with pytest.raises(ValueError, match="linearized_scale=0; expected a positive num"):
        RankDiagonal(model, linearized_scale=0)
