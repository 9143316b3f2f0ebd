"""An adapter in PEFT's own terms: its names, its config, its files."""

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from torch import Tensor, nn

from lrvd_pyro.models.base import RankModel
from lrvd_pyro.rank_space.constant import give_bias, hold_constant
from lrvd_pyro.rank_space.find import PREFIX, plain_net
from lrvd_pyro.rank_space.names import plain_name

__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
    "PREFIX",
    "adapted",
    "adapter_state",
    "live_config",
    "lora_config",
    "module_names",
    "plain_name",
    "refuse_missing",
    "write_adapter",
    "write_tensors",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"


def module_names(net: nn.Module) -> list[str]:
    """The names of all modules as without PEFT, and of those that PEFT adds."""
    return [plain_name(name) for name, _ in plain_net(net).named_modules()]


def adapter_state(net: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The parameters that PEFT would save of an adapter, heads included, uncopied."""
    state: dict[str, Tensor] = get_peft_model_state_dict(
        net,
        state_dict=net.state_dict(keep_vars=True),  # copies would lose requires_grad
        adapter_name=adapter,
        # "auto" would save embeddings, and may ask the Hugging Face Hub about the base.
        save_embedding_layers=False,
    )
    if isinstance(net, PeftModel):
        return state
    # As Transformers' save_pretrained names them, for PeftModel.from_pretrained.
    return {PREFIX + name: tensor for name, tensor in state.items()}


def live_config(model: RankModel) -> LoraConfig:
    """The adapter's config in PEFT; its ranks are those from before any pruning."""
    return cast(LoraConfig, model.base_net.peft_config[model.space.adapter])


def lora_config(
    live: LoraConfig,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    names: Collection[str],
) -> LoraConfig:
    """Copy a config, for exactly these modules at these ranks.

    Args:
        live: The config to copy.
        ranks: The rank of each module, by its name without PEFT.
        alphas: The ``lora_alpha`` of each module.
        names: The names of all modules of the network.
    """
    config: Any = copy.deepcopy(live)
    config.r, config.lora_alpha = max(ranks.values()), max(alphas.values())
    config.rank_pattern = _pattern(ranks, config.r)
    config.alpha_pattern = _pattern(alphas, config.lora_alpha)
    config.target_modules = sorted(ranks)
    # PEFT also targets modules whose names end with a target's: "other.out" by "out".
    ends = [n for n in names if n not in ranks and _ends_of(n) & ranks.keys()]
    config.exclude_modules = sorted(ends) or None
    config.layers_to_transform = config.layers_pattern = None
    # Initializations from the base or from data would run again when PEFT loads this.
    config.init_lora_weights, config.loftq_config = True, {}
    config.eva_config = config.corda_config = None
    return cast(LoraConfig, config)


def write_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], net: nn.Module
) -> None:
    """Write what PEFT's ``save_pretrained`` writes, except its README."""
    base = type(plain_net(net))
    known = {"base_model_class": base.__name__, "parent_library": base.__module__}
    # As PEFT: without a task type, AutoPeftModel finds the base's class by this.
    auto_mapping = known if config.task_type is None else None
    config.save_pretrained(str(folder), auto_mapping_dict=auto_mapping)
    write_tensors(folder / ADAPTER, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, each with memory of its own."""
    # Safetensors refuses tensors that share memory.
    copies = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
    # Not by save_file, which gives its files to their owner alone.
    path.write_bytes(save(copies, {"format": "pt"}))


def adapted(net: nn.Module, config: Mapping[str, Any], stored: LoraConfig) -> PeftModel:
    """Add a new adapter to a network, at the saved ranks and scalings.

    Args:
        net: The base network, without PEFT.
        config: The config that `lrvd_pyro.save` wrote.
        stored: PEFT's own config from the same folder.

    Raises:
        ValueError: If the network lacks a module that the adapter changes.
    """
    ranks = dict(zip(config["modules"], config["ranks"], strict=True))
    scalings = dict(zip(config["modules"], config["scalings"], strict=True))
    ranks |= dict.fromkeys(config["constants"], 1)
    scalings |= config["constants"]
    power = 0.5 if config["use_rslora"] else 1.0
    # With these alphas PEFT's own ``save_pretrained`` keeps the scalings too.
    alphas = {name: _whole(scalings[name] * r**power) for name, r in ranks.items()}
    lora = lora_config(stored, ranks, alphas, module_names(net))
    lora.use_rslora, lora.inference_mode = config["use_rslora"], False
    lora.base_model_name_or_path = None
    # PEFT makes a bias that trains; constant biases are given below.
    lora.lora_bias = stored.lora_bias and not config["constant_biases"]
    try:
        peft_net = get_peft_model(net, lora, config["adapter"])
    except (AttributeError, LookupError, TypeError) as error:  # what PEFT runs into
        raise ValueError(
            f"PEFT cannot put the saved adapter on a {type(net).__name__}: {error}; "
            f"pass the base that was saved"
        ) from error
    named = plain_net(peft_net).named_modules()
    layers = {name for name, module in named if isinstance(module, LoraLayer)}
    refuse_missing(net, scalings.keys() - layers)
    for name, scaling in scalings.items():
        layer: Any = peft_net.get_submodule(PREFIX + name)
        # alpha / r rounds; the saved scaling keeps predictions bit for bit.
        layer.scaling[config["adapter"]] = scaling
        if config["constant_biases"]:
            give_bias(layer, config["adapter"])
        if name in config["constants"]:
            hold_constant(layer, config["adapter"])
    return cast(PeftModel, peft_net)


def refuse_missing(net: nn.Module, missing: Collection[str]) -> None:
    """Raise a ValueError if a base lacks modules that an adapter changes."""
    if missing:
        raise ValueError(
            f"net, a {type(net).__name__}, lacks {len(missing)} modules that the saved "
            f"adapter changes, {sorted(missing)[:3]}; pass a network of the class and "
            f"depth that was saved"
        )


def _whole(alpha: float) -> float:
    """A ``lora_alpha`` without the rounding of ``alpha / r * r``."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """The values that differ from ``default``, in the order that PEFT needs.

    PEFT takes the first name that fits, and a name fits every other that ends with it.
    So longer names come first, and a module that ends like another is always named.
    """
    names = sorted(values, key=len, reverse=True)
    both = {n for n in names if _ends_of(n) & values.keys()}
    return {n: values[n] for n in names if values[n] != default or n in both}


def _ends_of(name: str) -> set[str]:
    """The dotted endings of a name, without the whole: "b.c" and "c" of "a.b.c"."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(1, len(parts))}
