"""The balanced gauge: what `gramians` measures and what `balance` changes."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gauges import found, mix, rows, seeded, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import (
    RAGGED,
    bert,
    conv,
    gpt2,
    perceptron,
    regression,
    tokens,
)
from peft import PeftModel
from torch import Tensor

from lrvd_pyro import likelihoods
from lrvd_pyro.gauge import balance, gramians, hankel_values
from lrvd_pyro.guides.fisher_laplace import gate_fisher
from lrvd_pyro.models import GateLoRA


def off_diagonal(gramian: Tensor, t: Tensor) -> float:
    """How far a matrix is from diag(t), relative to the largest of t."""
    return float((gramian - t.diag()).abs().max() / t[0])


@pytest.fixture
def single() -> None:
    """Networks in float32; the tests' own fixture restores what was."""
    torch.set_default_dtype(torch.float32)


NETS: dict[str, Callable[[], tuple[PeftModel, dict[str, Tensor]]]] = {
    "bert": lambda: (bert(), tokens(12)),
    "gpt2": lambda: (lm(), tokens(12)),
    "ragged perceptron": lambda: (perceptron(**RAGGED), rows(12, 5)),
    "convolutions": lambda: (conv(), {"x": torch.randn(12, 3, 8, 8)}),
    "rank 1": lambda: (perceptron(r=1), rows(12, 5)),
}


def lm() -> PeftModel:
    """A network whose `logits` are one class each, so that they can be sampled."""
    net = gpt2()
    net.base_model.model.lm_head = torch.nn.Sequential(Last(), torch.nn.Linear(16, 3))
    return net


class Last(torch.nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, -1]


@pytest.mark.parametrize("name", NETS)
def test_both_second_moments_become_one_diagonal(name: str) -> None:
    torch.manual_seed(1)
    net, batch = NETS[name]()
    before = found(net, [batch])
    values = hankel_values(before)
    balance(net, before)
    after = found(net, [batch])
    for module, t in values.items():
        alive = t > 1e-3 * t[0]
        for gram in (after.activations[module], after.gradients[module]):
            assert off_diagonal(gram[alive][:, alive], t[alive]) < 1e-6
        assert (t.diff() <= 0).all()


@pytest.mark.parametrize("name", NETS)
def test_the_function_stays_what_it_was(name: str, single: None) -> None:
    torch.manual_seed(1)
    net, batch = NETS[name]()
    batch.pop("labels", None)
    mix(net, seed=3, condition=30.0)
    net.eval()
    before = getattr(net(**batch), "logits", net(**batch)).detach()
    old = [a.clone() for a, _ in weights(net)]
    balance(net, found(net, [batch]))
    after = getattr(net(**batch), "logits", net(**batch)).detach()
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert all((a != b).any() for a, (b, _) in zip(old, weights(net)))


def test_activations_gradients_and_fisher_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    net = regression(features=5, r=3)
    x, y = torch.randn(40, 5), torch.randn(40)
    model = GateLoRA(net, num_data=80, likelihood=likelihoods.Normal(0.5))
    ours = gramians(model, [{"x": x, "labels": y}], labels="observed")
    ((a, b),) = weights(net)
    h = x @ a.T
    residual = (y - net(x).squeeze(-1)).detach() / 0.5**2
    g = residual[:, None] * b.squeeze(0)  # d log p / dh; the scaling is 1
    (name,) = ours.gradients
    torch.testing.assert_close(ours.activations[name], h.T @ h / 40)
    torch.testing.assert_close(ours.gradients[name], 2 * g.T @ g)
    torch.testing.assert_close(ours.gate_fisher, 2 * (h * g).square().sum(0))


