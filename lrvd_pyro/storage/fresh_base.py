"""The base of an export, as whoever loads the export has it."""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lrvd_pyro._compat.peft import unloaded
from lrvd_pyro._compat.transformers import attention_implementation
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.rank_space.base_buffers import base_buffers
from lrvd_pyro.rank_space.find import plain_net
from lrvd_pyro.storage.embeddings import base_vocabulary, resized_embeddings
from lrvd_pyro.storage.fingerprint import differences, fingerprint
from lrvd_pyro.storage.peft_files import adapter_state, plain_name

__all__ = ["fresh_base"]


def fresh_base(model: RankModel) -> Any:
    """Make the base of a model without anything that training gave it.

    It comes from the local folder that the network was loaded from. Where there is
    none, it is a copy of the network, with the buffers that it had when the model was
    made.

    Args:
        model: The model; its network stays as it is.

    Raises:
        ValueError: If the local folder holds another base.
    """
    net = model.base_net
    adapter = adapter_state(net, model.space.adapter)
    held = {plain_name(name) for name in (*adapter, *resized_embeddings(net))}
    if folder := _folder_of(plain_net(net)):
        return _loaded(folder, net, held)
    base = unloaded(copy.deepcopy(net))
    with torch.no_grad():
        for name, buffer in base_buffers(base).items():
            if name in model.first_buffers:
                buffer.copy_(model.first_buffers[name])
        # On trained values nobody would notice that the export lacks one of these.
        for name, parameter in base.named_parameters(remove_duplicate=False):
            if name in held:
                parameter.zero_()
    return base


def _folder_of(net: nn.Module) -> Path | None:
    """The local folder with the weights that a network was loaded from."""
    if not isinstance(net, PreTrainedModel) or not net.config.name_or_path:
        return None
    folder = Path(net.config.name_or_path)
    # What loads again as it is: quantized weights may be packed by the first pass.
    packed = hasattr(net.config, "quantization_config")
    return folder if any(folder.glob("model*.safetensors")) and not packed else None


def _loaded(folder: Path, adapted: nn.Module, held: Collection[str]) -> Any:
    net = plain_net(adapted)
    attention, config = attention_implementation(net), copy.deepcopy(net.config)
    options: dict[str, Any] = {"dtype": net.dtype, "attn_implementation": attention}
    then, now = base_vocabulary(net), getattr(config.get_text_config(), "vocab_size", 0)
    resized = then is not None and then != now
    if resized:
        config.get_text_config().vocab_size = then
    base: Any = type(net).from_pretrained(
        folder, config=config, ignore_mismatched_sizes=True, **options
    )
    if resized:
        base.resize_token_embeddings(now)
    present = fingerprint(adapted, held)
    if unlike := differences(base, present, held):
        raise ValueError(
            f"the network is not the base in {folder}, from which others will load it: "
            f"{'; '.join(unlike[:3])} ({len(unlike)} differences). Nothing was "
            f'written; use export_peft(..., mode="merged"), name parts that the folder '
            f"lacks in LoraConfig(modules_to_save=...), or save the changed base to a "
            f"folder and make the network from there"
        )
    return base.to(net.device)
