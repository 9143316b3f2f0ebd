"""The examples by which docstrings teach a prior, a model and a guide of one's own."""

import inspect
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from nets import bert, tokens
from pyro import distributions as dist
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import nn

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal, RankGuide
from lrvd_pyro.likelihoods import Categorical
from lrvd_pyro.models import Factors, GateLoRA, RankModel
from lrvd_pyro.optim import AdamW
from lrvd_pyro.priors import ARD
from lrvd_pyro.rank_space import RankSpace, slice_tensors


def names() -> dict[str, Any]:
    """What a reader has at hand: imports, a network, a data set of 60, a batch."""
    known: dict[str, Any] = {
        thing.__name__: thing
        for thing in (
            *(AdamW, ARD, AutoNormal, Categorical, Factors, GateLoRA, RankDiagonal),
            *(RankGuide, RankModel, RankSpace, SVI, init_to_value, slice_tensors),
            *(lrvd.RankELBO,),
        )
    }
    known |= {"pyro": pyro, "dist": dist, "nn": nn, "torch": torch}
    return known | {"net": bert(), "train": range(60), "batch": tokens()}


def example(documented: object) -> str:
    """The last ``Example...::`` block of a docstring."""
    lines = (inspect.getdoc(documented) or "").splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("Example"))
    assert lines[start].endswith("::")
    after = lines[start + 1 :]
    ends = [i for i, line in enumerate(after) if line and not line.startswith(" ")]
    block = after[: ends[0]] if ends else after
    return inspect.cleandoc("\n".join(block))


def run(documented: object) -> tuple[Any, Any]:
    """The model and the guide of an example, trained for a few steps."""
    namespace = names()
    exec(example(documented), namespace)
    model, guide, batch = (namespace[name] for name in ("model", "guide", "batch"))
    svi = SVI(model, guide, AdamW(), loss=lrvd.RankELBO())
    losses = [svi.step(**batch) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])
    return model, guide


def test_the_prior_of_the_package_trains_with_all_its_levels() -> None:
    model, guide = run(lrvd.priors)
    assert list(model.latent_sites()) == ["scale", "gate"]
    assert guide.learn_mean and model.weight_prior is not None


def test_the_model_trains_predicts_saves_and_exports(tmp_path: Path) -> None:
    model, guide = run(RankModel)
    (site,) = model.latent_sites()
    batch = tokens(labels=False)
    lrvd.save(tmp_path / "run", model, guide)
    lrvd.export_peft(tmp_path / "mean", model, guide, probe=batch)
    draws = lrvd.predict(model, guide, [batch], 3, return_samples=True).samples
    assert site == "B" and not torch.equal(draws[0], draws[1])


def test_the_guide_trains_and_is_pruned() -> None:
    model, guide = run(RankGuide)
    with torch.no_grad():
        guide.log_b[:5] = 3.0
    keep = lrvd.prune(model, guide)
    assert 0 < int(keep.sum()) == len(guide.log_b) == model.space.size < 16


@pytest.mark.parametrize("documented", [lrvd.priors, RankModel, RankGuide])
def test_an_example_with_a_fault_is_found_out(documented: Any) -> None:
    """The twin: the runs above would fail where an example breaks its contract."""
    code = example(documented).replace("to_event(1)", "to_event(0)")
    code = code.replace("self.space.ones()", "self.space.ones(3)")
    assert code != example(documented)
    with pytest.raises((ValueError, RuntimeError)):
        namespace = names()
        exec(code, namespace)
        model, guide, batch = (namespace[name] for name in ("model", "guide", "batch"))
        lrvd.RankELBO().loss(model, guide, **batch)
