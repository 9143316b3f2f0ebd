"""Histories from a file: refused where they cannot have been."""

import math

import pytest
import runs

import lrvd_pyro as lrvd


@pytest.mark.parametrize("entry", ["steps", "columns", "log_alpha"])
def test_a_history_of_other_sizes_is_refused(entry: str) -> None:
    guide = runs.fresh("svi")["guide"]
    history = lrvd.RankHistory(guide)
    history.record(0)
    history.record(1)
    state = history.state_dict()
    state[entry] = state[entry][:-1]
    with pytest.raises(ValueError, match="steps, .* components and log alpha of"):
        lrvd.RankHistory(guide).load_state_dict(state)


@pytest.mark.parametrize("entry", ["steps", "log_alpha"])
def test_a_history_that_cannot_have_been_is_refused(entry: str) -> None:
    guide = runs.fresh("svi")["guide"]
    history = lrvd.RankHistory(guide)
    history.record(0)
    state = history.state_dict()
    state[entry] = ["x"] if entry == "steps" else state[entry] * math.nan
    with pytest.raises(ValueError, match="expected whole numbers, and NaN of ranks"):
        lrvd.RankHistory(guide).load_state_dict(state)
