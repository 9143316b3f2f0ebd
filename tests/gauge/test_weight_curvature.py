"""The curvature about A and B, by its diagonal and its sketch."""

import math
from typing import Any

import nets
import pytest
import torch
from nets import tokens
from torch import Tensor, nn

from lrvd_pyro.gauge import Evidence, evidence
from lrvd_pyro.guides import RankDiagonal, RowDiagonal
from lrvd_pyro.guides.fisher_laplace import gate_fisher
from lrvd_pyro.models import FactorLoRA, GateLoRA

SIDES = ("lora_A", "lora_B")


NETS: dict[str, tuple[Any, Any]] = {
    "bert": (nets.bert, tokens),
    "perceptron": (nets.perceptron, nets.rows),
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


def test_a_layer_that_a_batch_leaves_out_gets_no_curvature_from_it() -> None:
    net = nets.lora(nets.TwoExperts(), target_modules=["0", "1"])
    net.eval()
    model = GateLoRA(net, num_data=8)
    guide, x = RankDiagonal(model), torch.rand(4, 5)
    both, first = (evidence(model, guide, [{"x": each}]) for each in (x, -x))
    found = evidence(model, guide, [{"x": x}, {"x": -x}])
    torch.testing.assert_close(found.curvature, (both.curvature + first.curvature) / 2)
    names = model.space.coordinates["module"]
    assert names[-1] == "experts.1" and first.gate_fisher[-1] == 0
    assert both.gate_fisher[-1] > 0 and first.gate_fisher[0] > 0


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
    guide, batch = RankDiagonal(model), nets.rows(6)
    found = evidence(
        model, guide, [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    )
    weights = [w for side in SIDES for w in model.space.weights(side)]
    assert found.sketch.shape[2] == sum(w.numel() for w in weights)  # so it is exact
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
    guide, batch = RankDiagonal(model), nets.rows(8)
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


def wide(count: int) -> Any:
    """A network of P = 3,888 weights in A and B."""
    net = nets.lora(nets.Perceptron(40, 100), target_modules=["hidden", "out"], r=16)
    return GateLoRA(net.float(), num_data=count)


def test_a_sketch_shorter_than_the_gradients_keeps_gamma_loo() -> None:
    """P = 3,888 and n K = 2,100 gradients are both beyond the 2,048 of a sketch."""
    model, batches = (
        wide(40_000),
        [{"x": 3 + torch.randn(150, 40).float()} for _ in range(7)],
    )
    short = evidence(model, RankDiagonal(model), batches)
    model.num_data = 1050
    whole = evidence(model, RankDiagonal(model), batches)
    assert short.sketch.shape == (1050, 2, 2048) and whole.sketch.shape[2] == 3888
    exact = Evidence(short.curvature, None, whole.sketch, whole.slopes, short.scale)
    with pytest.warns(UserWarning, match="may be wrong by .* a sketch of 2048 numbers"):
        assert short.gamma_loo == pytest.approx(exact.gamma_loo, rel=0.05)
    assert short.gamma == pytest.approx(exact.gamma, rel=0.05)


def test_more_examples_than_num_data_are_refused_by_name() -> None:
    model, batches = GateLoRA(nets.perceptron(), num_data=8), [nets.rows(6)]
    assert evidence(model, RankDiagonal(model), batches).scale == pytest.approx(8 / 6)
    with pytest.raises(
        ValueError, match=r"got 12 .* num_data=8; .*GateLoRA\(..., num_data=len\(train"
    ):
        evidence(model, RankDiagonal(model), [*batches, *batches])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_batches_in_half_precision_go_on(dtype: torch.dtype) -> None:
    """In half precision itself they would stop after some 100 batches."""
    model = GateLoRA(nets.perceptron().to(dtype), num_data=600)
    batches = [{"x": torch.randn(1, 5).to(dtype)} for _ in range(600)]
    half = evidence(model, RankDiagonal(model), batches)
    model.base_net.float()
    single = [{"x": batch["x"].float()} for batch in batches]
    exact = evidence(model, RankDiagonal(model), single)
    for name in ("curvature", "gate_fisher"):
        ours, theirs = getattr(half, name), getattr(exact, name)
        assert ours.dtype is torch.float32
        assert float(ours.sum()) == pytest.approx(float(theirs.sum()), rel=0.02)
    assert half.gamma_loo == pytest.approx(exact.gamma_loo, rel=0.05)


def test_many_classes_are_taken_root_by_root() -> None:
    """One sum of 19 roots by random signs would have another gamma_loo by factors."""
    net = nets.lora(nets.Perceptron(5, 6, 20), target_modules=["hidden", "out"])
    model, batch = GateLoRA(net, num_data=30), {"x": torch.randn(30, 5)}
    found = evidence(model, RankDiagonal(model), [batch])
    assert found.sketch.shape[:2] == (30, 19)
    signed = evidence(model, RankDiagonal(model), [batch], sampled=True)
    assert signed.sketch is None and signed.curvature.shape == found.curvature.shape
    with pytest.raises(ValueError, match="random signs, which give the diagonal"):
        _ = signed.gamma_loo
