"""Folders that a strict reader might refuse, and that are right."""

import json
import math
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from pyro import distributions as dist
from stored import fresh, perturbed, same_predictions
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA


class Towers(nn.Module):
    """Names with a hyphen and a space, and a mask with infinity."""

    def __init__(self) -> None:
        super().__init__()
        parts = {"user-tower": nn.Linear(5, 5), "the head": nn.Linear(5, 3)}
        self.parts = nn.ModuleDict(parts)
        self.register_buffer("mask", torch.full((5, 5), -math.inf).triu(1))
        self.last: Any = None

    def forward(self, x: Tensor) -> Any:
        mixed = self.parts["user-tower"](x) @ self.mask.softmax(1)
        self.last = SequenceClassifierOutput(logits=self.parts["the head"](mixed))
        return self.last


class Guide(RankDiagonal):
    """An argument whose default is a flag, and whose value is none."""

    def __init__(self, model: Any, *, tied: Any = False) -> None:
        super().__init__(model)
        self.tied = tied


def comes_back(path: Path, net: Any, guide: Any = None, **options: Any) -> None:
    model = GateLoRA(net, num_data=20, **options)
    pair = model, perturbed(model, guide and guide(model))
    base = fresh(net)
    lrvd.save(path, *pair)
    load: Any = {} if guide is None else {"guide": guide}
    same_predictions(pair, lrvd.load(path, base, **load), {"x": torch.randn(4, 5)})


def test_names_with_hyphens_and_masks_with_infinity(tmp_path: Path) -> None:
    targets = ["parts.user-tower", "parts.the head"]
    comes_back(tmp_path / "run", nets.lora(Towers(), target_modules=targets))


@pytest.mark.parametrize("prior", [dist.Uniform(-9.0, 9.0), dist.StudentT(3.0)])
def test_weight_priors_whose_parameters_are_no_constraints(
    prior: Any, tmp_path: Path
) -> None:
    comes_back(tmp_path / "run", nets.perceptron(), weight_prior=prior)


def test_a_users_own_argument_is_no_flag(tmp_path: Path) -> None:
    net = nets.perceptron()
    model = GateLoRA(net, num_data=20)
    guide, base = Guide(model, tied="layer"), fresh(net)
    path = lrvd.save(tmp_path / "run", model, guide)
    _, loaded = lrvd.load(path, base, guide=Guide)
    assert loaded.tied == "layer"


def test_an_infinite_argument_comes_back(tmp_path: Path) -> None:
    net = nets.perceptron()
    model = GateLoRA(net, num_data=20)
    guide, base = Guide(model, tied=math.inf), fresh(net)
    path = lrvd.save(tmp_path / "run", model, guide)
    json.loads((path / "lrvd_config.json").read_text(), parse_constant=pytest.fail)
    assert lrvd.load(path, base, guide=Guide)[1].tied == math.inf


def test_a_base_with_one_more_buffer_keeps_it_and_says_so(tmp_path: Path) -> None:
    net = nets.perceptron()
    model = GateLoRA(net, num_data=20)
    path, base = lrvd.save(tmp_path / "run", model, perturbed(model)), fresh(net)
    base.register_buffer("position_ids", torch.arange(3))
    with pytest.warns(UserWarning, match=r"no values for position_ids, buffers"):
        lrvd.load(path, base)


def test_a_base_that_keeps_its_output_is_as_it_was_after_a_failure(
    tmp_path: Path,
) -> None:
    net = nets.lora(Towers(), target_modules=["parts.user-tower"])
    model = GateLoRA(net, num_data=20)
    path, base = lrvd.save(tmp_path / "run", model, perturbed(model)), fresh(net)
    base(torch.randn(2, 5))
    kept, names = base.last, [name for name, _ in base.named_modules()]

    def fails(model: Any) -> Any:
        model.base_net(x=torch.randn(2, 5))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lrvd.load(path, base, guide=fails)
    assert base.last is kept and [name for name, _ in base.named_modules()] == names


def test_what_load_would_refuse_is_not_written(tmp_path: Path) -> None:
    net = nets.perceptron()
    model = GateLoRA(net, num_data=20)
    guide = perturbed(model)
    net.peft_config["default"].lora_dropout = 1.5
    with pytest.raises(ValueError, match="lora_dropout is 1.5; expected a number from"):
        lrvd.save(tmp_path / "run", model, guide)
    assert not list(tmp_path.iterdir())
