"""A guide of another model is refused by whatever takes both."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pyro
import pytest
import torch
from copied import (
    BATCH,
    INPUTS,
    PAIRS,
    READERS,
    automatic,
    constants,
    drawn_logits,
    factors,
    gates,
    mean_logits,
    predicted,
)
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI
from torch.optim.swa_utils import AveragedModel

import lrvd_pyro as lrvd
from lrvd_pyro import selection
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.priors import Hierarchical


def export(model: Any, guide: Any) -> None:
    lrvd.export_peft("folder", model, guide)


def linearized(model: Any, guide: Any) -> None:
    lrvd.predict(model, guide, [INPUTS], method="linearized")


def step(model: Any, guide: Any) -> None:
    SVI(model, guide, lrvd.optim.AdamW(), lrvd.RankELBO()).step(**BATCH)


def torch_step(model: Any, guide: Any) -> None:
    lrvd.RankELBO()(model, guide)(**BATCH).backward()


def store(model: Any, guide: Any) -> None:
    lrvd.save("folder", model, guide)


def note(model: Any, guide: Any) -> None:
    run = {"optimizer": lrvd.optim.AdamW(), "elbo": lrvd.RankELBO()}
    lrvd.checkpoint("run.safetensors", model=model, guide=guide, **run)


def groups(model: Any, guide: Any) -> None:
    lrvd.optim.parameter_groups(model, guide)


def select(model: Any, guide: Any) -> None:
    keep = torch.ones(model.space.size, dtype=torch.bool)
    selection.select(model, guide, keep=keep)


WRITERS = [lrvd.prune, select]


@pytest.mark.parametrize(
    "call", [*READERS, export, step, torch_step, groups, store, note, *WRITERS]
)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_guide_of_another_model_is_refused(
    pair: Any, call: Callable[[Any, Any], object], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (model, _), (_, stranger) = pair(), pair()
    with pytest.raises(ValueError, match=r"guide was built on another model; pass"):
        call(model, stranger)
    assert not [*tmp_path.iterdir()]


def test_a_guide_of_another_model_is_not_linearized() -> None:
    (model, _), (_, stranger) = gates(), gates()
    with pytest.raises(ValueError, match=r"another model.* RankDiagonal\(model\)"):
        linearized(model, stranger)


def test_a_guide_built_on_a_copy_is_not_one_of_the_original() -> None:
    model, _ = gates()
    guides = [RankDiagonal(twin) for twin in (copy.deepcopy(model) for _ in range(2))]
    for guide in guides:
        with pytest.raises(ValueError, match="built on another model"):
            predicted(model, guide)


@pytest.mark.parametrize("writer", WRITERS)
def test_what_removes_ranks_refuses_copies_made_apart(writer: Any) -> None:
    model, guide = (copy.deepcopy(each) for each in gates())
    with pytest.raises(ValueError, match=r"copy.deepcopy\(\(model, guide\)\)"):
        writer(model, guide)


def test_a_copy_from_before_a_removal_does_not_fit_after_it() -> None:
    model, guide = gates()
    before = copy.deepcopy(guide)
    selection.select(model, guide, keep=torch.arange(8) < 5)
    with pytest.raises(ValueError, match="8 and 5 rank components, since one was pru"):
        predicted(model, before)


@pytest.mark.parametrize("call", [*READERS, store])
@pytest.mark.parametrize("wrapped", ["model", "guide"])
def test_a_wrapper_around_either_is_refused_by_name(
    call: Any, wrapped: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    pair = dict(zip(("model", "guide"), factors()))
    pair[wrapped] = AveragedModel(pair[wrapped])
    with pytest.raises(TypeError, match=rf"is an? AveragedModel.*{wrapped}\.module"):
        call(pair["model"], pair["guide"])


def wide(**batch: object) -> None:
    pyro.sample("gate", dist.Normal(torch.ones(9), 1.0).to_event(1))


def more(**batch: object) -> None:
    pyro.sample("gate", dist.Normal(torch.ones(8), 1.0).to_event(1))
    pyro.sample("scale", dist.LogNormal(torch.ones(1), 1.0).to_event(1))


def other_prior() -> Any:
    return automatic(Hierarchical())[1]


@pytest.mark.parametrize("make", [lambda: wide, lambda: more])
@pytest.mark.parametrize(
    "call", [predicted, mean_logits, drawn_logits, constants, linearized, export]
)
def test_a_guide_that_draws_other_sites_is_refused(
    make: Any, call: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"draws have the latent sites .* and the mod"):
        call(automatic()[0], make())
    assert not [*tmp_path.iterdir()]


def same_sites() -> Any:
    return automatic()[1]


@pytest.mark.parametrize("make", [other_prior, same_sites])
@pytest.mark.parametrize(
    "call", [predicted, mean_logits, drawn_logits, constants, linearized, export, step]
)
def test_an_autoguide_of_another_model_is_refused(
    make: Any, call: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="AutoNormal was built on another model; pass"):
        call(automatic()[0], make())
    assert not [*tmp_path.iterdir()]


def test_a_foreign_guide_is_seen_through_handlers_around_the_model() -> None:
    (model, _), (_, guide) = automatic(), automatic()
    with pytest.raises(ValueError, match="was built on another model"):
        step(poutine.scale(model, scale=2.0), guide)


def test_the_elbo_refuses_a_guide_whose_sites_have_another_size() -> None:
    one = nets.lora(nets.Perceptron(), target_modules=["out"], r=8)
    model, _ = automatic(Hierarchical(), one)

    def guide(**batch: Any) -> None:
        for name, law in model.latent_sites().items():
            (size,) = law.event_shape
            longer = torch.ones(2 if size == 1 else size)
            pyro.sample(name, dist.LogNormal(longer, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"shape \(2,\) in the guide and \(1,\) in"):
        step(model, guide)


def test_posterior_samples_of_another_model_are_refused() -> None:
    model, _ = automatic(Hierarchical())
    sites = {name: fn.sample((4,)) for name, fn in model.latent_sites().items()}
    assert lrvd.predict(model, None, [INPUTS], posterior_samples=sites).probs.shape
    for name in sites:
        longer = sites | {name: torch.cat([sites[name], sites[name]], -1)}
        with pytest.raises(ValueError, match="posterior_samples of another model"):
            lrvd.predict(model, None, [INPUTS], posterior_samples=longer)
