"""What is exported is plain PEFT, or a plain network, with the mean's logits."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import tokens
from pairs import rank_guide
from peft import LoraConfig, PeftModel
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file
from stored import learned
from torch import Tensor, nn

from lrvd_pyro import priors
from lrvd_pyro.inference.param_store import give_own_name
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.predictive.predictive import posterior_mean
from lrvd_pyro.selection.removal import select
from lrvd_pyro.storage.export import export_peft

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
PAIR = ("lora_A", "lora_B")
pytestmark = pytest.mark.filterwarnings(nets.GROUPED)
MODES: list[Any] = ["pruned", "padded", "merged"]


class Nested(nn.Module):
    """A layer ``out``, and others whose names end like it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = nets.Perceptron(5, 6, 5), nets.Perceptron(5, 6, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.other(self.block(x)))


def nested() -> PeftModel:
    targets, ranks = ["block.out", "out"], {"block.out": 2}
    others = ["other.out"]
    return nets.lora(
        Nested(), target_modules=targets, exclude_modules=others, rank_pattern=ranks
    )


NETS: dict[str, Callable[[], Any]] = {
    "linear": nets.bert,
    "conv1d": nets.gpt2,
    "rslora": partial(nets.bert, use_rslora=True),
    "dora": partial(nets.bert, use_dora=True),
    "dora-conv1d": partial(nets.gpt2, use_dora=True),
    "bias": partial(nets.bert, bias="all"),
    "ragged": partial(nets.perceptron, **nets.RAGGED),
    "conv2d": nets.conv,
    "grouped": nets.grouped,
    "nested": nested,
}


def inputs_for(kind: str) -> dict[str, Tensor]:
    if kind in ("conv2d", "grouped"):
        return {"x": torch.randn(4, 4 if kind == "grouped" else 3, 6, 6)}
    if kind in ("ragged", "nested"):
        return {"x": torch.randn(4, 5)}
    return tokens(4, labels=False)


def expected(model: Any, guide: Any, inputs: dict[str, Tensor]) -> Tensor:
    model.base_net.eval()
    with torch.no_grad(), posterior_mean(model, guide):
        return model.predictions(**inputs)


def fresh(net: PeftModel) -> nn.Module:
    """The base, as its owner would load it."""
    return copy.deepcopy(net).unload()


