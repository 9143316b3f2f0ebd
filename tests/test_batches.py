"""Batches that are not mappings are refused by name, wherever a batch is taken."""

from collections import UserDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from pyro.infer import SVI
from torch.utils.data import DataLoader, TensorDataset

import lrvd_pyro as lrvd
from lrvd_pyro import guides
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods import Categorical
from lrvd_pyro.models import GateLoRA

Named = namedtuple("Named", "x labels")
SIZE = 6


def tuples() -> Any:
    data = TensorDataset(torch.randn(SIZE, 5), torch.arange(SIZE) % 3)
    return DataLoader(data, 3)


def predict(model: Any, batches: Any, **options: Any) -> None:
    lrvd.predict(model, RankDiagonal(model), batches, 2, **options)


def linearized(model: Any, batches: Any) -> None:
    predict(model, batches, method="linearized")


def bayesianize(model: Any, batches: Any) -> None:
    lrvd.gauge.bayesianize(model.net, batches, likelihood=Categorical())


def laplace(model: Any, batches: Any) -> None:
    model = GateLoRA(nets.perceptron(), num_data=SIZE, prior=lrvd.priors.Normal())
    guide: Any = guides.laplace(model)
    guide(x=torch.randn(SIZE, 5), labels=torch.arange(SIZE) % 3)
    guide.laplace_approximation(list(batches))


def to_arviz(model: Any, batches: Any) -> None:
    lrvd.to_arviz(model, RankDiagonal(model), batches, 2)


def gramians(model: Any, batches: Any) -> None:
    lrvd.gauge.gramians(model, batches)


def export(model: Any, batches: Any) -> None:
    first = next(iter(batches))
    lrvd.export_peft("out", model, RankDiagonal(model), probe=first)


TAKERS = [predict, linearized, bayesianize, laplace, to_arviz, gramians, export]


@pytest.mark.parametrize("take", TAKERS)
def test_a_batch_that_is_a_list_is_refused(
    take: Callable[[Any, Any], None], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model = GateLoRA(nets.perceptron(), num_data=SIZE)
    with pytest.raises(TypeError, match=r"a batch is a list; expected a mapping.*zip"):
        take(model, tuples())
    assert not [*tmp_path.iterdir()]
    mapped = [{"x": x, "labels": labels} for x, labels in tuples()]
    take(model, mapped)


@pytest.mark.parametrize("batches", [torch.ones(2, 5), ["a text"], [Named(1, 2)]])
def test_other_kinds_of_batches_are_refused_by_their_name(batches: Any) -> None:
    model = GateLoRA(nets.perceptron(), num_data=SIZE)
    kind = type(batches[0]).__name__
    with pytest.raises(TypeError, match=f"a batch is a {kind}; expected a mapping of"):
        predict(model, batches)


def test_any_mapping_is_a_batch() -> None:
    model = GateLoRA(nets.perceptron(), num_data=SIZE)
    predict(model, [UserDict({"x": torch.randn(SIZE, 5)})])


@pytest.mark.parametrize("noise", ["example", "batch"])
@pytest.mark.parametrize("wrap", [tuple, Named._make, lambda b: {"x": [*b][0]}])
def test_a_batch_by_place_is_refused_by_step_and_model(noise: Any, wrap: Any) -> None:
    model = GateLoRA(nets.perceptron(), num_data=SIZE)
    guide = RankDiagonal(model)
    svi = SVI(model, guide, lrvd.optim.AdamW(), lrvd.RankELBO(noise=noise))
    batch = wrap((torch.randn(SIZE, 5), torch.arange(SIZE) % 3))
    for call in (svi.step, model):
        with pytest.raises(TypeError, match=r"as +keywords.*svi\.step\(\*\*"):
            call(batch)
