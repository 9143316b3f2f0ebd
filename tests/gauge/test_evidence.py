"""Noise by evidence: the curvature, the count of parameters, and the scales."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import tokens
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import evidence, noise_by_evidence
from lrvd_pyro.gauge.sample_scale import sample_scale
from lrvd_pyro.guides import RankDiagonal, RowDiagonal, TiedDiagonal
from lrvd_pyro.guides.fisher_laplace import gate_fisher
from lrvd_pyro.likelihoods import Normal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.predictive.linearized import Linearized, gate_gaussian

SIDES = ("lora_A", "lora_B")


def images(size: int = 6) -> dict[str, Tensor]:
    return {"x": torch.randn(size, 3, 6, 6), "labels": torch.arange(size) % 3}


def rows(size: int = 6) -> dict[str, Tensor]:
    return {"x": torch.randn(size, 5), "labels": torch.arange(size) % 3}


NETS: dict[str, tuple[Any, Any]] = {
    "bert": (nets.bert, tokens),
    "perceptron": (nets.perceptron, rows),
}


def by_hand(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The diagonal of the Gauss-Newton matrix, from one Jacobian at a time."""
    weights = [w for side in SIDES for w in model.space.weights(side)]
    each = [r for side in SIDES for r in model.space.rows(side)]
    total = [torch.zeros_like(w) for w in weights]
    net, size = model.base_net.eval(), len(batch["labels"])
    for i in range(size):
        one = {k: v[i : i + 1] for k, v in batch.items() if k != "labels"}
        output = net(**one)
        logits = getattr(output, "logits", output)[0]
        p = logits.detach().softmax(-1)
        jacobian = [
            torch.autograd.grad(logit, weights, retain_graph=True) for logit in logits
        ]
        metric = p.diag() - p.outer(p)
        for j, h in enumerate(total):
            J = torch.stack([row[j] for row in jacobian])
            h += torch.einsum("c...,cd,d...->...", J, metric, J)
    flat = [layout.flatten(h) for layout, h in zip(each, total)]
    return torch.cat(flat) * model.num_data / size


@pytest.mark.parametrize("family", [GateLoRA, FactorLoRA])
@pytest.mark.parametrize("net", NETS)
def test_the_curvature_is_that_of_each_examples_jacobian(net: str, family: Any) -> None:
    make, batch_of = NETS[net]
    options = {"sides": SIDES} if family is FactorLoRA else {}
    model = family(make(), num_data=60, **options)
    guide = RankDiagonal(model) if family is GateLoRA else RowDiagonal(model)
    batches = [batch_of(6), batch_of(4)]
    found = evidence(model, guide, batches)
    expected = (6 * by_hand(model, batches[0]) + 4 * by_hand(model, batches[1])) / 10
    torch.testing.assert_close(found.curvature, expected)
    twice = by_hand(model, batches[0]) + by_hand(model, batches[1])  # N/B twice
    assert not torch.allclose(found.curvature, twice)
    if found.gate_fisher is not None:
        exact = gate_fisher(model, model.space.ones(), batches).diagonal()
        torch.testing.assert_close(found.gate_fisher, exact)


class Experts(nn.Module):
    """Only batches with a positive sum go to the second expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.experts[0](x)
        return y + self.experts[1](x) if x.sum() > 0 else y


def test_a_layer_that_a_batch_leaves_out_gets_no_curvature_from_it() -> None:
    net = nets.lora(Experts(), target_modules=["0", "1"])
    net.eval()
    model = GateLoRA(net, num_data=8)
    guide, x = RankDiagonal(model), torch.rand(4, 5)
    both, first = (evidence(model, guide, [{"x": each}]) for each in (x, -x))
    found = evidence(model, guide, [{"x": x}, {"x": -x}])
    torch.testing.assert_close(found.curvature, (both.curvature + first.curvature) / 2)
    names = model.space.coordinates["module"]
    assert names[-1] == "experts.1" and first.gate_fisher[-1] == 0
    assert both.gate_fisher[-1] > 0 and first.gate_fisher[0] > 0


def test_noise_by_fisher_refuses_a_layer_that_the_batches_leave_out() -> None:
    net = nets.lora(Experts(), target_modules=["0", "1"]).eval()
    model = GateLoRA(net, num_data=3000)
    guide, batch = RankDiagonal(model), {"x": -torch.rand(40, 5)}
    before = guide.log_variance.detach().clone()
    with pytest.raises(ValueError, match=r"gates of \['experts.1'\] move no predicti"):
        noise_by_evidence(model, guide, [batch], noise="fisher")
    assert torch.equal(guide.log_variance, before)
    _, guide = noise_by_evidence(model, guide, [batch])
    assert guide.log_variance.isfinite().all()


def test_a_part_that_the_first_batch_skips_has_no_curvature() -> None:
    """The pass that looks for it again is not differentiated."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.pictures = nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 3))

        def forward(self, x: Tensor, pixels: Tensor | None = None) -> Tensor:
            y = self.words(x)
            return y if pixels is None else y + self.pictures(pixels)

    net = nets.lora(Towers(), target_modules=["words", "0"]).eval()
    model = GateLoRA(net, num_data=8)
    with pytest.warns(UserWarning, match="did not run the parts around 1 LoRA module"):
        found = evidence(model, RankDiagonal(model), [{"x": torch.rand(1, 5)}])
    size = model.space.weights("lora_A")[0].numel()
    pictures = model.space.modules.index("pictures.0")
    h = found.curvature[pictures * size : (pictures + 1) * size]
    assert h.abs().max() == 0 and found.curvature.sum() > 0


