"""Pruning while training goes on, and the record of the ranks."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import bert, perceptron, tokens
from pairs import rank_guide
from pyro.infer import SVI
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.selection.history import RankHistory
from lrvd_pyro.selection.removal import select
from lrvd_pyro.selection.schedule import RankSchedule

close = torch.testing.assert_close


def pair(**options: Any) -> tuple[GateLoRA, RankDiagonal, Callable[..., RankSchedule]]:
    model = GateLoRA(perceptron(), num_data=60)
    guide = rank_guide(model)
    settings = {"start": 1, "every": 1} | options
    return model, guide, lambda **kw: RankSchedule(model, guide, None, **settings, **kw)


def put(guide: RankDiagonal, *log_alpha: float) -> None:
    with torch.no_grad():
        guide.log_variance.copy_(torch.tensor(log_alpha))


LOW, HIGH = -1.0, 5.0


def test_it_looks_from_start_on_every_so_many_steps() -> None:
    model, guide, make = pair(start=4, every=3)
    schedule, went = make(), []
    for step in range(1, 12):
        put(guide, *[LOW] * (model.space.size - 1), HIGH)
        if schedule.step() is not None:
            went.append(step)
    assert went == [4, 7, 10] and model.space.ranks == (4, 1)


def test_a_component_goes_after_as_many_looks_in_a_row() -> None:
    model, guide, make = pair(checks=3)
    schedule = make()
    looks = [(HIGH, HIGH), (HIGH, LOW), (LOW, HIGH), (HIGH, HIGH)]
    for one, other in looks:  # neither three times in a row
        put(guide, one, other, *[LOW] * 6)
        assert schedule.step() is None
    assert schedule.above.tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    put(guide, LOW, HIGH, *[LOW] * 6)
    assert schedule.step().tolist() == [True, False] + [True] * 6
    assert schedule.above.tolist() == [0] * 7 and model.space.ranks == (3, 4)


def test_a_floor_holds_in_each_module() -> None:
    model, guide, make = pair(min_rank=1)
    put(guide, 5.0, 4.0, 6.0, 7.0, LOW, LOW, 7.0, LOW)
    kept = make().step()
    assert kept.nonzero().flatten().tolist() == [1, 4, 5, 7]


@pytest.mark.parametrize("staircase", [False, True])
def test_it_never_prunes_while_the_kl_warms_up(staircase: bool) -> None:
    model, guide, make = pair(every=5)
    rise = lrvd.linear_warmup(20)
    weight = (lambda step: rise(step // 5 * 5)) if staircase else rise
    elbo = lrvd.RankELBO(kl_weight=weight)
    schedule, went = make(elbo=elbo), []
    for step in range(1, 40):
        elbo.step = step  # as SVI.step would count
        put(guide, *[LOW] * (model.space.size - 1), HIGH)
        if schedule.step() is not None:
            went.append(step)
    assert went[0] == 21 and len(went) == 4
    elbo = lrvd.RankELBO(kl_weight=0.1)  # a number is not a warm-up
    put(guide, *[LOW] * (model.space.size - 1), HIGH)
    late = RankSchedule(model, guide, None, start=1, every=1, elbo=elbo)
    assert late.step() is not None


def test_if_everything_would_go_it_stops_and_nothing_changes() -> None:
    model, guide, make = pair(checks=2)
    schedule = make()
    put(guide, *[HIGH] * 8)
    assert schedule.step() is None
    with pytest.raises(ValueError, match="all 8 rank components would go.* at step 2"):
        schedule.step()
    assert model.space.ranks == (4, 4) and schedule.above.tolist() == [1] * 8


@pytest.mark.parametrize("family", [GateLoRA, FactorLoRA])
def test_training_goes_on_under_a_schedule(family: Any) -> None:
    model = family(bert(), num_data=60)
    guide = rank_guide(model)
    optim, elbo = lrvd.optim.AdamW(lr=1e-2), lrvd.RankELBO()
    svi = SVI(model, guide, optim, loss=elbo)
    schedule = RankSchedule(model, guide, optim, start=2, every=2, elbo=elbo)
    history = RankHistory(guide)
    for step in range(8):
        svi.step(**tokens())
        history.record(step)
        with torch.no_grad():  # as if one had become noise
            guide.log_variance[0] += 20
        schedule.step()
    assert model.space.size == 12 and history.log_alpha[-1].isnan().sum() == 3


def test_a_restored_schedule_goes_on_counting() -> None:
    model, guide, make = pair(checks=2, every=2)
    put(guide, HIGH, *[LOW] * 7)
    schedule = make()
    schedule.step()
    schedule.step()
    state = json.loads(json.dumps(schedule.state_dict()))
    fresh = make()
    fresh.load_state_dict(state)
    assert fresh.step() is not None  # its third step, the second look
    with pytest.raises(
        ValueError, match="counts 8 rank components and the model has 7"
    ):
        fresh.load_state_dict(state)


def test_counts_out_of_range_are_refused() -> None:
    _, _, make = pair()
    with pytest.raises(ValueError, match="checks=0; expected"):
        make(checks=0)


# History


def recorded() -> tuple[GateLoRA, RankHistory, list[Tensor]]:
    """Three records, with components removed after the first and the second."""
    model, guide, _ = pair()
    history, truth = RankHistory(guide), []
    masks = [[1, 0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]  # then module 0 is gone
    for step in range(3):
        put(guide, *torch.randn(model.space.size).tolist())
        history.record(10 * step)
        truth.append(guide.log_alpha)
        if masks:
            select(model, guide, keep=torch.tensor(masks.pop(0), dtype=torch.bool))
    return model, history, truth


def test_history_keeps_the_numbers_of_the_full_model() -> None:
    model, history, truth = recorded()
    assert model.space.modules == ("out",)
    present = [[*range(8)], [0, 2, 3, 4, 5, 6], [4, 5, 6]]
    for row, columns, expected in zip(history.log_alpha, present, truth, strict=True):
        close(row[columns], expected.float())
        assert int(row.isnan().sum()) == 8 - len(columns)
    ranks = torch.stack([torch.sigmoid(-x).sum() for x in truth]).float()
    close(history.effective_rank, ranks)
    modules = history.effective_ranks
    close(modules["hidden"] + modules["out"], ranks)
    assert modules["hidden"][-1] == 0


def test_history_as_a_table_names_step_and_component() -> None:
    _, history, _ = recorded()
    frame = history.frame()
    assert list(frame.columns) == [
        "step",
        "module",
        "type",
        "layer",
        "rank",
        "log_alpha",
    ]
    assert len(frame) == 24
    row = frame[(frame.step == 20) & (frame.module == "out") & (frame["rank"] == 2)]
    assert row.log_alpha.item() == pytest.approx(float(history.log_alpha[2, 6]))


def test_a_saved_history_goes_on() -> None:
    model, history, _ = recorded()
    guide: Any = history.guide
    fresh = RankHistory(guide)
    fresh.load_state_dict(history.state_dict())
    fresh.record(30)
    assert fresh.steps == [0, 10, 20, 30]
    close(fresh.log_alpha[:3], history.log_alpha, equal_nan=True)
    assert fresh.log_alpha[3].isnan().tolist() == history.log_alpha[2].isnan().tolist()
    other = RankHistory(RankDiagonal(GateLoRA(bert(), num_data=60)))
    with pytest.raises(ValueError, match="belongs to another model"):
        other.load_state_dict(history.state_dict())
    assert RankHistory(guide).log_alpha.shape == (0, model.space.size)
