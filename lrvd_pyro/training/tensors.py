"""The tensors of a model and its guide by name, and whether saved ones fit them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrvd_pyro._compat.torch import persistent_buffers
from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.inference.pairs import paired
from lrvd_pyro.inference.param_store import check_has_parameters
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.rank_space.center import center_at, center_of
from lrvd_pyro.rank_space.find import plain_net
from lrvd_pyro.rank_space.removal import Cuts
from lrvd_pyro.selection.removal import check_pair
from lrvd_pyro.storage.embeddings import way_out
from lrvd_pyro.storage.fingerprint import Fingerprint, differences, fingerprint
from lrvd_pyro.storage.peft_files import adapter_state, plain_name
from lrvd_pyro.storage.schema import some

__all__ = [
    "Layout",
    "base_of",
    "check_layout",
    "compare_base",
    "layout_of",
    "ranks_left",
    "room_for_centers",
    "stored_tensors",
]

Layout = dict[str, tuple[str, tuple[int, ...], bool]]  # dtype, shape, whether it trains

_AS_THEN = (
    "Make net, prior, likelihood, model and guide as for the run that wrote it, before "
    "any pruning, and call resume with them"
)


def stored_tensors(model: RankModel, guide: nn.Module) -> dict[str, Tensor]:
    """The tensors of model and guide that training may change, by name.

    These are trainable parameters, adapter weights, persistent buffers, and everything
    of prior, likelihood and guide. Frozen adapter weights are among them, since they
    may be random.

    Raises:
        TypeError: If ``guide`` is a function.
        ValueError: If ``guide`` was built on another model, or is an AutoGuide that has
            no parameters yet.
    """
    instead = "checkpoints take a module: RankDiagonal(model), or any AutoGuide"
    check_has_parameters(guide, "checkpoint and resume", instead)
    paired(model, guide)
    tensors: dict[str, Tensor] = {}
    for root, module in (("model", model), ("guide", guide)):
        for name, parameter in module.named_parameters(root):
            in_base = name.startswith("model.net.") and "lora_" not in name
            if parameter.requires_grad or not in_base:
                tensors[name] = parameter
        # Buffers of the base too: running statistics change in every forward pass.
        for name, part in module.named_modules(prefix=root):
            for key, buffer in persistent_buffers(part):
                tensors[f"{name}.{key}"] = buffer
    return tensors


def room_for_centers(model: RankModel, saved: Layout) -> None:
    """Give gates that act about 0 a center at 0, if those of the saved run had one.

    The center's buffers can then be restored as any tensor.
    """
    had = any(name.endswith(".center") for name in saved)
    if had and not center_of(model.space):
        center_at(model.space, torch.zeros(model.space.size))


def layout_of(
    tensors: Mapping[str, Tensor], cuts: Cuts, freezing: Collection[Tensor] = ()
) -> Layout:
    """Give the data type of each tensor, its shape after cuts, and whether it trains.

    Args:
        tensors: The tensors by name.
        cuts: For some of them the dimension to slice, and the indices that stay.
        freezing: Tensors that do not train any more after the cuts.
    """
    layout: Layout = {}
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if tensor in cuts:
            dim, index = cuts[tensor]
            shape[dim] = len(index)
        trains = tensor.requires_grad and tensor not in freezing
        layout[name] = str(tensor.dtype), tuple(shape), trains
    return layout


def ranks_left(path: Path, model: RankModel, saved: Mapping[str, Any]) -> Tensor:
    """Tell which of the model's rank components a checkpoint has, bool (R,).

    Raises:
        ValueError: If it has others too.
    """
    space = model.space
    there = dict(zip(saved["modules"], saved["ranks"]))
    here = dict(zip(space.modules, space.ranks))
    if here == there:
        return torch.ones(space.size, dtype=torch.bool)
    left = set(saved["origin"])
    keep = torch.tensor([number in left for number in space.origin])
    after = space.after(keep)
    if dict(zip(after.modules, after.ranks)) != there:
        names = [n for n in there | here if here.get(n) != there.get(n)]
        unlike = (f"{n} {there.get(n, 0)}, here {here.get(n, 0)}" for n in names)
        raise ValueError(
            f"{path} has other rank components than this model can be pruned to: "
            f"{some(unlike)}. {_AS_THEN}"
        )
    return keep


def check_layout(
    path: Path,
    model: RankModel,
    guide: nn.Module,
    keep: Tensor,
    present: Mapping[str, Tensor],
    saved: Layout,
) -> dict[str, Tensor]:
    """Find the tensors that stay with some rank components; nothing is removed yet.

    Args:
        path: The checkpoint's path, for the message.
        model: The model.
        guide: Its guide.
        keep: Which components stay, bool (R,).
        present: The tensors of model and guide by name.
        saved: The layout in the checkpoint.

    Returns:
        The tensors that stay, by name.

    Raises:
        ValueError: If their layout after the removal is not that of the checkpoint.
        TypeError: If ranks are to be removed and the guide is not a `RankGuide`.
    """
    cuts: Cuts = {}
    leaving: set[Tensor] = set()
    freezing: set[Tensor] = set()
    if not keep.all():
        rank_guide: Any = guide  # check_pair refuses any other kind
        check_pair(model, rank_guide)
        cuts, leaving, freezing = _removal(model, rank_guide, keep)
    staying = {name: t for name, t in present.items() if t not in leaving}
    here = layout_of(staying, cuts, freezing)
    saved = {name: (d, tuple(shape), t) for name, (d, shape, t) in saved.items()}
    if names := [n for n in saved | here if here.get(n) != saved.get(n)]:
        unlike = (f"{n} {saved.get(n)}, here {here.get(n)}" for n in names)
        raise ValueError(
            f"{path} does not fit this model and guide in (dtype, shape, trains): "
            f"{some(unlike)}. {_AS_THEN}"
        )
    return staying


def base_of(model: RankModel) -> Fingerprint:
    """The fingerprint of the frozen base."""
    return fingerprint(model.base_net, _trained(model))


def compare_base(path: Path, model: RankModel, saved: Fingerprint) -> None:
    """Raise unless the frozen base is the one that a checkpoint was trained on.

    Raises:
        ValueError: If it is another.
    """
    if unlike := differences(model.base_net, saved, _trained(model)):
        raise ValueError(
            f"{path} was trained on another base: {some(unlike)}. Make net on that one,"
            f" by the same from_pretrained(...), and call resume again; to go on with "
            f"this base all the same: resume(..., check_base=False)"
            f"{way_out(model.base_net, unlike)}"
        )


def _trained(model: RankModel) -> set[str]:
    """The base's parameters that train, in place or as a copy, by their plain names."""
    state = adapter_state(model.base_net, model.space.adapter)
    named = [*plain_net(model.base_net).named_parameters(), *state.items()]
    return {plain_name(name) for name, tensor in named if tensor.requires_grad}


def _removal(
    model: RankModel, guide: RankGuide, keep: Tensor
) -> tuple[Cuts, set[Tensor], set[Tensor]]:
    """What `lrvd_pyro.selection.select` would do: cuts, tensors to leave, to freeze."""
    space = model.space
    leaving: set[Tensor] = set()
    freezing: set[Tensor] = set()
    cuts = space.cuts(keep) | guide.cuts(keep) | model.cuts(keep)
    for layer, kept in zip(space.layers, space.split(keep).values()):
        if kept.any():
            continue
        bias: Any = layer.lora_B[space.adapter].bias
        for side in (layer.lora_A, layer.lora_B):
            leaving.update(side[space.adapter].parameters())
            leaving.update(side[space.adapter].buffers())
        if bias is not None:  # it stays as a constant
            leaving.remove(bias)
            freezing.add(bias)
    return cuts, leaving, freezing
