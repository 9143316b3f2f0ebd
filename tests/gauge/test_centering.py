"""Gates about a center: what they do to a layer, and to the gauge."""

import copy

import nets
import pytest
import torch
from centered import NETS, centered, exactly, where
from gauges import found, mix, rows, weights
from nets import bert, perceptron, regression, tokens
from pruned import outputs, some
from pyro.infer import SVI
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import (
    BalanceSchedule,
    Gramians,
    balance,
    bayesianize,
    center,
    hankel_values,
)
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.categorical import Categorical
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.rank_space.center import center_at, center_of
from lrvd_pyro.selection.removal import select

pytestmark = pytest.mark.filterwarnings(nets.GROUPED)


def test_a_gate_pulls_its_rank_towards_the_center() -> None:
    """Against the formula, one gate per example."""
    net, x = regression(features=5, r=3), torch.randn(4, 5)
    model, point = centered(net)
    gate = torch.randn(4, 3)
    with torch.no_grad():
        base = net.get_base_model().linear.base_layer(x)
        ((a, b),) = weights(net)
        expected = base + (point + gate * (x @ a.T - point)) @ b.T
        exactly(outputs(model, gate, {"x": x}), expected)
        assert (expected - base - (gate * (x @ a.T)) @ b.T).abs().max() > 0.1


@pytest.mark.parametrize("kind", NETS)
def test_at_gates_of_one_the_network_is_what_it_was(kind: str) -> None:
    net, inputs = NETS[kind]()
    before = outputs(model := GateLoRA(net, num_data=60), model.space.ones(), inputs)
    center_at(model.space, torch.randn(model.space.size))
    assert torch.equal(outputs(model, model.space.ones(), inputs), before)
    after = outputs(model, 0.5 * model.space.ones(), inputs)
    center_at(model.space, None)
    assert not center_of(model.space)
    assert not torch.equal(outputs(model, 0.5 * model.space.ones(), inputs), after)


@pytest.mark.parametrize("kind", NETS)
def test_what_is_removed_stays_at_its_center(kind: str) -> None:
    net, inputs = NETS[kind]()
    model, point = centered(net)
    guide, keep = RankDiagonal(model), some(model.space)
    at_zero = outputs(model, keep.to(point), inputs)
    without = GateLoRA(copy.deepcopy(net), num_data=60)
    center_at(without.space, None)
    assert (outputs(without, keep.to(point), inputs) - at_zero).abs().max() > 1e-5
    gone, modules = model.space.modules[0], len(model.space.modules)
    select(model, guide, keep=keep)
    exactly(outputs(model, model.space.ones(), inputs), at_zero)
    exactly(where(model), point[keep])
    assert list(model.space.constants) == [gone]
    select(model, guide, keep=torch.arange(model.space.size) == 0)
    assert len(model.space.constants) == modules - 1


def test_what_is_left_behind_does_not_train_and_costs_no_backward_pass() -> None:
    net = bert()
    model, point = centered(net)
    guide = RankDiagonal(model)
    svi = SVI(model, guide, lrvd.optim.AdamW(lr=1e-2), loss=lrvd.RankELBO())
    svi.step(**tokens())
    layer = torch.tensor(model.space.coordinates["layer"])
    select(model, guide, svi.optim, keep=layer == 1)
    constants = list(model.space.constants.values())
    assert len(constants) == 2
    kept = [m.lora_B["default"].bias.clone() for m in constants]  # type: ignore[union-attr,operator]
    hidden: list[Tensor] = []
    encoder = net.get_base_model().bert.encoder
    encoder.layer[0].register_forward_hook(lambda m, a, y: hidden.append(y))
    svi.step(**tokens())
    assert not any(p.requires_grad for m in constants for p in m.parameters())
    assert not getattr(hidden[0], "requires_grad", hidden[0][0].requires_grad)
    for module, bias in zip(constants, kept):
        assert torch.equal(module.lora_B["default"].bias, bias) and bias.any()  # type: ignore[arg-type]


def test_inputs_that_never_change_have_no_covariance() -> None:
    """Rounding beside the mean is not a direction: the module stays as it is."""
    torch.manual_seed(5)
    net = perceptron()
    grams = found(net, [{"x": torch.randn(1, 5).expand(5, 5)}])
    before = [a.clone() for a, _ in weights(net)]
    assert balance(net, grams.centered()) == {}
    assert all(torch.equal(a, b) for a, (b, _) in zip(before, weights(net)))
    assert len(balance(net, grams)) == 2


def test_means_are_those_of_tokens_that_matter() -> None:
    net, batch = bert(), tokens(6)
    batch["attention_mask"][:3, 3:] = 0
    grams = found(net, [batch])
    hidden: list[Tensor] = []
    layer = net.get_base_model().bert.encoder.layer[0].attention.self.query
    layer.lora_A["default"].register_forward_hook(lambda m, a, h: hidden.append(h))
    with torch.no_grad():
        net(**batch)
    name = "bert.encoder.layer.0.attention.self.query"
    seen = hidden[0][batch["attention_mask"].bool()]
    exactly(grams.means[name], seen.mean(0))
    covariance = seen.T.cov(correction=0)
    exactly(grams.centered().activations[name], covariance)
    assert (grams.means[name] - hidden[0].mean((0, 1))).abs().max() > 1e-3