def test_the_sketch_has_the_inner_products_of_the_gradients_and_the_slopes() -> None:
    model = GateLoRA(nets.perceptron(), num_data=60)
    guide, batch = RankDiagonal(model), rows(6)
    found = evidence(
        model, guide, [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    )
    weights = [w for side in SIDES for w in model.space.weights(side)]
    assert sum(w.numel() for w in weights) < found.sketch.shape[2]  # so it is exact
    roots = model.likelihood.fisher_roots(model.predictions(x=batch["x"]))
    each = [
        torch.autograd.grad(root, weights, retain_graph=True)
        for root in roots.flatten()
    ]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in each])
    S = found.sketch.flatten(0, 1)
    torch.testing.assert_close(S @ S.T, J @ J.T)
    theta = torch.cat([w.detach().flatten() for w in weights])
    torch.testing.assert_close(found.slopes.flatten(), J @ theta)


def test_one_sum_by_random_signs_has_no_bias_and_one_without_signs_has() -> None:
    model = GateLoRA(nets.perceptron(), num_data=60)
    guide, batch = RankDiagonal(model), rows(8)
    exact = evidence(model, guide, [batch]).curvature.sum()
    generator = torch.Generator().manual_seed(0)
    drawn = [
        evidence(model, guide, [batch], sampled=True, generator=generator)
        for _ in range(200)
    ]
    sums = torch.stack([found.curvature.sum() for found in drawn])
    error = sums.std() / math.sqrt(len(sums))
    assert (sums.mean() - exact).abs() < 4 * error
    weights = model.space.weights("lora_B")  # the twin: the plain sum of the roots
    unsigned = torch.zeros(())
    for i in range(8):
        roots = model.likelihood.fisher_roots(
            model.predictions(x=batch["x"][i : i + 1])
        )
        gradients = torch.autograd.grad(roots.sum(), weights, retain_graph=True)
        unsigned += sum(g.square().sum() for g in gradients)
    offset = sum(w.numel() for w in model.space.weights("lora_A"))
    of_B = evidence(model, guide, [batch]).curvature[offset:].sum()
    assert (unsigned * 60 / 8 - of_B).abs() > 0.02 * of_B


@pytest.mark.parametrize("noise", ["scaled", "fisher"])
def test_the_quadratic_cost_of_the_gates_noise_becomes_gamma_loo(noise: Any) -> None:
    model = GateLoRA(nets.perceptron(), num_data=60)
    guide = RankDiagonal(model, init_log_alpha=-5.0)
    with torch.no_grad():
        guide.log_variance += torch.linspace(-1, 1, 8)
    before, batches = guide.log_alpha, [rows(8)]
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
    batch = rows(8)
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


def covariances(model: Any, guide: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Of the contrasts, linearized and of draws."""
    inputs = {name: v for name, v in batch.items() if name != "labels"}
    exact = Linearized(model, gate_gaussian(model, guide, inputs)).contrasts(inputs)[1]
    drawn = lrvd.predict(model, guide, [inputs], 4000, return_samples=True).samples
    contrasts = (drawn[..., 1:] / drawn[..., :1]).log()
    centered = contrasts - contrasts.mean(0)
    return exact, torch.einsum("sbj,sbk->bjk", centered, centered) / 4000


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("family", [RowDiagonal, TiedDiagonal])
def test_the_linearized_predictive_of_weights_is_that_of_small_draws(
    family: Any, net: str
) -> None:
    make, batch_of = NETS[net]
    model = FactorLoRA(make(), num_data=60, sides=SIDES)
    guide, batch = family(model, init_log_alpha=-9.0), batch_of(4)
    exact, drawn = covariances(model, guide, batch)
    torch.testing.assert_close(drawn, exact, rtol=0.25, atol=0.05 * float(exact.max()))
    guide.linearized_scale = 3.0  # the twin: draws do not know of it
    widened, again = covariances(model, guide, batch)
    torch.testing.assert_close(widened, 3 * exact)
    torch.testing.assert_close(again, drawn)


class Square(nn.Module):
    """``y = (w x)^2``, where LoRA is the whole weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) ** 2


def test_draws_get_the_noise_at_which_their_mean_moves_as_far_as_they_spread() -> None:
    """z ~ N(1, s a): z^2 moves by s a, and spreads by 2 sqrt(s a) in its odd part."""
    net = nets.lora(Square(), target_modules=["layer"], r=1)
    model = GateLoRA(net, likelihood=Normal(1.0), num_data=30)
    batch = {"x": torch.ones(30, 1), "labels": torch.zeros(30)}
    mean, variance = torch.ones(1), torch.full((1,), 0.25)
    found = sample_scale(model, mean, variance, [batch], 1000.0)
    # The shift s a equals the spread 2 sqrt(s a) at s a = 4; of few draws, roughly.
    assert 1.5 < found * 0.25 < 12
    assert sample_scale(model, mean, variance, [batch], 0.5) == 0.5


def test_a_network_linear_in_its_gates_bears_all_of_the_noise() -> None:
    model = GateLoRA(nets.regression(), likelihood=Normal(1.0), num_data=3000)
    guide, batch = RankDiagonal(model), {"x": torch.randn(30, 5)}
    noise_by_evidence(model, guide, [batch])
    assert guide.linearized_scale == pytest.approx(1.0)


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
    model, batch = GateLoRA(nets.perceptron(), num_data=60), rows()
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
