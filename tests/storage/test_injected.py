"""Storage of a network that ``net.add_adapter`` adapted, without a PeftModel."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import tokens
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from stored import learned, mean_logits, perturbed, same_predictions
from torch import nn
from transformers import BertForSequenceClassification

from lrvd_pyro.inference.elbo import RankELBO
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.optim import parameter_groups
from lrvd_pyro.selection.removal import select
from lrvd_pyro.storage.export import export_peft
from lrvd_pyro.storage.folder import load, save
from lrvd_pyro.training import checkpoint, resume

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
MODES: list[Any] = ["pruned", "padded", "merged"]


def pair(**options: Any) -> tuple[Any, Any]:
    """A base without adapter, and its copy with one that differs from zero."""
    base = BertForSequenceClassification(nets.bert_config())
    base = base.to(torch.get_default_dtype()).eval()
    given: dict[str, Any] = {"r": 4, "target_modules": ["query", "value"]} | options
    net = copy.deepcopy(base)
    net.add_adapter(LoraConfig(modules_to_save=["classifier"], **given))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return base, net


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_an_export_has_the_logits_of_the_mean(
    mode: Any, use_dora: bool, tmp_path: Path
) -> None:
    base, net = pair(use_dora=use_dora)
    inputs = tokens(4, labels=False)
    model = GateLoRA(net, num_data=60)
    guide = learned(model)
    before = net(**inputs).logits
    export_peft(tmp_path / "out", model, guide, mode=mode, probe=inputs)
    expected = mean_logits(model, guide, inputs)
    with torch.no_grad():
        if mode == "merged":
            kind = BertForSequenceClassification
            plain: Any = kind.from_pretrained(tmp_path / "out", dtype=torch.float64)
            assert not [n for n in plain.state_dict() if "lora" in n or "base_l" in n]
        else:
            plain = PeftModel.from_pretrained(base, tmp_path / "out")
        exactly(plain.eval()(**inputs).logits, expected)
        exactly(net(**inputs).logits, before)
    assert (expected - before).abs().max() > 1e-3
    assert net.active_adapters() == ["default"]


def test_transformers_itself_loads_the_export(tmp_path: Path) -> None:
    base, net = pair()
    inputs, model = tokens(4, labels=False), GateLoRA(net, num_data=60)
    guide = learned(model)
    export_peft(tmp_path / "out", model, guide, probe=inputs)
    base.load_adapter(str(tmp_path / "out"))
    expected = mean_logits(model, guide, inputs)
    with torch.no_grad():
        exactly(base.eval()(**inputs).logits, expected)


@pytest.mark.parametrize("family", [GateLoRA, FactorLoRA])
def test_a_saved_pair_comes_back_on_the_base(family: Any, tmp_path: Path) -> None:
    base, net = pair()
    model = family(net, num_data=60)
    guide = perturbed(model)
    save(tmp_path / "run", model, guide)
    again = load(tmp_path / "run", base)
    inputs = tokens(4, labels=False)
    same_predictions((model, guide), again, inputs)
    assert again[0].space.modules == model.space.modules
    plain = nets.BertForSequenceClassification(nets.bert_config()).double()
    plain.load_state_dict(base_state(net))
    mean = PeftModel.from_pretrained(plain, tmp_path / "run").eval()
    with torch.no_grad():
        exactly(mean(**inputs).logits, mean_logits(model, guide, inputs))


def base_state(net: nn.Module) -> dict[str, Any]:
    """The frozen weights by their names without PEFT."""
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, tensor in net.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }


def test_a_pruned_pair_comes_back(tmp_path: Path) -> None:
    base, net = pair()
    model = GateLoRA(net, num_data=60)
    guide = perturbed(model)
    select(model, guide, keep=torch.arange(model.space.size) >= 6)
    save(tmp_path / "run", model, guide)
    inputs = tokens(4, labels=False)
    same_predictions((model, guide), load(tmp_path / "run", base), inputs)
    export_peft(tmp_path / "out", model, guide, probe=inputs)


def test_a_checkpoint_resumes_on_it(tmp_path: Path) -> None:
    _, net = pair()
    twin = copy.deepcopy(net)
    model, other = GateLoRA(net, num_data=60), GateLoRA(twin, num_data=60)
    guide, its = perturbed(model), perturbed(other)
    first, second = run_of(model, guide), run_of(other, its)
    first["elbo"](model, guide)(**tokens(4)).backward()
    first["optimizer"].step()
    checkpoint(tmp_path / "run", **first)
    resume(tmp_path / "run", **second)
    same_predictions((model, guide), (other, its), tokens(4, labels=False))


def run_of(model: Any, guide: Any) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(parameter_groups(model, guide, lr=1e-2))
    return {
        "model": model,
        "guide": guide,
        "optimizer": optimizer,
        "elbo": RankELBO(),
    }


def test_a_base_with_an_adapter_of_its_own_is_refused_with_the_way_out(
    tmp_path: Path,
) -> None:
    base, net = pair()
    model = GateLoRA(net, num_data=60)
    save(tmp_path / "run", model, perturbed(model))
    injected = inject_adapter_in_model(LoraConfig(target_modules=["query"]), base)
    with pytest.raises(TypeError, match="adapters of its own; .*without net.add_adap"):
        load(tmp_path / "run", injected)


def test_a_head_that_no_adapter_holds_is_refused(tmp_path: Path) -> None:
    _, net = pair()
    net.bert.pooler.requires_grad_(True)
    model = GateLoRA(net, num_data=60)
    with pytest.raises(ValueError, match=r"\['bert.pooler.dense'\] train but belong"):
        export_peft(tmp_path / "out", model, perturbed(model))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_another_active_adapter_is_refused(tmp_path: Path) -> None:
    net = BertForSequenceClassification(nets.bert_config())
    for name in ("default", "second"):
        net.add_adapter(LoraConfig(r=2, target_modules=["query"]), name)
    model = GateLoRA(net, num_data=60, adapter="default")
    net.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="'second'. are active, but 'default' alone"):
        export_peft(tmp_path / "out", model, perturbed(model))
