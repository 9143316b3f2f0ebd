"""An adapter that was loaded frozen is told of at the first training step."""

import warnings
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from nets import Perceptron, lora
from pairs import rank_guide
from peft import LoraConfig, PeftModel, get_peft_model
from pyro.infer import MCMC, NUTS, SVI
from third_model import CoreLoRA
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.models import FactorLoRA, GateLoRA

MESSAGE = r"weights of adapter '{}' are frozen, as PEFT loads them.*is_trainable=True\)"
TARGETS = ["hidden", "out"]


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(6, 5), "labels": torch.randint(0, 3, (6,))}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    lora(Perceptron(), target_modules=TARGETS).save_pretrained(tmp_path)
    return str(tmp_path)


def steps(model: Any, driver: str, count: int = 2) -> None:
    guide, elbo = rank_guide(model), lrvd.RankELBO()
    if driver == "svi":
        svi = SVI(model, guide, lrvd.optim.AdamW(), loss=elbo)
        for _ in range(count):
            svi.step(**batch())
    else:
        loss = elbo(model, guide)
        for _ in range(count):
            loss(**batch()).backward()


def loaded(folder: str, way: str) -> tuple[PeftModel, str]:
    base = Perceptron()
    if way == "from_pretrained":
        return PeftModel.from_pretrained(base, folder), "default"
    if way == "inference_mode":
        config = LoraConfig(r=4, target_modules=TARGETS, inference_mode=True)
        return get_peft_model(base, config), "default"
    net = lora(base, target_modules=TARGETS)
    net.load_adapter(folder, "second")
    net.base_model.set_adapter("second", inference_mode=True)
    return net, "second"


@pytest.mark.parametrize("driver", ["svi", "torch"])
@pytest.mark.parametrize("family", [GateLoRA, FactorLoRA])
@pytest.mark.parametrize("way", ["from_pretrained", "inference_mode", "load_adapter"])
def test_an_adapter_that_came_frozen_is_told_of_once_at_the_first_step(
    folder: str, way: str, family: Any, driver: str
) -> None:
    net, adapter = loaded(folder, way)
    model = family(net, num_data=60, adapter=adapter)
    with pytest.warns(UserWarning) as heard:
        steps(model, driver)
    told = [w for w in heard if "is_trainable" in str(w.message)]
    assert len(told) == 1
    with pytest.warns(UserWarning, match=MESSAGE.format(adapter)):
        warnings.warn_explicit(told[0].message, None, told[0].filename, 1)


@pytest.mark.parametrize("driver", ["svi", "torch"])
def test_an_adapter_that_trains_is_not_told_of(folder: str, driver: str) -> None:
    # Warnings are errors here.
    net = PeftModel.from_pretrained(Perceptron(), folder, is_trainable=True)
    steps(GateLoRA(net, num_data=60), driver)
    # One side alone is a way to train: LoRA-FA.
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    steps(GateLoRA(net, num_data=60), driver)


def test_an_adapter_frozen_by_hand_is_not_told_of(folder: str) -> None:
    net = PeftModel.from_pretrained(Perceptron(), folder, is_trainable=True)
    steps(GateLoRA(net.requires_grad_(False), num_data=60), "svi")
    net = PeftModel.from_pretrained(Perceptron(), folder, is_trainable=True)
    model = CoreLoRA(net, num_data=60)
    assert not any(p.requires_grad for p in net.parameters())
    guide = pyro.infer.autoguide.AutoNormal(model)
    SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO()).step(**batch())


def test_what_does_not_train_does_not_tell(folder: str) -> None:
    model = GateLoRA(
        PeftModel.from_pretrained(Perceptron(), folder),
        prior=lrvd.priors.Normal(),
        num_data=6,
    )
    data = batch()
    lrvd.RankELBO().loss(model, rank_guide(model), **data)
    lrvd.predict(model, rank_guide(model), [{"x": data["x"]}], num_samples=2)
    mcmc = MCMC(NUTS(model), num_samples=1, warmup_steps=1, disable_progbar=True)
    mcmc.run(**data)
