"""Re-balancing in training."""

import json
from typing import Any

import pytest
import torch
from nets import bert, perceptron, tokens
from pairs import rank_guide
from pyro.infer import SVI

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import BalanceSchedule, balance, gramians, hankel_values
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA


def quiet(lr: float = 0.0, **options: Any) -> tuple[Any, ...]:
    """A pair of hardly any noise, its SVI and a schedule."""
    net = bert()
    model = GateLoRA(net, num_data=48)
    guide = rank_guide(model, init_log_alpha=-10.0)
    optim = lrvd.optim.AdamW(lr=lr, variational_lr=lr)
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    schedule = BalanceSchedule(model, guide, optim, **options)
    return model, guide, svi, schedule


def test_training_gathers_what_the_one_pass_gathers() -> None:
    """The guide's noise is 0.7%, the step length 0."""
    model, guide, svi, schedule = quiet(every=4, gather_every=1)
    model.net.eval()
    batches = [tokens(16) for _ in range(3)]
    one_pass = gramians(model, batches, labels="observed")
    for batch in batches:
        svi.step(**batch)
        schedule.step()
    for name, t in hankel_values(schedule.gramians()).items():
        alive = t > 1e-2 * t[0]
        ours = hankel_values(one_pass)[name]
        torch.testing.assert_close(t[alive], ours[alive], rtol=0.05, atol=0)
    twin = bert()
    twin.load_state_dict(model.net.state_dict())
    balance(twin, one_pass)
    svi.step(**batches[0])
    schedule.step()  # balances, the first batch counted twice
    grams = gramians(model, batches, labels="observed")
    for gram in grams.gradients.values():
        rest = gram - gram.diagonal().diag()
        assert rest.abs().max() < 0.5 * gram.diagonal().max()


def test_it_balances_every_k_steps_and_leaves_the_function() -> None:
    model, guide, svi, schedule = quiet(every=6, gather_every=2)
    model.net.eval()
    batch = tokens(16)
    before = model.net(**batch).logits.detach()
    moved = []
    for _ in range(12):
        svi.step(**batch)
        moved.append(schedule.step())
    assert [step + 1 for step, change in enumerate(moved) if change] == [6, 12]
    torch.testing.assert_close(model.net(**batch).logits.detach(), before)
    for forward, backward in moved[5].values():
        assert (forward - torch.eye(4)).abs().max() > 0.1
        torch.testing.assert_close(forward @ backward, torch.eye(4))
    for forward, _ in moved[11].values():  # balanced already
        assert (forward.abs() - torch.eye(4)).abs().max() < 0.2


@pytest.mark.parametrize("driver", ["svi", "torch"])
def test_training_goes_on_through_balancing(driver: str) -> None:
    model = GateLoRA(bert(), num_data=16)
    guide = rank_guide(model)
    elbo, batch = lrvd.RankELBO(), tokens(16)
    optim: Any = lrvd.optim.AdamW(lr=1e-2)
    svi = SVI(model, guide, optim, loss=elbo)
    if driver == "torch":
        optim = torch.optim.AdamW(lrvd.optim.parameter_groups(model, guide, lr=1e-2))
        loss = elbo(model, guide)

    def step() -> float:
        if driver == "svi":
            return float(svi.step(**batch))
        value = loss(**batch)
        optim.zero_grad()
        value.backward()
        optim.step()
        return float(value.detach())

    schedule = BalanceSchedule(model, guide, optim, every=10, gather_every=2)
    losses = []
    for _ in range(60):
        losses.append(step())
        schedule.step()
    assert sum(losses[-10:]) < sum(losses[:10]) - 50
    grams = gramians(model, [batch], labels="observed")
    for gram in grams.activations.values():
        rest = gram - gram.diagonal().diag()
        assert rest.abs().max() < gram.diagonal().max()


def test_the_component_of_largest_t_gets_the_least_of_the_noise_there_is() -> None:
    model, guide, svi, schedule = quiet(lr=1e-9, every=2, gather_every=1)
    with torch.no_grad():
        guide.log_variance.copy_(torch.randn(model.space.size) - 2)
    batch = tokens(16)
    svi.step(**batch)
    old = guide.log_variance.detach().clone()
    (state,) = (
        s for p, s in svi.optim.torch_optim.state.items() if p.shape == old.shape
    )
    momentum = state["exp_avg"].clone()
    schedule.step()
    svi.step(**batch)
    assert schedule.step()
    new = guide.log_variance.detach()
    for module, before in model.space.split(old).items():
        after = model.space.split(new)[module]
        torch.testing.assert_close(after, before.sort().values, rtol=0, atol=1e-6)
        pulls = [model.space.split(m)[module] for m in (momentum, state["exp_avg"])]
        signs = torch.sign(pulls[0][before.argsort()]) == torch.sign(pulls[1])
        assert signs.all()


