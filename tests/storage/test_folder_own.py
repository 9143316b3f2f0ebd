"""Priors, likelihoods and guides of one's own are passed, and their names checked."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import nets
import pyro
import pytest
import torch
from nets import tokens
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from safetensors.torch import load_file
from stored import fresh, perturbed, same_predictions, saved
from torch import Tensor, nn

from lrvd_pyro import guides, likelihoods, priors
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.inference.param_store import give_own_name
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.storage.folder import load, save
from lrvd_pyro.storage.spec import Unstorable, decode, encode


def centered(space: Any) -> Tensor:
    z = pyro.sample("z", dist.Normal(torch.ones(space.size), 1).to_event(1))
    return 2.0 * z


class Scaled(PyroModule):
    """A prior, and a likelihood, of one's own."""

    def __init__(self, family: Any = None) -> None:
        super().__init__()
        self.family = family
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, space: Any) -> Tensor:
        normal = dist.Normal(torch.ones(space.size), self.scale.exp())
        return pyro.sample("gate", normal.to_event(1))


class Own(likelihoods.Categorical):
    """A likelihood of one's own."""


def test_what_is_not_of_this_library_is_passed_and_its_name_checked(
    tmp_path: Path,
) -> None:
    net, inputs = nets.bert(), tokens(4, labels=False)
    own: dict[str, Any] = {"prior": Scaled(), "likelihood": Own()}
    model = GateLoRA(net, num_data=60, **own)
    guide = perturbed(model)
    path, base = save(tmp_path / "run", model, guide), fresh(net)
    again: dict[str, Any] = {"prior": Scaled(), "likelihood": Own()}
    with pytest.raises(
        ValueError, match="'Scaled', which is not a class of .*prior=...\\)"
    ):
        load(path, base)
    with pytest.raises(ValueError, match="prior is 'centered', but .* with 'Scaled'"):
        load(path, base, prior=centered, likelihood=Own())
    pair = load(path, base, **again)
    assert again["prior"].scale == own["prior"].scale != 1.5
    same_predictions((model, guide), pair, inputs)


def test_a_function_as_prior_is_passed(tmp_path: Path) -> None:
    path, model, guide = saved(tmp_path, prior=centered)
    base = fresh(model.base_net)
    with pytest.raises(ValueError, match="prior 'centered', which is not a class of"):
        load(path, base)
    pair = load(path, base, prior=centered)
    same_predictions((model, guide), pair, tokens(4, labels=False))


def test_a_family_or_weight_prior_without_a_name_is_passed(tmp_path: Path) -> None:
    prior = priors.Hierarchical(lambda scale: dist.HalfNormal(scale))
    weights = dist.Normal(torch.zeros(1), 1.0)
    options: dict[str, Any] = {"prior": prior, "weight_prior": weights}
    model = GateLoRA(nets.perceptron(), num_data=60, **options)
    path = save(tmp_path / "run", model, perturbed(model))
    base = fresh(model.base_net)
    with pytest.raises(ValueError, match="'Hierarchical of <lambda>', .*prior=..."):
        load(path, base)
    with pytest.raises(ValueError, match="weight_prior 'Normal', .*weight_prior=..."):
        load(path, base, prior=prior)
    loaded, _ = load(path, base, **options)
    assert isinstance(loaded, GateLoRA) and loaded.weight_prior is weights


def test_other_guides_are_made_by_the_user(tmp_path: Path) -> None:
    net, batch = nets.bert(), tokens()
    model = GateLoRA(net, prior=priors.Normal(), num_data=60)

    def make(model: RankModel) -> AutoNormal:
        guide = give_own_name(AutoNormal(model))
        guide(**batch)
        return guide

    guide = perturbed(model, make(model))
    path, base = save(tmp_path / "run", model, guide), fresh(net)
    with pytest.raises(ValueError, match="guide 'AutoNormal', which you must make"):
        load(path, base)
    with pytest.raises(ValueError, match="guide is 'RankDiagonal', but .*'AutoNormal'"):
        load(path, base, guide=RankDiagonal)
    with pytest.raises(ValueError, match=r"first call; .*calls guide\(\*\*batch\)"):
        load(path, base, guide=AutoNormal)
    inputs = {name: v for name, v in batch.items() if name != "labels"}
    same_predictions((model, guide), load(path, base, guide=make), inputs)


@pytest.mark.parametrize(
    "make", [guides.multivariate_normal, guides.low_rank_multivariate_normal]
)
def test_guides_of_a_full_covariance_come_back(make: Any, tmp_path: Path) -> None:
    net, inputs = nets.perceptron(), {"x": torch.randn(4, 5)}
    model = GateLoRA(net, prior=priors.Normal(), num_data=60)

    def called(model: RankModel) -> Any:
        guide = make(model)
        guide(**inputs, labels=torch.tensor([0, 1, 2, 0]))
        return guide

    guide = perturbed(model, called(model))
    pair = load(save(tmp_path / "run", model, guide), fresh(net), guide=called)
    same_predictions((model, guide), pair, inputs)


def test_a_guide_that_holds_its_model_does_not_save_the_base(tmp_path: Path) -> None:
    class Holding(RankDiagonal):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.whole = model

    model = GateLoRA(nets.perceptron(), num_data=60)
    guide = perturbed(model, Holding(model))
    path = save(tmp_path / "run", model, guide)
    names = load_file(path / "lrvd_posterior.safetensors").keys()
    assert {n for n in names if n.startswith("guide")} == {"guide.log_variance"}
    pair = load(path, fresh(model.base_net), guide=Holding)
    same_predictions((model, guide), pair, {"x": torch.randn(4, 5)})


def test_arguments_survive_json() -> None:
    for value in (None, 3, 0.1, "a", (1, (2.5, "b")), dist.HalfNormal):
        assert decode(json.loads(json.dumps(encode(value)))) == value
    twin = decode(json.loads(json.dumps(encode(partial(dist.Normal, 0.0, scale=2.0)))))
    assert (twin.func, twin.args, twin.keywords) == (
        dist.Normal,
        (0.0,),
        {"scale": 2.0},
    )
    twin = decode(json.loads(json.dumps(encode(dist.StudentT(3.0, 0.0, 2.0)))))
    assert type(twin) is dist.StudentT and float(twin.df) == 3.0
    with pytest.raises(Unstorable, match="Scaled"):
        decode(encode(Scaled()))
    with pytest.raises(ValueError, match="'os.system' is not a distribution of"):
        decode({"partial": "os.system", "args": ["true"], "keywords": {}})