def test_second_moments_about_a_stale_center_are_those_of_the_activations() -> None:
    """A center stays while A trains: the mean has moved away from it."""
    net, batch = regression(outputs=4), {"x": 1.0 + torch.randn(40, 5)}
    ((a, _),) = weights(net)
    grams = found(net, [batch])
    h, stale = (batch["x"] @ a.T).detach(), torch.randn(3)
    about = grams.centered({"linear": stale}).activations["linear"]
    exactly(about, (h - stale).T @ (h - stale) / len(h))
    covariance = grams.centered().activations["linear"]
    assert (about - covariance).abs().max() > 0.1  # the twin: about the mean


def test_centered_hankel_values_are_the_same_from_any_gauge() -> None:
    net, batch = bert(), tokens(12)
    before = hankel_values(found(net, [batch]).centered())
    mix(net, seed=1, condition=100.0)
    after = hankel_values(found(net, [batch]).centered())
    for name, t in before.items():
        live = t > 1e-4 * t[0]
        torch.testing.assert_close(after[name][live], t[live], rtol=1e-6, atol=0)


def test_balancing_takes_the_center_along() -> None:
    """The means of the new components, as if they had been taken again."""
    net, batch = bert(), tokens(12)
    model = GateLoRA(net, num_data=60)
    grams = found(net, [batch])
    center(model, grams)
    balance(net, grams.centered())
    expected = torch.cat([*found(net, [batch]).means.values()])
    torch.testing.assert_close(where(model), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("about_the_mean", [True, False])
def test_k_components_about_the_mean_are_the_best_affine_update_of_rank_k(
    about_the_mean: bool,
) -> None:
    """On one linear layer of isotropic error: Eckart and Young, with an intercept.

    Without the center, the first component is spent on the mean.
    """
    net = regression(features=6, r=3, outputs=4)
    x = torch.randn(500, 6) * torch.logspace(0, -1, 6) + 3.0
    model = GateLoRA(net, num_data=500)
    update = weights(net)[0][1] @ weights(net)[0][0]
    target = (x @ update.T).detach()
    values = torch.linalg.svdvals(target - target.mean(0))
    grams = found(net, [{"x": x}])
    for name in grams.gradients:  # the exact one: all outputs weigh the same
        b = weights(net)[0][1]
        grams.gradients[name] = b.T @ b
    if about_the_mean:
        center(model, grams)
        grams = grams.centered()
    balance(net, grams)
    full = outputs(model, model.space.ones(), {"x": x})
    for k in (1, 2):
        gate = (torch.arange(3) < k).to(x)
        lost = (outputs(model, gate, {"x": x}) - full).square().sum()
        best = values[k:].square().sum()
        assert bool(lost < (1 + 1e-6) * best) is about_the_mean


def test_rebalancing_in_training_goes_by_covariances_about_a_center() -> None:
    net, batch = bert(), tokens(32)
    model, guide = bayesianize(net, [batch], likelihood=Categorical(), centered=True)
    svi = SVI(model, guide, lrvd.optim.AdamW(lr=1e-3), loss=lrvd.RankELBO())
    schedule = BalanceSchedule(model, guide, svi.optim, every=2, gather_every=1)
    svi.step(**batch)
    schedule.step()
    svi.step(**batch)
    grams, point = schedule.gramians(), where(model)
    saved = schedule.state_dict()
    schedule.load_state_dict(saved)
    for name, mean in schedule.gramians().means.items():
        assert torch.equal(mean, grams.means[name])
    parts = model.space.split(point)
    changes = schedule.step()
    assert changes
    moved = model.space.split(where(model))
    for name, change in changes.items():
        exactly(moved[name], change.forward @ parts[name])
        about = grams.centered(parts).activations[name]
        gram = change.forward @ about @ change.forward.T
        sizes = gram.diagonal().sqrt()
        assert (gram / torch.outer(sizes, sizes) - torch.eye(4)).abs().max() < 1e-6


def test_a_center_that_does_not_fit_is_refused() -> None:
    space = lrvd.RankSpace(perceptron())
    for wrong in (torch.zeros(3), torch.full((8,), torch.nan)):
        with pytest.raises(ValueError, match=r"expected \(8,\), finite"):
            center_at(space, wrong)
    assert not center_of(space)
    with pytest.raises(ValueError, match=r"up to 1000000.0.* finite in torch.float16"):
        center_at(lrvd.RankSpace(perceptron().half()), torch.full((8,), 1e6))
    dora = lrvd.RankSpace(bert(use_dora=True))
    drawn = FactorLoRA(bert(), num_data=10)
    with pytest.raises(
        TypeError, match="a center needs gates, and FactorLoRA draws weights"
    ):
        center(drawn, None)
    for other in (dora, drawn.space, lrvd.RankSpace(nets.grouped())):
        with pytest.raises(TypeError, match="a center needs a gate for each column"):
            center_at(other, torch.zeros(other.size))
    model, net = GateLoRA(perceptron(), num_data=10), perceptron(r=2)
    with pytest.raises(ValueError, match="other LoRA modules or ranks"):
        center(model, found(net, [rows(4, 5)]))
    grams = found(model.base_net, [rows(4, 5)])
    with pytest.raises(ValueError, match="no means, or are centered already; take"):
        center(model, Gramians(grams.activations, grams.gradients))
    with pytest.raises(ValueError, match="no means, or are centered already; take"):
        grams.centered().centered()
    assert not len(grams.centered().gate_fisher)


def test_a_center_that_overflows_leaves_the_adapter_as_it_was() -> None:
    net = perceptron()
    grams = found(net, [rows(9, 5)])
    center_at(lrvd.RankSpace(net.half()), torch.full((8,), 6e4))
    before = [w.clone() for pair in weights(net) for w in pair]
    with pytest.raises(ValueError, match="finite in torch.float16"):
        balance(net, grams.centered())
    after = [w for pair in weights(net) for w in pair]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
