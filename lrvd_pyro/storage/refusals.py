"""What keeps an adapter from being written: each refusal names the way out."""

import warnings
from collections import defaultdict
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from lrvd_pyro.models.base import RankModel
from lrvd_pyro.models.training_checks import moves_base
from lrvd_pyro.rank_space.base_buffers import base_buffers
from lrvd_pyro.rank_space.find import active_adapters, plain_net
from lrvd_pyro.storage.peft_files import adapter_state, live_config, plain_name

__all__ = [
    "refuse_merging_shared",
    "refuse_moved_buffers",
    "refuse_other_adapters",
    "refuse_what_no_adapter_holds",
    "warn_of_moved_buffers",
]


def refuse_other_adapters(model: RankModel) -> None:
    """Raise a ValueError if another adapter shapes the logits too."""
    active, adapter = active_adapters(model.base_net), model.space.adapter
    if active != [adapter]:
        raise ValueError(
            f"adapters {active} are active, but {adapter!r} alone would be "
            f"written; call net.set_adapter({adapter!r})"
        )


def refuse_what_no_adapter_holds(model: RankModel) -> None:
    """Raise a ValueError if base and adapter do not make the network."""
    net, adapter = model.base_net, model.space.adapter
    start = live_config(model).init_lora_weights
    if moves_base(start):
        raise ValueError(
            f"init_lora_weights={start!r} changed the base weights, and an adapter "
            f'does not bring them along; use export_peft(..., mode="merged")'
        )
    known = {*adapter_state(net, adapter).values(), *_idle(net)}
    outside = [
        name
        for name, parameter in net.named_parameters()
        if parameter.requires_grad and parameter not in known
    ]
    if outside:
        names = sorted({plain_name(n).rpartition(".")[0] for n in outside})
        raise ValueError(
            f"{names} train but belong to no adapter, so plain PEFT would not load "
            f"them; name them in LoraConfig(modules_to_save=...), or use "
            f'export_peft(..., mode="merged")'
        )


def refuse_merging_shared(model: RankModel) -> None:
    """Raise a ValueError if a merged weight would change another module too."""
    net, way_out = plain_net(model.base_net), 'use mode="pruned"'
    if live_config(model).layer_replication:
        raise ValueError(
            f"layer_replication shares the weights of layers, whose updates differ; "
            f"{way_out}"
        )
    owners = defaultdict(set)
    for name, parameter in net.named_parameters(remove_duplicate=False):
        owners[parameter].add(plain_name(name).rpartition(".")[0])
    for name in (*model.space.modules, *model.space.constants):
        weight = net.get_submodule(name).get_base_layer().weight
        if others := owners[weight] - {name}:
            raise ValueError(
                f"{name!r} shares its weight with {sorted(others)}, which the merged "
                f"update would change too; {way_out}, or untie the base's weights "
                f"before get_peft_model"
            )


def refuse_moved_buffers(model: RankModel) -> None:
    """Raise a ValueError if the base has other buffers than when the model was made."""
    if moved := _moved_buffers(model):
        raise ValueError(
            f"training moved {', '.join(moved[:3])} ({len(moved)} buffers) of the "
            f"base, which an adapter for plain PEFT does not hold; use "
            f'export_peft(..., mode="merged"), or train with their modules in '
            f"evaluation mode, net.eval(), or with LoraConfig(modules_to_save=[...])"
        )


def warn_of_moved_buffers(model: RankModel) -> None:
    """Warn the caller of `save` if plain PEFT will miss buffers that load restores."""
    if moved := _moved_buffers(model):
        warnings.warn(
            f"training moved {', '.join(moved[:3])} ({len(moved)} buffers) of the "
            f"base: lrvd_pyro.load restores them, and plain PEFT will load the folder "
            f"without them",
            stacklevel=3,
        )


def _moved_buffers(model: RankModel) -> list[str]:
    first = model.first_buffers
    return [
        name
        for name, buffer in base_buffers(model.base_net).items()
        if name not in first or not torch.equal(first[name].to(buffer), buffer)
    ]


def _idle(net: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of adapters that are not active where they stand."""
    for module in net.modules():
        if isinstance(module, LoraLayer):
            parts = [getattr(module, name) for name in module.adapter_layer_names]
        elif isinstance(module, ModulesToSaveWrapper):
            parts = [module.modules_to_save]
        else:
            continue
        for name, part in (pair for each in parts for pair in each.items()):
            if name not in module.active_adapters:
                yield from part.parameters()