def test_sampled_labels_give_the_true_fisher_and_observed_ones_do_not() -> None:
    torch.manual_seed(0)
    net = bert()
    batch = tokens(8)
    many = {
        name: value.repeat(400, 1) for name, value in batch.items() if name[0] != "l"
    }
    model = GateLoRA(net, num_data=8)
    exact = gate_fisher(model, model.space.ones(), [batch]).diagonal()
    sampled = gramians(model, [many], generator=seeded()).gate_fisher
    observed = gramians(model, [batch], labels="observed").gate_fisher
    live = exact > 1e-2 * exact.max()
    assert ((sampled / exact - 1).abs()[live] < 0.15).all()
    assert ((observed / exact - 1).abs()[live] > 0.15).any()


def test_subsets_give_the_fisher_averaged_over_all_subsets_and_ones_do_not() -> None:
    """Against all 2^R subsets, each of probability 1 / ((R + 1) (R over its size))."""
    torch.manual_seed(0)
    net, batch = perceptron(r=2), rows(8, 5)
    model = GateLoRA(net, num_data=8)
    size, exact = model.space.size, torch.zeros(model.space.size)
    for chosen in itertools.product((0.0, 1.0), repeat=size):
        gate = torch.tensor(chosen)
        weight = 1 / ((size + 1) * math.comb(size, int(sum(chosen))))
        exact += weight * gate_fisher(model, gate, [batch]).diagonal()
    many = {name: value.repeat(3000, 1) for name, value in batch.items()}
    ours, ones = (
        gramians(model, [many], gates=gates, generator=seeded()).gate_fisher
        for gates in ("subsets", "ones")
    )
    assert ((ours / exact - 1).abs() < 0.1).all()
    assert ((ones / exact - 1).abs() > 0.2).any()


def test_labels_of_a_regression_are_sampled_without_a_gradient() -> None:
    """Through a reparameterized label the gradient would be 0."""
    model = GateLoRA(regression(), num_data=50, likelihood=likelihoods.Normal())
    assert (gramians(model, [rows(50, 5)]).gate_fisher > 0).all()


def test_padding_enters_neither_second_moment() -> None:
    torch.manual_seed(0)
    net = bert()
    short = tokens(6, length=4)
    padded = {
        "input_ids": torch.cat([short["input_ids"], torch.full((6, 3), 9)], 1),
        "attention_mask": torch.cat([short["attention_mask"], torch.zeros(6, 3)], 1),
        "labels": short["labels"],
    }
    plain, long = (found(net, [b], labels="observed") for b in (short, padded))
    for name in plain.gradients:
        if "value" in name or "layer.1" in name:  # a padded query still has an output
            torch.testing.assert_close(plain.activations[name], long.activations[name])
        torch.testing.assert_close(plain.gradients[name], long.gradients[name])
    twin = dict(padded, attention_mask=torch.ones(6, 7))
    seen = found(net, [twin], labels="observed")
    assert (seen.gradients[name] - plain.gradients[name]).abs().max() > 1e-6


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), power=st.floats(0, 3))
def test_hankel_values_do_not_depend_on_the_gauge(seed: int, power: float) -> None:
    torch.manual_seed(0)
    net = bert()
    batch = tokens(30)
    before = hankel_values(found(net, [batch]))
    mix(net, seed, 10**power)
    after = hankel_values(found(net, [batch]))
    for name, t in before.items():
        alive = t > 1e-4 * t[0]
        assert ((after[name] / t - 1).abs()[alive] < 1e-6).all()


def test_hankel_values_do_not_depend_on_the_gauge_in_float32(single: None) -> None:
    torch.manual_seed(0)
    net, batch = bert(), tokens(30)
    before = hankel_values(found(net, [batch]))
    mix(net, 5, 1e3)
    after = hankel_values(found(net, [batch]))
    for name, t in before.items():
        alive = t > 1e-4 * t[0]
        assert ((after[name] / t - 1).abs()[alive] < 1e-3).all()


