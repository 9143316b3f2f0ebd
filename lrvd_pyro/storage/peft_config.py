"""PEFT's ``adapter_config.json`` from a stranger: only known fields of known kinds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType

from lrvd_pyro.storage.schema import (
    Check,
    Misfit,
    flag,
    list_of,
    number,
    optional,
    short,
    text,
    whole,
)

__all__ = ["read_adapter_config"]


def _task(value: object, place: str) -> None:
    if value not in [task.value for task in TaskType]:
        raise Misfit(place, value, f"one of {[task.value for task in TaskType]}")


def _bias(value: object, place: str) -> None:
    if value not in ("none", "all", "lora_only"):
        raise Misfit(place, value, "'none', 'all' or 'lora_only'")


def _share(value: Any, place: str) -> None:
    number(value, place)
    if not 0 <= value <= 1:
        raise Misfit(place, value, "a number from 0 to 1")


def _tokens(value: object, place: str) -> None:
    for name, indices in (value if isinstance(value, dict) else {"": value}).items():
        list_of(whole(0))(indices, f"{place}[{name!r}]")


# What `load` takes over.
_TAKEN: dict[str, Check] = {
    "task_type": optional(_task),
    "lora_dropout": _share,
    "fan_in_fan_out": flag,
    "bias": _bias,
    "use_dora": flag,
    "lora_bias": flag,
    "modules_to_save": optional(list_of(text)),
    "trainable_token_indices": optional(_tokens),
    "ensure_weight_tying": flag,
    "use_qalora": flag,
    "qalora_group_size": whole(1),
}
# What ``lrvd_config.json`` says by itself, or `load` has no use for.
_LEFT_OUT = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path"}
_LEFT_OUT |= {"revision", "inference_mode", "r", "lora_alpha", "rank_pattern"}
_LEFT_OUT |= {"alpha_pattern", "target_modules", "exclude_modules", "use_rslora"}
_LEFT_OUT |= {"init_lora_weights", "runtime_config"}


def read_adapter_config(
    path: Path, stored: Mapping[str, Any], replication: Any
) -> LoraConfig:
    """Make PEFT's config from the fields that `load` takes over.

    PEFT imports what ``megatron_core`` names, rebuilds the network by
    ``layer_replication`` and reads names as regular expressions: a whole config from a
    stranger is a program.

    Args:
        path: The file, for messages.
        stored: Its content.
        replication: The ``layer_replication`` that ``lrvd_config.json`` has.

    Raises:
        ValueError: If the adapter is not LoRA, or a field has another kind or is none
            that `load` can restore.
    """
    if stored.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} is of type {short(stored.get('peft_type'))}; expected 'LORA': "
            f"write the folder again, save(path, model, guide)"
        )
    usual = vars(LoraConfig()) | {"layer_replication": replication}
    for name, value in stored.items():
        unset = not value or value == usual.get(name)
        if name not in _LEFT_OUT and name not in _TAKEN and not unset:
            raise ValueError(
                f"{path} sets {short(name)} to {short(value)}, which load does not "
                f"restore; remove the entry if the adapter does without it"
            )
    taken = {name: stored[name] for name in _TAKEN if name in stored}
    try:
        for name, value in taken.items():
            _TAKEN[name](value, name)
    except Misfit as error:
        raise ValueError(
            f"{path}: {error}; write the folder again: save(path, model, guide)"
        ) from None
    return LoraConfig(**taken, layer_replication=replication)
