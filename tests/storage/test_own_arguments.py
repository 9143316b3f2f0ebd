"""Arguments of one's own class come back, or the call that brings them is named."""

from functools import partial
from pathlib import Path
from typing import Any

import nets
import pyro
import pytest
import torch
from nets import tokens
from own_guide import Uniform
from pyro import distributions as dist
from stored import fresh, perturbed, same_predictions
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA


class Rated(GateLoRA):
    """Its last argument is a tensor, which JSON cannot hold."""

    def __init__(self, net: Any, *, rates: Any = None, **arguments: Any) -> None:
        super().__init__(net, **arguments)
        self.rates = torch.ones(16) if rates is None else rates

    def predictions(self, **inputs: Any) -> Tensor:
        return super().predictions(**inputs) * self.rates.mean()


def rated(tmp_path: Path) -> tuple[Any, Any, Any]:
    model = Rated(nets.bert(), num_data=60, rates=torch.full((16,), 5.0))
    guide = perturbed(model)
    lrvd.save(tmp_path / "run", model, guide)
    return (model, guide), tmp_path / "run", fresh(model.base_net)


def test_what_json_cannot_hold_is_asked_for_by_the_call_that_works(
    tmp_path: Path,
) -> None:
    pair, path, base = rated(tmp_path)
    message = (
        r"'rates' \(Tensor\) of the model 'Rated'.*"
        r"load\(path, net, model=functools.partial\(Rated, rates=...\)\)"
    )
    with pytest.raises(ValueError, match=message):
        lrvd.load(path, base, model=Rated)
    again = partial(Rated, rates=torch.full((16,), 5.0))
    loaded = lrvd.load(path, base, model=again)
    same_predictions(pair, loaded, tokens(labels=False))


def test_a_function_supplies_what_json_cannot_hold(tmp_path: Path) -> None:
    pair, path, base = rated(tmp_path)

    def make(net: Any, **arguments: Any) -> Rated:
        return Rated(net, rates=torch.full((16,), 5.0), **arguments)

    loaded = lrvd.load(path, base, model=make)
    same_predictions(pair, loaded, tokens(labels=False))


class Hidden(GateLoRA):
    """It keeps an argument under another name than its constructor's."""

    def __init__(self, net: Any, *, width: float = 1.0, **arguments: Any) -> None:
        super().__init__(net, **arguments)
        self.scale = width


def test_an_argument_without_an_attribute_is_asked_for(tmp_path: Path) -> None:
    model = Hidden(nets.bert(), num_data=60, width=3.0)
    path = lrvd.save(tmp_path / "run", model, RankDiagonal(model))
    base = fresh(model.base_net)
    with pytest.raises(ValueError, match=r"'width' \(unknown\) of the model 'Hidden'"):
        lrvd.load(path, base, model=Hidden)
    loaded, _ = lrvd.load(path, base, model=partial(Hidden, width=3.0))
    assert isinstance(loaded, Hidden) and loaded.scale == 3.0


class Closed(GateLoRA):
    """Its constructor takes no adapter."""

    def __init__(self, net: Any, num_data: int) -> None:
        super().__init__(net, num_data=num_data)


def test_a_constructor_that_load_cannot_call_is_named(tmp_path: Path) -> None:
    model = Closed(nets.bert(), 60)
    guide = perturbed(model)
    path = lrvd.save(tmp_path / "run", model, guide)
    base = fresh(model.base_net)
    message = (
        r"needs Closed\(net, num_data=..., adapter=..., .*but of the model that was "
        r"passed got an unexpected keyword argument 'adapter'; .*model=make"
    )
    with pytest.raises(ValueError, match=message):
        lrvd.load(path, base, model=Closed)

    def make(net: Any, *, num_data: int, **_: Any) -> Closed:
        return Closed(net, num_data)

    loaded = lrvd.load(path, base, model=make)
    same_predictions((model, guide), loaded, tokens(labels=False))


def test_a_weight_prior_for_a_model_without_one_is_refused(tmp_path: Path) -> None:
    model = FactorLoRA(nets.bert(), num_data=60)
    path = lrvd.save(tmp_path / "run", model, lrvd.guides.TiedDiagonal(model))
    with pytest.raises(ValueError, match="unexpected keyword argument 'weight_prior'"):
        lrvd.load(path, fresh(model.base_net), weight_prior=dist.Normal(0.0, 1.0))