def logits(net: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = net.eval()(**inputs)
    return getattr(output, "logits", output)


def config_of(path: Path) -> Any:
    return json.loads((path / "adapter_config.json").read_text())


# Logits


@pytest.mark.parametrize("mode", ["pruned", "padded"])
@pytest.mark.parametrize("kind", NETS)
def test_plain_peft_gives_the_logits_of_the_mean(
    kind: str, mode: Any, tmp_path: Path
) -> None:
    net, inputs = NETS[kind](), inputs_for(kind)
    model = GateLoRA(net, num_data=60)
    guide = learned(model)
    with torch.no_grad(), model.bind(torch.ones(model.space.size)):
        assert (model.predictions(**inputs) - expected(model, guide, inputs)).any()
    path = export_peft(tmp_path / "out", model, guide, mode=mode, probe=inputs)
    loaded = PeftModel.from_pretrained(fresh(net), path)
    exactly(logits(loaded, inputs), expected(model, guide, inputs))
    assert sorted(p.name for p in path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert str(tmp_path) not in (path / "adapter_config.json").read_text()


@pytest.mark.parametrize("kind", ["linear", "conv1d", "rslora", "dora", "bias"])
def test_a_merged_network_needs_no_peft(kind: str, tmp_path: Path) -> None:
    net, inputs = NETS[kind](), inputs_for(kind)
    model = GateLoRA(net, num_data=60)
    guide = learned(model)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    path = export_peft(tmp_path / "out", model, guide, mode="merged", probe=inputs)
    loaded = type(net.get_base_model()).from_pretrained(path)
    assert not any("lora" in name for name in loaded.state_dict())
    exactly(logits(loaded, inputs), expected(model, guide, inputs))
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sides", [("lora_A",), PAIR])
def test_factor_lora_exports_its_own_weights(
    sides: Any, mode: Any, tmp_path: Path
) -> None:
    net, inputs = nets.bert(), tokens(4, labels=False)
    model = FactorLoRA(net, num_data=60, sides=sides)
    guide = rank_guide(model)
    path = export_peft(tmp_path / "out", model, guide, mode=mode, probe=inputs)
    assert path.is_dir()
    exactly(logits(net, inputs), expected(model, guide, inputs))


def test_factor_lora_under_another_guide_exports_the_mean_of_its_draws(
    tmp_path: Path,
) -> None:
    net = nets.perceptron()
    model = FactorLoRA(net, num_data=60)
    batch = {"x": torch.randn(4, 5), "labels": torch.tensor([0, 1, 2, 0])}
    guide = give_own_name(AutoNormal(model))
    with torch.no_grad():
        guide(**batch)
        guide.locs.factor = torch.randn_like(guide.locs.factor)
    export_peft(tmp_path / "out", model, guide, probe=batch)
    inputs = {"x": batch["x"]}
    assert (expected(model, guide, inputs) - logits(net, inputs)).abs().max() > 1e-3


def test_the_trained_head_goes_along(tmp_path: Path) -> None:
    net, inputs = nets.bert(), tokens(4, labels=False)
    model = GateLoRA(net, num_data=60)
    base = fresh(net)
    head = net.base_model.model.classifier.modules_to_save["default"]
    nn.init.normal_(head.weight)
    guide = learned(model)
    for mode in MODES:
        export_peft(tmp_path / mode, model, guide, mode=mode, probe=inputs)
    loaded = PeftModel.from_pretrained(base, tmp_path / "pruned")
    exactly(logits(loaded, inputs), expected(model, guide, inputs))


def test_half_precision_passes_its_own_tolerance(tmp_path: Path) -> None:
    net, inputs = nets.bert().to(torch.bfloat16), tokens(4, labels=False)
    model = GateLoRA(net, num_data=60)
    guide = rank_guide(model)
    for mode in MODES:
        export_peft(tmp_path / mode, model, guide, mode=mode, probe=inputs)


def test_a_second_adapter_stays_out(tmp_path: Path) -> None:
    net, inputs = nets.bert(), tokens(4, labels=False)
    other = LoraConfig(r=2, target_modules=["key"], init_lora_weights=False)
    net.add_adapter("other", other)
    model = GateLoRA(net, num_data=60, adapter="default")
    guide = learned(model)
    for mode in MODES:
        export_peft(tmp_path / mode, model, guide, mode=mode, probe=inputs)
    assert not any("key" in n for n in config_of(tmp_path / "pruned")["target_modules"])
    net.set_adapter("other")
    with pytest.raises(ValueError, match=r"\['other'\] are active.*set_adapter\('def"):
        export_peft(tmp_path / "out", model, guide)


# Ranks


def test_ranks_without_mean_are_dropped_and_modules_without_ranks(
    tmp_path: Path,
) -> None:
    model = GateLoRA(nets.bert(), num_data=60)
    keep = torch.arange(model.space.size) >= 4  # the first module goes for good
    guide = learned(model)
    select(model, guide, keep=keep)
    assert guide.loc is not None
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([0.0] * 4 + [1, 0, 0, 2] + [3, 4, 5, 0]))
    inputs = tokens(4, labels=False)
    export_peft(tmp_path / "pruned", model, guide, probe=inputs)
    export_peft(tmp_path / "padded", model, guide, mode="padded", probe=inputs)
    names = model.space.modules[1:]
    config = config_of(tmp_path / "pruned")
    assert sorted(config["target_modules"]) == sorted(names)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {names[0]: 2}
    config = config_of(tmp_path / "padded")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "padded" / "adapter_model.safetensors")
    shapes = {len(t) for name, t in tensors.items() if "lora_A" in name}
    assert shapes == {3} and len(tensors) == 2 * 2 + 2  # and the head


def test_names_that_end_alike_keep_their_own_ranks(tmp_path: Path) -> None:
    model = GateLoRA(nested(), num_data=60)
    export_peft(tmp_path / "out", model, rank_guide(model))
    config = config_of(tmp_path / "out")
    assert config["exclude_modules"] == ["other.out"]
    assert config["rank_pattern"] == {"block.out": 2}
    assert config["r"] == 4


def test_a_dora_module_without_mean_keeps_its_magnitude(tmp_path: Path) -> None:
    model = GateLoRA(nets.bert(use_dora=True), num_data=60)
    guide = learned(model)
    assert guide.loc is not None
    with torch.no_grad():
        guide.loc[:4] = 0.0
        for name, p in model.base_net.named_parameters():
            if "magnitude" in name:
                p *= 1.1
    export_peft(tmp_path / "out", model, guide, probe=tokens(4))
    assert len(config_of(tmp_path / "out")["target_modules"]) == 4


def test_with_no_mean_left_only_merging_works(tmp_path: Path) -> None:
    net, inputs = nets.bert(), tokens(4, labels=False)
    model = GateLoRA(net, num_data=60)
    guide = learned(model)
    assert guide.loc is not None
    with torch.no_grad():
        guide.loc.zero_()
    for mode in MODES[:2]:
        with pytest.raises(ValueError, match='nothing is left .*mode="merged"'):
            export_peft(tmp_path / "out", model, guide, mode=mode)
    assert not list(tmp_path.iterdir())
    export_peft(tmp_path / "out", model, guide, mode="merged", probe=inputs)


def test_hard_zeros_of_a_spike_and_slab_go(tmp_path: Path) -> None:
    net, inputs = nets.bert(), tokens(4, labels=False)
    model = GateLoRA(net, prior=priors.SpikeSlab(), num_data=60)
    guide = rank_guide(model)
    assert guide.loc is not None
    with torch.no_grad():
        guide.loc[:6] = -30.0
    export_peft(tmp_path / "out", model, guide, probe=inputs)
    assert sorted(config_of(tmp_path / "out")["rank_pattern"].values()) == [2]
