"""Gradients are finite, or no step is taken and nothing is lost."""

import gc
import math
import pickle
import re
import weakref
from typing import Any

import pyro
import pytest
import torch
from nets import CLASSES, Perceptron, bert, lora, tokens
from pairs import rank_guide, state
from pyro.infer import SVI
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro.inference.gradients import data_scale, largest_square
from lrvd_pyro.models import FactorLoRA, GateLoRA


class Rooted(Perceptron):
    """Its output is finite, and its gradient is not where ``x`` is positive."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        root = (h - h.detach() + (x[:, :1] < 0)).abs().sqrt()  # of 0 or 1
        logits: Tensor = self.out(h.tanh() + root)
        return logits


def rooted_batch(sign: float) -> dict[str, Tensor]:
    return {"x": sign * torch.rand(6, 5), "labels": torch.randint(0, CLASSES, (6,))}


def rooted(family: Any = GateLoRA) -> Any:
    return family(lora(Rooted(), target_modules=["hidden", "out"]), num_data=60)


def optimizer(kind: str) -> Any:
    if kind == "pyro":
        return pyro.optim.Adam({"lr": 1e-3})
    return lrvd.optim.AdamW(clip_norm=1.0 if kind == "clipped" else None)


@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("family", [GateLoRA, FactorLoRA])
@pytest.mark.parametrize("kind", ["plain", "clipped", "pyro"])
def test_an_infinite_gradient_under_a_finite_loss_moves_nothing(
    kind: str, family: Any, particles: int
) -> None:
    model = rooted(family)
    elbo = lrvd.RankELBO(num_particles=particles)
    svi = SVI(model, rank_guide(model), optimizer(kind), loss=elbo)
    svi.step(**rooted_batch(-1.0))
    before = state(svi)
    message = (
        r"the loss is finite, but not the squared gradients of .*hidden.lora_A.* at "
        r"step 1. The parameters are as they were before this step, and so are the mom"
    )
    with pytest.raises(ValueError, match=message):
        svi.step(**rooted_batch(1.0))
    after = state(svi)
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    # The run goes on, and the refused batch has left no gradient.
    svi.step(**rooted_batch(-1.0))
    assert all(tensor.isfinite().all() for tensor in state(svi))
    assert not all(map(torch.equal, before, state(svi)))


def test_a_gradient_whose_square_is_infinite_would_cost_the_moments() -> None:
    model = GateLoRA(lora(Perceptron().float(), target_modules=["out"]), num_data=60)
    guide = rank_guide(model).float()
    svi = SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    batch = {"x": torch.randn(6, 5).float(), "labels": torch.zeros(6).long()}
    svi.step(**batch)
    before = state(svi)
    with pytest.raises(ValueError, match="not the squared gradients of .*lora_B"):
        huge: Any = lambda grad: torch.full_like(grad, 1e30)  # noqa: E731
        model.space.weights("lora_B")[0].register_hook(huge)
        svi.step(**batch)
    assert all(map(torch.equal, before, state(svi)))


def test_an_infinite_loss_or_gradient_keeps_what_micro_batches_have_added() -> None:
    model = rooted()
    guide = rank_guide(model)
    svi = SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO(noise="batch"))
    svi.loss_and_grads(model, guide, **rooted_batch(-1.0))
    weight = model.space.weights("lora_A")[0]
    added = weight.grad.clone()
    nan = rooted_batch(-1.0) | {"x": torch.full((6, 5), math.nan)}
    for bad, match in ((rooted_batch(1.0), "gradients"), (nan, "log_likelihood is")):
        with pytest.raises(ValueError, match=match):
            svi.loss_and_grads(model, guide, **bad)
        assert torch.equal(weight.grad, added)
    torch.manual_seed(0)
    svi.loss_and_grads(model, guide, **rooted_batch(-1.0))
    total = weight.grad.clone()
    weight.grad = None
    torch.manual_seed(0)
    svi.loss_and_grads(model, guide, **rooted_batch(-1.0))
    torch.testing.assert_close(total, added + weight.grad)


def test_an_interrupted_backward_pass_keeps_the_gradients_of_earlier_ones() -> None:
    model = rooted()
    guide = rank_guide(model)
    svi = SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    svi.loss_and_grads(model, guide, **rooted_batch(-1.0))
    weight = model.space.weights("lora_A")[0]
    added = weight.grad.clone()

    def interrupt(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    handle = weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        svi.loss_and_grads(model, guide, **rooted_batch(-1.0))
    handle.remove()
    assert torch.equal(weight.grad, added)


def test_parameters_that_are_lost_already_are_not_called_kept_in_good_order() -> None:
    model = GateLoRA(bert(), num_data=60)
    svi = SVI(model, rank_guide(model), lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    with torch.no_grad():
        model.space.weights("lora_A")[0][0] = math.nan
    message = (
        r"These were not finite before it: \S*query.lora_A\S*; go on from the last"
    )
    with pytest.raises(ValueError, match=message):
        svi.step(**tokens())


def test_a_sum_that_overflows_is_refused_although_no_term_does() -> None:
    def heavy(step: int) -> float:
        return 1e308

    model = GateLoRA(bert(), num_data=60)
    elbo = lrvd.RankELBO(kl_weight=heavy)
    svi = SVI(model, rank_guide(model), lrvd.optim.AdamW(), loss=elbo)
    with pytest.raises(ValueError, match="the loss is -?inf|not the squared gradients"):
        svi.step(**tokens())


def trained_by_torch(model: Any, elbo: Any) -> tuple[Any, Any]:
    groups = lrvd.optim.parameter_groups(model, guide := rank_guide(model))
    optim = torch.optim.AdamW(groups, weight_decay=0.0)
    return elbo(model, guide), optim


@pytest.mark.parametrize("local", [False, True])
def test_check_finds_an_infinite_gradient_before_a_torch_step(local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        model, elbo = rooted(), lrvd.RankELBO()
        loss, optim = trained_by_torch(model, elbo)
        loss(**rooted_batch(-1.0)).backward()
        elbo.check()
        loss(**rooted_batch(1.0)).backward()
        message = (
            r"gradients of .*lora_A.* at step 1. Take no step on these gradients: "
            r"optim.zero_grad\(\)"
        )
        with pytest.raises(ValueError, match=message):
            elbo.check()
        optim.zero_grad()
        elbo.check()


def test_the_last_loss_keeps_no_network_in_memory() -> None:
    model, elbo = rooted(), lrvd.RankELBO()
    loss, optim = trained_by_torch(model, elbo)
    loss(**rooted_batch(-1.0)).backward()
    weight = weakref.ref(model.space.weights("lora_A")[0])
    pickle.loads(pickle.dumps(elbo)).check()
    pyro.clear_param_store()
    del model, loss, optim
    gc.collect()
    assert weight() is None
    elbo.check()


def test_gradients_in_full_precision_are_those_of_the_loss_to_the_last_bit() -> None:
    model = GateLoRA(bert(), num_data=60)
    guide, batch = rank_guide(model), tokens()
    grads = []
    for by_torch in (False, True):
        elbo = lrvd.RankELBO()
        torch.manual_seed(0)
        if by_torch:
            elbo.differentiable_loss(model, guide, **batch).backward()
        else:
            elbo.loss_and_grads(model, guide, **batch)
        trained = [p for p in (*model.parameters(), guide.log_variance)]
        grads.append([p.grad.clone() for p in trained if p.requires_grad])
        for p in trained:
            p.grad = None
    assert all(map(torch.equal, *grads))


def test_the_largest_square_is_that_of_any_precision() -> None:
    params = [nn.Parameter(torch.zeros(2, dtype=t)) for t in (torch.half, torch.double)]
    empty = nn.Parameter(torch.zeros(0, 3))
    assert largest_square([*params, empty]) == 0
    empty.grad = torch.zeros(0, 3)
    params[0].grad = torch.tensor([-1000.0, 1.0]).half()
    assert largest_square([*params, empty]) == 1e6
    params[1].grad = torch.tensor([1.0, math.nan]).double()
    assert largest_square(params).isnan()


def test_the_data_scale_is_a_power_of_two_next_to_the_data_plates() -> None:
    model = GateLoRA(bert(), num_data=60)
    run = pyro.poutine.trace(model).get_trace(**tokens(6))
    assert data_scale(run) == 8.0
    unlabeled = pyro.poutine.trace(model).get_trace(**tokens(6, labels=False))
    assert data_scale(unlabeled) == 1.0
    for scale, expected in ((1e-3, 1.0), (torch.tensor(4.0), 1.0)):
        scaled = pyro.poutine.scale(model, scale=scale)
        assert data_scale(pyro.poutine.trace(scaled).get_trace(**tokens(6))) == expected


def test_the_message_lists_three_names_and_counts_the_rest() -> None:
    model = GateLoRA(bert(), num_data=60)
    svi = SVI(model, rank_guide(model), lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    with torch.no_grad():
        for weight in model.space.weights("lora_A"):
            weight.fill_(math.nan)
    with pytest.raises(ValueError) as error:
        svi.step(**tokens())
    lost = re.search(r"before it: (.*); go on", str(error.value))
    assert lost is not None and lost[1].endswith(" and 1 more")
    assert lost[1].count("lora_A") == 3


def test_a_refused_step_does_not_count() -> None:
    model = rooted()
    elbo = lrvd.RankELBO()
    svi = SVI(model, rank_guide(model), lrvd.optim.AdamW(), loss=elbo)
    svi.step(**rooted_batch(-1.0))
    with pytest.raises(ValueError, match="the loss is finite, but not"):
        svi.step(**rooted_batch(1.0))
    assert elbo.step == 1  # else a warm-up would go on


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_warm_up_that_gives_nonsense_is_refused(weight: float) -> None:
    model = rooted()
    elbo = lrvd.RankELBO(kl_weight=lambda step: weight)
    svi = SVI(model, rank_guide(model), lrvd.optim.AdamW(), loss=elbo)
    with pytest.raises(
        ValueError, match=r"kl_weight\(0\)=.*; expected a finite number"
    ):
        svi.step(**rooted_batch(-1.0))
