"""A rank-wise guide of one's own: it joins by its type, and by that alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import bert, tokens
from own_guide import Uniform
from pyro.infer import SVI
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal, RankGuide, TiedDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.selection import removal_cost


def pair() -> tuple[GateLoRA, Uniform]:
    model = GateLoRA(bert(), prior=lrvd.priors.Normal(), num_data=60)
    guide = Uniform(model)
    with torch.no_grad():
        guide.log_width[:5] = 3.0
    return model, guide


@pytest.mark.filterwarnings("ignore:no closed form")
def test_it_trains_is_pruned_and_trains_on() -> None:
    model, guide = pair()
    svi = SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    history = lrvd.RankHistory(guide)
    for step in range(2):
        svi.step(**tokens())
        history.record(step)
    worth = guide.log_alpha
    keep = lrvd.prune(model, guide, svi.optim)
    assert torch.equal(keep, worth <= 3) and 0 < int(keep.sum()) < 16
    assert len(guide.log_width) == model.space.size == int(keep.sum())
    svi.step(**tokens())
    history.record(2)
    assert int(history.log_alpha[2].isnan().sum()) == 16 - model.space.size
    assert float(guide.effective_rank) == pytest.approx(
        sum(guide.effective_ranks.values())
    )


def test_it_is_saved_exported_and_loaded(tmp_path: Path) -> None:
    model, guide = pair()
    lrvd.prune(model, guide)
    batch = tokens(labels=False)
    lrvd.save(tmp_path / "run", model, guide)
    lrvd.export_peft(tmp_path / "plain", model, guide, probe=batch)
    base = copy.deepcopy(model.base_net).unload().requires_grad_(True)
    loaded, its_guide = lrvd.load(tmp_path / "run", base, guide=Uniform)
    assert isinstance(its_guide, Uniform)
    ours, theirs = (
        lrvd.predict(*each, [batch], 3).probs
        for each in ((model, guide), (loaded, its_guide))
    )
    assert torch.equal(ours, theirs)


def test_what_has_no_closed_form_is_named() -> None:
    model, guide = pair()
    with pytest.raises(TypeError, match="is a Uniform, whose noise has no closed form"):
        removal_cost(model, guide)
    with pytest.raises(TypeError, match="guide is a Uniform .*RankDiagonal"):
        lrvd.gauge.BalanceSchedule(model, guide, lrvd.optim.AdamW())  # type: ignore[arg-type]


def test_a_guide_that_only_looks_like_one_is_refused() -> None:
    model, guide = pair()

    class Alike:
        """It has every method, and says nowhere what it is."""

        def __getattr__(self, name: str) -> Any:
            return getattr(guide, name)

    alike: Any = Alike()
    with pytest.raises(TypeError, match="guide is a Alike; .*guides.RankGuide"):
        lrvd.prune(model, alike)


def test_a_guide_that_lacks_a_method_cannot_be_made() -> None:
    class Half(RankGuide):
        def mean(self) -> Tensor:
            return torch.ones(1)

    with pytest.raises(TypeError, match="class Half .*forward, log_alpha"):
        Half(None)  # type: ignore[abstract, arg-type]


def test_no_guide_is_made_as_another_and_each_has_what_it_says() -> None:
    gates = RankDiagonal(GateLoRA(bert(), num_data=60))
    weights = TiedDiagonal(FactorLoRA(bert(), num_data=60))
    assert type(gates) is RankDiagonal and type(weights) is TiedDiagonal
    assert not isinstance(weights, RankDiagonal)
    for guide in (gates, weights):
        for name in (n for n in dir(type(guide)) if not n.startswith("_")):
            if isinstance(getattr(type(guide), name), property):
                getattr(guide, name)  # none raises an AttributeError
