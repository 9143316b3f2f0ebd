"""One fused optimizer for all groups, in either driver."""

from typing import Any

import pyro
import pytest
import torch
from nets import bert, tokens
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA

GROUPS = ("adapter", "head", "variational")


def pair() -> tuple[GateLoRA, RankDiagonal]:
    torch.manual_seed(0)
    model = GateLoRA(bert(), num_data=60)
    return model, RankDiagonal(model)


def state(*modules: torch.nn.Module) -> list[Tensor]:
    return [
        p.detach().clone() for m in modules for p in m.parameters() if p.requires_grad
    ]


def test_groups_have_their_own_learning_rates_and_decays() -> None:
    model, guide = pair()
    optim = lrvd.optim.AdamW(
        lr=1e-3, head_lr=1e-4, weight_decay=0.1, schedule=lambda s: 0.5
    )
    SVI(model, guide, optim, loss=lrvd.RankELBO()).step(**tokens())
    groups = {g["name"]: g for g in optim.torch_optim.param_groups}
    assert [len(groups[n]["params"]) for n in GROUPS] == [8, 2, 1]
    assert [groups[n]["lr"] for n in GROUPS] == [5e-4, 5e-5, 2.5e-2]
    assert [groups[n]["weight_decay"] for n in GROUPS] == [0.1, 0.1, 0.0]
    assert groups["variational"]["params"][0] is guide.log_variance


def test_parameter_groups_name_the_same_groups_for_torch() -> None:
    model, guide = pair()
    groups = lrvd.optim.parameter_groups(model, guide, lr=1e-3, head_lr=1e-4)
    assert [(g["name"], len(g["params"]), g["lr"]) for g in groups] == [
        ("adapter", 8, 1e-3),
        ("head", 2, 1e-4),
        ("variational", 1, 5e-2),
    ]


def test_clipping_bounds_the_norm_of_all_gradients() -> None:
    steps = []
    for clip in (None, 1e-3):
        model, guide = pair()
        optim = lrvd.optim.AdamW(clip_norm=clip)
        svi = SVI(model, guide, optim, loss=lrvd.RankELBO(noise="batch"))
        torch.manual_seed(1)
        svi.step(**tokens())
        moments = [s["exp_avg"] for s in optim.torch_optim.state.values()]
        steps.append(torch.cat([m.flatten() for m in moments]).norm() / 0.1)
    assert steps[0] > 1 and steps[1] == pytest.approx(1e-3, rel=1e-3)


def test_a_restored_optimizer_goes_on_as_if_never_stopped() -> None:
    batches = [tokens() for _ in range(4)]

    def run(split: int) -> list[Tensor]:
        model, guide = pair()
        elbo = lrvd.RankELBO(noise="batch")
        svi = SVI(model, guide, lrvd.optim.AdamW(schedule=lambda s: 0.9**s), loss=elbo)
        torch.manual_seed(1)
        for i, batch in enumerate(batches):
            if i == split:
                fresh = lrvd.optim.AdamW(schedule=lambda s: 0.9**s)
                fresh.set_state(svi.optim.get_state())
                svi = SVI(model, guide, fresh, loss=elbo)
            svi.step(**batch)
        return state(model, guide)

    whole, split = run(split=-1), run(split=2)
    assert all(torch.equal(a, b) for a, b in zip(whole, split))


def test_state_of_another_model_is_refused() -> None:
    model, guide = pair()
    optim = lrvd.optim.AdamW()
    SVI(model, guide, optim, loss=lrvd.RankELBO()).step(**tokens())
    wider = GateLoRA(bert(target_modules=["query", "key", "value"]), num_data=60)
    other = lrvd.optim.AdamW()
    other.set_state(optim.get_state())
    svi = SVI(wider, RankDiagonal(wider), other, loss=lrvd.RankELBO())
    with pytest.raises(ValueError, match=r"saved optimizer has parameters of shapes"):
        svi.step(**tokens())


def test_state_of_another_rank_is_refused() -> None:
    model, guide = pair()
    optim = lrvd.optim.AdamW()
    SVI(model, guide, optim, loss=lrvd.RankELBO()).step(**tokens())
    wider = GateLoRA(bert(r=8), num_data=60)
    other = lrvd.optim.AdamW()
    other.set_state(optim.get_state())
    assert other.get_state() == optim.get_state()  # kept until it is used
    svi = SVI(wider, RankDiagonal(wider), other, loss=lrvd.RankELBO())
    with pytest.raises(ValueError, match=r"\[4, 16\].* this one .*\[8, 16\]"):
        svi.step(**tokens())


def test_parameters_stand_in_the_order_of_their_names() -> None:
    model, guide = pair()
    optim = lrvd.optim.AdamW()
    SVI(model, guide, optim, loss=lrvd.RankELBO()).step(**tokens())
    store = pyro.get_param_store()
    for group in optim.torch_optim.param_groups:
        names = [store.param_name(p) for p in group["params"]]
        assert names == sorted(names)


def test_a_guide_whose_parameters_are_unknown_is_refused() -> None:
    model, _ = pair()
    with pytest.raises(
        ValueError, match=r"AutoNormal makes its parameters on its first"
    ):
        lrvd.optim.parameter_groups(model, AutoNormal(model))
    with pytest.raises(TypeError, match="guide is a function without parameters"):
        lrvd.optim.parameter_groups(model, lambda **batch: None)  # type: ignore[arg-type]


def accumulate_with_pyro(
    svi: SVI, optim: Any, batches: list[dict[str, Tensor]]
) -> None:
    """The recipe of lrvd_pyro.optim.AdamW."""
    k = len(batches)
    with pyro.poutine.trace(param_only=True) as seen:
        for batch in batches:
            svi.loss_and_grads(svi.model, svi.guide, **batch)
    params = {site["value"].unconstrained() for site in seen.trace.nodes.values()}
    for p in params:
        p.grad /= k
    optim(params)
    pyro.infer.util.zero_grads(params)


@pytest.mark.parametrize("driver", ["svi", "torch"])
def test_accumulated_gradients_are_those_of_the_whole_batch(driver: str) -> None:
    batch = tokens(6)
    thirds = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    ends = []
    for batches in ([batch], thirds):
        model, guide = pair()
        with torch.no_grad():
            guide.log_variance.fill_(-1000.0)  # at the wall: next to no noise
        guide.bounds = (-60.0, 8.0)
        elbo = lrvd.RankELBO()
        if driver == "svi":
            optim: Any = lrvd.optim.AdamW()
            svi = SVI(model, guide, optim, loss=elbo)
            accumulate_with_pyro(svi, optim, batches)
        else:
            loss = elbo(model, guide)
            groups = lrvd.optim.parameter_groups(model, guide)
            optim = torch.optim.AdamW(groups, weight_decay=0.0)
            for part in batches:
                (loss(**part) / len(batches)).backward()
            optim.step()
        ends.append(state(model))
    for whole, parts in zip(*ends):
        torch.testing.assert_close(whole, parts)
