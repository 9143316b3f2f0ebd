"""Copies of a pair, made at once or apart, give what the copied parameters say."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from copied import (
    BATCH,
    PAIRS,
    READERS,
    automatic,
    factors,
    moved,
    objective,
    predicted,
    write,
)
from pyro.infer import SVI
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lrvd_pyro as lrvd
from lrvd_pyro.inference import give_own_name

close = torch.testing.assert_close


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("pair", PAIRS)
def test_averages_copied_apart_read_as_the_averages_written_into_the_pair(
    pair: Callable[[], tuple[Any, Any]], reader: Callable[[Any, Any], Tensor]
) -> None:
    model, guide = pair()
    averages = moved(model, guide)
    got = reader(*averages)
    live = reader(model, guide)
    for mean, its in zip(averages, (model, guide)):
        write(mean, its)
    close(got, reader(model, guide), rtol=1e-6, atol=1e-6)
    assert (got - live).abs().max() > 1e-3, "the averages are far from the last step"


def test_the_copied_guide_by_itself_reads_what_nobody_averages() -> None:
    model, guide = factors()
    average, copied = moved(model, guide)
    fresh = average.space.flatten(*average.space.sides)
    assert (copied.mean() - fresh).abs().max() > 1e-2, "the twin reads old weights"
    close(copied.paired_with(average).mean(), fresh, rtol=0, atol=0)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_read_leaves_each_guide_with_the_model_that_it_has(pair: Any) -> None:
    model, guide = pair()
    twin = copy.deepcopy(model)
    before = dict(vars(guide))
    predicted(twin, guide)
    assert vars(guide) == before and guide.space is model.space
    assert guide.paired_with(model) is guide
    view = guide.paired_with(twin)
    assert view.space is twin.space
    assert all(p is q for p, q in zip(view.parameters(), guide.parameters()))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_copied_at_once_is_a_pair(pair: Any, turned: bool) -> None:
    model, guide = pair()
    expected = predicted(model, guide)
    if turned:
        its_guide, its_model = copy.deepcopy((guide, model))
    else:
        its_model, its_guide = copy.deepcopy((model, guide))
    close(predicted(its_model, its_guide), expected, rtol=0, atol=0)
    assert its_guide.paired_with(its_model) is its_guide
    module = AveragedModel(nn.ModuleList([model, guide])).module
    close(predicted(*module), expected, rtol=0, atol=0)


@pytest.mark.parametrize("reader", [*READERS[:3], objective])
def test_averages_of_an_autoguide_are_read_under_a_name_of_their_own(
    reader: Callable[[Any, Any], Tensor],
) -> None:
    model, guide = automatic()
    mean, its_mean = moved(model, guide)
    # In Pyro's store the name stands for the parameters of the last step.
    with pytest.raises(RuntimeError, match=r"read and train.*give_own_name\(guide\)"):
        reader(mean, its_mean)
    got = reader(mean, give_own_name(its_mean))
    live = reader(model, guide)
    write(mean, model)
    write(its_mean, guide)
    close(got, reader(model, guide), rtol=1e-6, atol=1e-6)
    assert (got - live).abs().max() > 1e-3


def test_a_pair_pickled_apart_is_a_pair() -> None:
    model, guide = factors()
    twins = [pickle.loads(pickle.dumps(each)) for each in (model, guide)]
    close(predicted(*twins), predicted(model, guide), rtol=0, atol=0)


def test_a_copied_model_trains_with_the_guide_of_its_original() -> None:
    model, guide = factors()
    twin = copy.deepcopy(model)
    before = model.space.flatten("lora_A").detach().clone()
    svi = SVI(twin, guide, lrvd.optim.AdamW(lr=0.05), lrvd.RankELBO(kl_weight=0.1))
    noise = guide.log_variance.detach().clone()
    for _ in range(2):
        svi.step(**BATCH)
    close(model.space.flatten("lora_A").detach(), before, rtol=0, atol=0)
    assert (twin.space.flatten("lora_A") - before).abs().max() > 1e-2
    assert (guide.log_variance - noise).abs().max() > 1e-2
