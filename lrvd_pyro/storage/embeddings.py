"""Embeddings with more or fewer rows than those of the base as others load it.

After ``resize_token_embeddings`` the new rows are random, so the base's files do not
give them. An adapter brings such embeddings along, as PEFT's own files do.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lrvd_pyro.rank_space.find import plain_net
from lrvd_pyro.rank_space.names import is_adapters, plain_name

__all__ = [
    "base_vocabulary",
    "embeddings",
    "refuse_other_rows",
    "resized_embeddings",
    "way_out",
]


def resized_embeddings(net: nn.Module) -> dict[str, Tensor]:
    """The base's `embeddings` if their rows are others than its files have, else none.

    Args:
        net: A network, with PEFT or without.
    """
    base = plain_net(net)
    then = base_vocabulary(base)
    same = then is None or then == base.config.get_text_config().vocab_size
    return {} if same else embeddings(net)


def embeddings(net: nn.Module) -> dict[str, Tensor]:
    """The parameters of the base's embeddings and head of tokens, uncopied.

    Names are those of the network without PEFT. A shared weight has both its names.

    Args:
        net: A network, with PEFT or without.
    """
    base = plain_net(net)
    if not isinstance(base, PreTrainedModel):
        return {}
    try:
        ends = {base.get_input_embeddings(), base.get_output_embeddings()}
    except NotImplementedError:  # a network that reads no tokens
        return {}
    return {
        plain_name(f"{name}.{key}"): parameter
        for name, module in base.named_modules()
        if module in ends
        for key, parameter in module.named_parameters()
        if not is_adapters(key)
    }


def refuse_other_rows(
    folder: Path, net: nn.Module, saved: Mapping[str, Tensor]
) -> None:
    """Raise a ValueError if a base's embeddings have other rows than the saved ones.

    Args:
        folder: The folder of the saved ones, for the message.
        net: The base, without PEFT.
        saved: The saved tensors by their names in the network without PEFT.
    """
    for name, here in embeddings(net).items():
        if name in saved and (rows := len(saved[name])) != len(here):
            raise ValueError(
                f"{name} has {len(here)} rows, and {folder} was saved with {rows}; "
                f"call net.resize_token_embeddings({rows}) before load"
            )


def way_out(net: nn.Module, unlike: Iterable[str]) -> str:
    """Say what to do where embeddings are among the differences; empty elsewhere.

    Args:
        net: The network, with PEFT or without.
        unlike: The differences in words, each with the name first.
    """
    names = {text.partition(" ")[0] for text in unlike} & {*embeddings(net)}
    if not names:
        return ""
    return (
        f". If resize_token_embeddings made {min(names)}, its new rows are random: "
        f"make them the same by torch.manual_seed, or let the adapter hold them, "
        f"LoraConfig(modules_to_save=['embed_tokens'])"
    )


def base_vocabulary(base: nn.Module) -> int | None:
    """How many tokens a network had where it was loaded from; None if unknown.

    The Hugging Face Hub is not asked: the folder is a local one, or in the cache.

    Args:
        base: The network without PEFT.
    """
    if not isinstance(base, PreTrainedModel) or not base.config.name_or_path:
        return None
    try:
        stored: Any = type(base.config).from_pretrained(
            base.config.name_or_path, local_files_only=True
        )
        size: int | None = stored.get_text_config().vocab_size
    except (OSError, ValueError, AttributeError):  # no such files, or without tokens
        return None
    return size
