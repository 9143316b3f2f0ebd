"""After ranks were removed, every driver and optimizer trains what is left."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import nets
import pyro
import pytest
import torch
from nets import tokens
from pairs import rank_guide
from pruned import PAIR, some
from pyro.infer import SVI
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro import priors
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.rank_space.removal import replace_data
from lrvd_pyro.selection.removal import select

close = torch.testing.assert_close
exactly = partial(close, rtol=0, atol=1e-12)


def small_copy(model: Any, guide: Any, fresh: Callable[[], Any]) -> tuple[Any, Any]:
    """The pruned pair, built again at the ranks that it has."""
    space = model.space
    ranks = dict(zip(space.modules, space.ranks))
    alphas = {
        name: layer.scaling["default"] * layer.r["default"]
        for name, layer in zip(space.modules, space.layers)
    }
    pattern = {"rank_pattern": ranks, "alpha_pattern": alphas}
    torch.manual_seed(0)
    net = nets.bert(target_modules=list(ranks), **pattern)
    known = net.state_dict()
    state = model.base_net.state_dict().items()
    net.load_state_dict(
        {k if k in known else k.replace(".base_layer", ""): v for k, v in state}
    )
    small = type(model)(net, num_data=60, **fresh())
    twin = rank_guide(small)
    twin.load_state_dict(guide.state_dict())
    if isinstance(model.prior, nn.Module):
        small.prior.load_state_dict(model.prior.state_dict())
    return small, twin


def trainable(*modules: nn.Module) -> list[Tensor]:
    both = [p for m in modules for p in m.parameters() if p.requires_grad]
    return [p.detach().clone() for p in both]


OPTIONS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "gate": (GateLoRA, dict),
    "ard": (GateLoRA, lambda: {"prior": priors.ARD()}),
    "truncated": (GateLoRA, lambda: {"prior": priors.TruncatedLogUniform()}),
    "horseshoe": (GateLoRA, lambda: {"prior": priors.Horseshoe()}),
    "slab": (GateLoRA, lambda: {"prior": priors.Horseshoe(slab=2.0)}),
    "by-layer": (GateLoRA, lambda: {"prior": priors.Hierarchical(over="layer")}),
    "by-type": (GateLoRA, lambda: {"prior": priors.Hierarchical(over="type")}),
    "spike": (GateLoRA, lambda: {"prior": priors.SpikeSlab()}),
    "factor": (FactorLoRA, dict),
    "factor-both": (FactorLoRA, lambda: {"sides": PAIR}),
}


@pytest.mark.parametrize("driver", ["svi", "torch"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_pruned_model_trains_as_one_built_small(option: str, driver: str) -> None:
    family, fresh = OPTIONS[option]
    torch.manual_seed(0)
    model = family(nets.bert(), num_data=60, **fresh())
    guide = rank_guide(model)
    elbo = lrvd.RankELBO()
    batches = [tokens() for _ in range(4)]
    optim: Any = lrvd.optim.AdamW(lr=1e-2)
    if driver == "torch":
        groups = lrvd.optim.parameter_groups(model, guide, lr=1e-2)
        optim = torch.optim.AdamW(groups, weight_decay=0.0)
    held = run(driver, elbo, model, guide, optim, batches[:2])  # its graph stays alive
    select(model, guide, optim, keep=some(model.space))
    small, twin = small_copy(model, guide, fresh)
    other: Any = lrvd.optim.AdamW(lr=1e-2)
    if driver == "svi":
        other.set_state(copy.deepcopy(optim.get_state()))
    else:
        groups = lrvd.optim.parameter_groups(small, twin, lr=1e-2)
        other = torch.optim.AdamW(groups, weight_decay=0.0)
        other.load_state_dict(copy.deepcopy(optim.state_dict()))
    before = trainable(model, guide)
    for pair, its in (((model, guide), optim), ((small, twin), other)):
        torch.manual_seed(1)
        run(driver, lrvd.RankELBO(), *pair, its, batches[2:])
    assert held is not None
    after = trainable(model, guide)
    assert all((a != b).any() for a, b in zip(after, before, strict=True))
    for a, b in zip(after, trainable(small, twin), strict=True):
        exactly(a, b)


def run(
    driver: str, elbo: Any, model: Any, guide: Any, optim: Any, batches: list[Any]
) -> Any:
    if driver == "svi":
        svi = SVI(model, guide, optim, loss=elbo)
        return [svi.step(**batch) for batch in batches]
    loss: Any = None
    for batch in batches:
        loss = elbo(model, guide)(**batch)
        loss.backward()
        optim.step()
        optim.zero_grad()
    return loss


def test_new_data_fit_a_tensor_whose_last_graph_is_alive() -> None:
    def gradient(shrink: Callable[[Tensor, Tensor], None]) -> Tensor | None:
        p = nn.Parameter(torch.ones(4))
        held = p.square().sum()
        held.backward()
        shrink(p, torch.ones(2))
        p.square().sum().backward()
        return p.grad

    def plainly(p: Tensor, data: Tensor) -> None:
        p.grad, p.data = None, data

    close(gradient(replace_data), torch.full((2,), 2.0))
    with pytest.raises(RuntimeError, match="invalid gradient"):
        gradient(plainly)


# Optimizers


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.AdamW(groups),
        lambda groups: torch.optim.Adam(groups, amsgrad=True),
        lambda groups: torch.optim.SGD(groups, momentum=0.9),
    ],
)
def test_moments_are_sliced_row_by_row_and_steps_kept(make: Any) -> None:
    model = GateLoRA(nets.bert(), num_data=60)
    guide = rank_guide(model)
    optim = make(lrvd.optim.parameter_groups(model, guide))
    run("torch", lrvd.RankELBO(), model, guide, optim, [tokens(), tokens()])
    state = {p: dict(s) for p, s in optim.state.items()}
    keep = some(model.space)
    layer = model.space.layers[1]
    select(model, guide, optim, keep=keep)
    rows = keep[4:8]
    for p, pick in (
        (layer.lora_A["default"].weight, lambda m: m[rows]),
        (layer.lora_B["default"].weight, lambda m: m[:, rows]),
        (guide.log_variance, lambda m: m[keep]),
    ):
        for key, value in state[p].items():
            moment = isinstance(value, Tensor) and value.dim() > 0
            close(optim.state[p][key], pick(value) if moment else value)


def test_parameters_that_leave_are_forgotten_by_optimizer_and_store() -> None:
    model = GateLoRA(nets.bert(), num_data=60)
    guide = rank_guide(model)
    optim = lrvd.optim.AdamW(lr=1e-2)
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    svi.step(**tokens())
    gone = {*model.space.layers[0].lora_A.parameters()}
    gone |= {*model.space.layers[0].lora_B.parameters()}
    names = set(pyro.get_param_store().keys())
    select(model, guide, optim, keep=some(model.space))
    left = names - set(pyro.get_param_store().keys())
    assert len(left) == 2 and all("layer.0.attention.self.query" in n for n in left)
    held = {p for g in optim.torch_optim.param_groups for p in g["params"]}
    assert len(gone) == 2 and not gone & (held | set(optim.torch_optim.state))
    svi.step(**tokens())
    assert not gone & {p for g in optim.torch_optim.param_groups for p in g["params"]}


def test_pyros_own_optimizers_go_on() -> None:
    model = GateLoRA(nets.bert(), num_data=60)
    guide = rank_guide(model)
    optim = pyro.optim.ClippedAdam({"lr": 1e-2})
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    svi.step(**tokens())
    moment = optim.optim_objs[guide.log_variance].state[guide.log_variance]["exp_avg"]
    keep = some(model.space)
    select(model, guide, optim, keep=keep)
    state = optim.optim_objs[guide.log_variance].state[guide.log_variance]
    close(state["exp_avg"], moment[keep])
    before = trainable(model, guide)
    svi.step(**tokens())
    assert all((a != b).any() for a, b in zip(trainable(model, guide), before))
    assert len(optim.optim_objs) == len(before)


@pytest.mark.parametrize("driver", ["svi", "torch"])
def test_a_step_of_an_optimizer_that_was_not_told_is_an_error(driver: str) -> None:
    model = GateLoRA(nets.bert(), num_data=60)
    guide = rank_guide(model)
    optim: Any = lrvd.optim.AdamW()
    if driver == "torch":  # fused: it would step on in silence
        groups = lrvd.optim.parameter_groups(model, guide)
        optim = torch.optim.AdamW(groups, fused=True)
    run(driver, lrvd.RankELBO(), model, guide, optim, [tokens()])
    select(model, guide, keep=some(model.space))
    with pytest.raises(RuntimeError, match="selected without the optimizer"):
        run(driver, lrvd.RankELBO(), model, guide, optim, [tokens()])