class Heavy(Uniform):
    """Its last argument is a tensor of two numbers."""

    def __init__(self, model: Any, width: float = 0.2, *, ends: Any = None) -> None:
        super().__init__(model, width)
        self.ends = torch.ones(2) if ends is None else ends

    def forward(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        low, high = self.width * self.ends[:, None] * self.log_width.exp()
        gate = dist.Uniform(1 - low, 1 + high, validate_args=False).to_event(1)
        return {"gate": pyro.sample("gate", gate)}


@pytest.mark.parametrize("width", [0.2, 0.7])
def test_a_guides_arguments_come_back_with_its_class(
    width: float, tmp_path: Path
) -> None:
    model = GateLoRA(nets.bert(), prior=lrvd.priors.Normal(), num_data=60)
    ends = torch.tensor([1.0, 2.0])
    guide = Heavy(model, width, ends=ends)
    path, base = lrvd.save(tmp_path / "run", model, guide), fresh(model.base_net)
    with pytest.raises(ValueError, match=r"'ends' \(Tensor\).*partial\(Heavy, ends="):
        lrvd.load(path, base, guide=Heavy)
    loaded = lrvd.load(path, base, guide=partial(Heavy, ends=ends))
    assert loaded[1].width == width
    same_predictions((model, guide), loaded, tokens(labels=False))


def test_a_guide_from_a_function_is_what_the_function_makes(tmp_path: Path) -> None:
    model = GateLoRA(nets.bert(), prior=lrvd.priors.Normal(), num_data=60)
    path = lrvd.save(tmp_path / "run", model, Uniform(model, 0.7))
    base = fresh(model.base_net)
    loaded = lrvd.load(path, base, guide=lambda model: Uniform(model, 0.3))
    assert loaded[1].width == 0.3


def test_a_guide_that_is_another_class_is_named_before_it_is_made(
    tmp_path: Path,
) -> None:
    model = GateLoRA(nets.bert(), prior=lrvd.priors.Normal(), num_data=60)
    path = lrvd.save(tmp_path / "run", model, Uniform(model))
    with pytest.raises(ValueError, match="guide is 'RankDiagonal', but .* 'Uniform'"):
        lrvd.load(path, fresh(model.base_net), guide=RankDiagonal)


class Passing(GateLoRA):
    """Its constructor passes on what it does not know."""

    def __init__(self, network: Any, *, rate: float = 1.0, **arguments: Any) -> None:
        super().__init__(network, **arguments)
        self.rate = rate


def test_what_a_constructor_passes_on_comes_back(tmp_path: Path) -> None:
    weight_prior = dist.Normal(0.0, 0.5)
    model = Passing(nets.bert(), num_data=60, rate=2.0, weight_prior=weight_prior)
    guide = perturbed(model)
    path = lrvd.save(tmp_path / "run", model, guide)
    loaded, _ = lrvd.load(path, fresh(model.base_net), model=Passing)
    assert isinstance(loaded, Passing) and loaded.rate == 2.0
    assert loaded.weight_prior is not None and loaded.weight_prior.scale == 0.5


class Sided(FactorLoRA):
    def __init__(self, net: Any, **arguments: Any) -> None:
        super().__init__(net, **arguments)


def test_the_sides_of_a_subclass_come_back(tmp_path: Path) -> None:
    sides = ("lora_A", "lora_B")
    model = Sided(nets.bert(), num_data=60, sides=sides)
    guide = lrvd.guides.TiedDiagonal(model)
    path = lrvd.save(tmp_path / "run", model, guide)
    loaded = lrvd.load(path, fresh(model.base_net), model=Sided)
    assert loaded[0].space.sides == sides
    same_predictions((model, guide), loaded, tokens(labels=False))


class Simple(lrvd.models.RankModel):
    """It has no constructor of its own."""

    binds, bind, factors = "gates", GateLoRA.bind, GateLoRA.factors

    def draw(self) -> Tensor:
        gate: Tensor = self.prior(self.space)
        return gate


class Named(Uniform):
    """Its arguments have names that a model's have."""

    def __init__(self, gated: Any, *, prior: float = 1.0, num_data: int = 1) -> None:
        super().__init__(gated)
        self.prior, self.num_data = prior, num_data


def test_a_model_without_a_constructor_and_a_guide_of_other_names_come_back(
    tmp_path: Path,
) -> None:
    model = Simple(nets.bert(), num_data=60, prior=lrvd.priors.ARD())
    guide = Named(model, prior=3.0, num_data=60)
    path = lrvd.save(tmp_path / "run", model, guide)
    loaded, its = lrvd.load(path, fresh(model.base_net), model=Simple, guide=Named)
    assert isinstance(loaded, Simple) and (its.prior, its.num_data) == (3.0, 60)
    same_predictions((model, guide), (loaded, its), tokens(labels=False))


def test_an_object_in_place_of_a_class_is_refused(tmp_path: Path) -> None:
    model = GateLoRA(nets.bert(), num_data=60)
    guide = perturbed(model)
    path, base = lrvd.save(tmp_path / "run", model, guide), fresh(model.base_net)
    with pytest.raises(TypeError, match="model is a GateLoRA object; expected its cl"):
        lrvd.load(path, base, model=model)
    with pytest.raises(TypeError, match="guide is a RankDiagonal object; expected"):
        lrvd.load(path, base, guide=guide)


def scaled(by: float, space: Any) -> Tensor:
    gate: Tensor = pyro.sample("gate", dist.Normal(space.ones(), by).to_event(1))
    return gate


def other(by: float, space: Any) -> Tensor:
    return scaled(by, space)


def test_a_partial_of_another_function_is_another_prior(tmp_path: Path) -> None:
    model = GateLoRA(nets.bert(), num_data=60, prior=partial(scaled, 2.0))
    path = lrvd.save(tmp_path / "run", model, perturbed(model))
    with pytest.raises(ValueError, match="is 'partial of other', but .*'partial of sc"):
        lrvd.load(path, fresh(model.base_net), prior=partial(other, 2.0))
