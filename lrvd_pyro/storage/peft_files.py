"""An adapter as PEFT has it: its names, its config, its files."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from lrvd_pyro.models.base import RankModel
from lrvd_pyro.rank_space.constant import give_bias, hold_constant

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """The name of a parameter or module in the network without PEFT."""
    parts = name.removeprefix(PREFIX).split(".")
    return ".".join(p for p in parts if p not in ("base_layer", "original_module"))


def module_names(net: nn.Module) -> list[str]:
    """Names of all modules as in the network without PEFT, and PEFT's own."""
    base = net.get_base_model() if isinstance(net, PeftModel) else net
    return [plain_name(name) for name, _ in base.named_modules()]


def adapter_state(net: PeftModel, adapter: str) -> dict[str, Tensor]:
    """What PEFT would save of an adapter: the parameters themselves, heads included."""
    state: dict[str, Tensor] = get_peft_model_state_dict(
        net,
        state_dict=net.state_dict(keep_vars=True),
        adapter_name=adapter,
        save_embedding_layers=False,
    )
    return state


def live_config(model: RankModel) -> LoraConfig:
    """What PEFT has been told of the adapter; ranks may have gone since."""
    return cast(LoraConfig, model.base_net.peft_config[model.space.adapter])


def lora_config(
    live: LoraConfig,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    names: Collection[str],
) -> LoraConfig:
    """A config for exactly these modules of a network whose modules have ``names``."""
    config: Any = copy.deepcopy(live)
    config.r, config.lora_alpha = max(ranks.values()), max(alphas.values())
    config.rank_pattern = _pattern(ranks, config.r)
    config.alpha_pattern = _pattern(alphas, config.lora_alpha)
    config.target_modules = sorted(ranks)
    ends = [n for n in names if n not in ranks and _ends_of(n) & ranks.keys()]
    config.exclude_modules = sorted(ends) or None
    config.layers_to_transform = config.layers_pattern = None
    config.init_lora_weights, config.loftq_config = True, {}
    config.eva_config = config.corda_config = None
    return cast(LoraConfig, config)


def write_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], net: PeftModel
) -> None:
    """Write what PEFT's ``save_pretrained`` writes, but for its README."""
    base = type(net.get_base_model())
    known = {"base_model_class": base.__name__, "parent_library": base.__module__}
    auto_mapping = known if config.task_type is None else None
    config.save_pretrained(str(folder), auto_mapping_dict=auto_mapping)
    write_tensors(folder / ADAPTER, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, none of which may share memory, as safetensors."""
    own = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
    save_file(own, path, metadata={"format": "pt"})


@contextmanager
def adapted(
    net: nn.Module, config: Mapping[str, Any], stored: LoraConfig
) -> Iterator[PeftModel]:
    """The network with a new adapter as saved; without, should the block fail."""
    ranks = dict(zip(config["modules"], config["ranks"], strict=True))
    scalings = dict(zip(config["modules"], config["scalings"], strict=True))
    ranks |= dict.fromkeys(config["constants"], 1)
    scalings |= config["constants"]
    power = 0.5 if config["use_rslora"] else 1.0
    alphas = {name: _whole(scalings[name] * r**power) for name, r in ranks.items()}
    lora = lora_config(stored, ranks, alphas, module_names(net))
    lora.use_rslora, lora.inference_mode = config["use_rslora"], False
    lora.base_model_name_or_path = None
    lora.lora_bias = stored.lora_bias and not config["constant_biases"]
    trainable = [p for p in net.parameters() if p.requires_grad]
    peft_net = get_peft_model(net, lora, config["adapter"])
    try:
        for name, scaling in scalings.items():
            layer: Any = peft_net.get_submodule(PREFIX + name)
            layer.scaling[config["adapter"]] = scaling
            if config["constant_biases"]:
                give_bias(layer, config["adapter"])
            if name in config["constants"]:
                hold_constant(layer, config["adapter"])
        yield peft_net
    except BaseException:
        peft_net.unload()
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise


def _whole(alpha: float) -> float:
    """A ``lora_alpha`` without the rounding of ``alpha / r * r``."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """What differs from ``default``, for PEFT, which takes the first name that fits.

    A name fits another that ends with it; so longer names come first, and a module
    that ends like another is named in any case.
    """
    names = sorted(values, key=len, reverse=True)
    both = {n for n in names if _ends_of(n) & values.keys()}
    return {n: values[n] for n in names if values[n] != default or n in both}


def _ends_of(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(1, len(parts))}