def test_two_gauges_of_one_adapter_balance_to_the_same_weights() -> None:
    torch.manual_seed(0)
    net, batch = bert(), tokens(30)
    twin = bert()
    twin.load_state_dict(net.state_dict())
    mix(twin, 7, 30.0)
    for each in (net, twin):
        balance(each, found(each, [batch]))
    for (a, b), (c, d), t in zip(
        weights(net), weights(twin), hankel_values(found(net, [batch])).values()
    ):
        alive = t > 1e-3 * t[0]
        torch.testing.assert_close(a[alive], c[alive], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(b[:, alive], d[:, alive], rtol=1e-4, atol=1e-6)


def test_idle_components_keep_the_length_of_their_rows() -> None:
    """A rank-deficient B: two of four components say nothing."""
    torch.manual_seed(0)
    net = perceptron()
    with torch.no_grad():
        for _, b in weights(net):
            b[:, 2:] = b[:, :2]
    before = [a.square().sum(1).mean().sqrt() for a, _ in weights(net)]
    balance(net, found(net, [rows(50, 5)]))
    for length, (a, _) in zip(before, weights(net)):
        torch.testing.assert_close(a.norm(dim=1)[2:], length.expand(len(a) - 2))
        assert a.isfinite().all()


def test_inputs_on_a_line_are_balanced_too() -> None:
    """Rank-deficient activations: the ridge holds, and the function stays."""
    torch.manual_seed(0)
    net = regression()
    x = torch.randn(50, 1) * torch.randn(5)
    before = net(x).detach()
    balance(net, found(net, [{"x": x}], generator=seeded()))
    ((a, b),) = weights(net)
    assert a.isfinite().all() and b.isfinite().all()
    torch.testing.assert_close(net(x).detach(), before)


def test_a_module_whose_B_is_zero_stays_as_it_is() -> None:
    torch.manual_seed(0)
    net = perceptron()
    (first, second), (other, _) = weights(net)
    with torch.no_grad():
        second.zero_()
    old = first.detach().clone(), other.detach().clone()
    changes = balance(net, found(net, [rows(20, 5)]))
    assert list(changes) == ["out"]
    assert torch.equal(first, old[0]) and not torch.equal(other, old[1])


def test_mixed_precision_and_half_weights_are_balanced() -> None:
    torch.manual_seed(0)
    net, batch = bert().bfloat16(), tokens(30)
    before = net.eval()(**batch).logits.detach()
    balance(net, found(net, [batch]))
    after = net(**batch).logits.detach()
    assert (after - before).abs().max() <= 0.05 * before.abs().max()
    assert all(g.dtype == torch.float64 for g in found(net, [batch]).gradients.values())


def test_optimizer_state_moves_with_the_basis() -> None:
    """The first moment of Adam is linear in gradients: that of the balanced network."""
    torch.manual_seed(0)
    net, batch = perceptron(), rows(30, 5)
    pairs = weights(net)
    optim = torch.optim.AdamW(
        [w for pair in pairs for w in pair], lr=0.0, betas=(0.0, 0.9)
    )

    def backward() -> None:
        optim.zero_grad()
        net(batch["x"]).square().sum().backward()

    backward()
    optim.step()
    balance(net, found(net, [batch]), optim)
    backward()
    for pair in pairs:
        for weight in pair:
            torch.testing.assert_close(optim.state[weight]["exp_avg"], weight.grad)
            assert (optim.state[weight]["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("lengths", ["balanced", "kept"])
def test_components_that_are_all_zero_stay_finite(lengths: Any) -> None:
    """As `export_peft(mode="padded")` leaves them."""
    net, batch = perceptron(), rows(30, 5)
    with torch.no_grad():
        for a, b in weights(net):
            a[3], b[:, 3] = 0, 0
    before = net(**batch).detach()
    balance(net, found(net, [batch]), lengths=lengths)
    assert all(w.isfinite().all() for pair in weights(net) for w in pair)
    torch.testing.assert_close(net(**batch).detach(), before)