def test_ranks_pruned_between_balancings_are_forgotten() -> None:
    model, guide, svi, schedule = quiet(every=4, gather_every=1)
    batch = tokens(16)
    for _ in range(2):
        svi.step(**batch)
        schedule.step()
    keep = torch.ones(model.space.size, dtype=torch.bool)
    keep[[0, 4, 5, 6, 7]] = False  # the second module goes
    lrvd.selection.select(model, guide, svi.optim, keep=keep)
    moved = []
    for _ in range(2):
        svi.step(**batch)
        moved.append(schedule.step())
    assert set(moved[1]) == set(model.space.modules)
    assert [len(change.forward) for change in moved[1].values()] == [3, 4, 4]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_network_gathers_the_same() -> None:
    model, guide, svi, schedule = quiet(every=9, gather_every=1)
    batch = tokens(16)
    svi.step(**batch)
    eager = schedule.gramians()
    schedule.close()
    model.net.compile(backend="eager")
    svi.step(**batch)  # compiled without taps
    schedule = BalanceSchedule(model, guide, svi.optim, every=9, gather_every=1)
    svi.step(**batch)
    for name, gram in schedule.gramians().gradients.items():
        torch.testing.assert_close(gram, eager.gradients[name], rtol=0.1, atol=1e-3)


def test_evaluating_the_loss_is_no_gathering() -> None:
    model, guide, svi, schedule = quiet(every=9, gather_every=1)
    batch = tokens(16)
    svi.step(**batch)
    before = schedule.gramians()
    svi.evaluate_loss(**batch)
    for name, gram in schedule.gramians().gradients.items():
        torch.testing.assert_close(gram, before.gradients[name])


def test_ranks_pruned_on_the_very_step_of_balancing_are_forgotten() -> None:
    model, guide, svi, schedule = quiet(every=4, gather_every=1)
    batch = tokens(16)
    for step in range(8):
        svi.step(**batch)
        if step == 3:
            keep = torch.ones(model.space.size, dtype=torch.bool)
            keep[[4, 5, 6, 7]] = False  # the second module goes
            lrvd.selection.select(model, guide, svi.optim, keep=keep)
        moved = schedule.step()
        assert bool(moved) == (step == 7)
    assert set(moved or {}) == set(model.space.modules)


def test_micro_batches_count_once_each() -> None:
    model, guide, svi, schedule = quiet(every=9, gather_every=1)
    batches = [tokens(8) for _ in range(3)]
    loss = lrvd.RankELBO()(model, guide)
    counts = []
    for batch in batches:
        loss(**batch).backward()
        counts.append(schedule._sums.tokens[0])
    assert counts == [counts[0], 2 * counts[0], 3 * counts[0]]


def test_a_priors_own_variances_are_dealt_with_the_noise() -> None:
    net, batch = bert(), tokens(16)
    model = GateLoRA(net, num_data=16, prior=lrvd.priors.ARD())
    guide = rank_guide(model)
    optim = lrvd.optim.AdamW(lr=1e-9, variational_lr=1e-9)
    elbo = lrvd.RankELBO()
    svi = SVI(model, guide, optim, loss=elbo)
    schedule = BalanceSchedule(model, guide, optim, every=2, gather_every=1)
    with torch.no_grad():
        guide.log_variance.copy_(torch.randn(model.space.size) - 2)
        model.prior.log_gamma.copy_(guide.log_variance.exp().log1p())
    kl = []
    for _ in range(3):
        svi.step(**batch)
        kl.append(float(elbo.terms["kl"]["total"]))
        schedule.step()
    assert kl[2] == pytest.approx(kl[1], rel=1e-6)


def test_a_saved_schedule_goes_on_where_it_was() -> None:
    model, guide, svi, schedule = quiet(every=9, gather_every=2)
    batch = tokens(16)
    for _ in range(3):
        svi.step(**batch)
        schedule.step()
    state = json.loads(json.dumps(schedule.state_dict()))
    schedule.close()
    again = BalanceSchedule(model, guide, svi.optim, every=9, gather_every=2)
    again.load_state_dict(state)
    assert again.state_dict() == schedule.state_dict() and again.steps == 3
    svi.step(**batch)  # the fourth, to gather on
    assert again.state_dict()["examples"] == 32
    other = GateLoRA(bert(r=2), num_data=4)
    stranger = BalanceSchedule(other, RankDiagonal(other), svi.optim)
    with pytest.raises(ValueError, match="knows modules of ranks"):
        stranger.load_state_dict(state)


def test_closing_leaves_no_hook() -> None:
    model, guide, svi, schedule = quiet(every=4, gather_every=1)
    schedule.close()
    lora_B = model.space.layers[0].lora_B["default"]
    assert len(lora_B._forward_pre_hooks) == 1  # the gate's own
    assert not model._forward_pre_hooks


def test_what_cannot_be_balanced_in_training_is_refused() -> None:
    factor = FactorLoRA(perceptron(), num_data=3)
    with pytest.raises(TypeError, match="the gauge needs gates, and FactorLoRA draws"):
        BalanceSchedule(factor, rank_guide(factor), None)  # type: ignore[arg-type]
    model = GateLoRA(perceptron(), num_data=3)
    with pytest.raises(TypeError, match="learn_mean=True"):
        BalanceSchedule(model, rank_guide(model, learn_mean=True), None)
    with pytest.raises(TypeError, match="optimizer is a NoneType"):
        BalanceSchedule(model, rank_guide(model), None)
    with pytest.raises(ValueError, match="every=2, gather_every=4"):
        BalanceSchedule(model, rank_guide(model), None, every=2)
