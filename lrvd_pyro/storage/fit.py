"""Whether tensors fit a folder's config, and the model that they are for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrvd_pyro.storage.config import Parts, joined
from lrvd_pyro.storage.peft_files import PREFIX, module_names, refuse_missing
from lrvd_pyro.storage.schema import short, some

__all__ = ["check_fit", "refuse_infinite", "unlike"]


def check_fit(
    folder: Path, config: Mapping[str, Any], parts: Parts, net: nn.Module
) -> None:
    """Raise unless the network has the saved modules, and the tensors their ranks.

    Nothing has been allocated for the ranks by then.

    Args:
        folder: The folder, for messages.
        config: The config that `save` wrote.
        parts: Its tensors, by part and name.
        net: The base network.

    Raises:
        ValueError: With what does not fit.
    """
    ranks = dict(zip(config["modules"], config["ranks"], strict=True))
    if not config["layer_replication"]:  # by which PEFT makes layers of new names
        refuse_missing(net, {*ranks, *config["constants"]} - {*module_names(net)})
    if unknown := {*config["frozen"]} - {*joined(parts)}:
        raise ValueError(
            f"{folder} lacks {short(sorted(unknown))}, of which it says that they do "
            f"not train: write the folder again, save(path, model, guide)"
        )
    dtypes = {name: str(tensor.dtype) for name, tensor in joined(parts).items()}
    if config["dtypes"] and config["dtypes"] != dtypes:
        differing = dict(config["dtypes"].items() ^ dtypes.items())
        raise ValueError(
            f"{folder} has tensors whose names or dtypes are not those of its config: "
            f"{some(sorted(differing))}; write the folder again: save(path, model, "
            f"guide)"
        )
    for name, rank in ranks.items():
        tensor = parts["net"].get(f"{PREFIX}{name}.lora_A.weight")
        if tensor is None or tensor.dim() < 2 or len(tensor) != rank:
            raise ValueError(
                f"{folder} has rank {rank} in {name!r}, and as its lora_A "
                f"{short(tensor)}; expected that many rows: write the folder again, "
                f"save(path, model, guide)"
            )


def refuse_infinite(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if a tensor that is to be written has NaN or infinity.

    Nobody could load it, and an earlier file, which is whole, would be lost.
    """
    if names := [name for name, tensor in tensors.items() if not _is_sound(tensor)]:
        raise ValueError(
            f"{some(names)}: NaN or infinity; expected finite numbers. Nothing was "
            f"written. Go back to where the run was sound: load(path, net) or "
            f"resume(path, ...)"
        )


def _is_sound(tensor: Tensor, like: Tensor | None = None) -> bool:
    """Whether there is no NaN, and in a parameter no infinity, as a mask may have.

    Args:
        tensor: The numbers.
        like: A tensor that is a parameter or is none, as this one is to be.
    """
    parameter = isinstance(tensor if like is None else like, nn.Parameter)
    bad = tensor.isfinite().logical_not() if parameter else tensor.isnan()
    return not bool(bad.any())


def unlike(saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> list[str]:
    """In words, where saved tensors cannot take the place of present ones.

    They need the names, the shapes, a precision of the same kind, and finite numbers.

    Args:
        saved: Tensors by name.
        present: Those whose place they take.
    """
    words = [f"{name} is missing" for name in present.keys() - saved.keys()]
    words += [f"{name} is one too many" for name in saved.keys() - present.keys()]
    for name in present.keys() & saved.keys():
        mine, theirs = present[name], saved[name]
        if mine.shape != theirs.shape or _kind(mine) != _kind(theirs):
            words.append(f"{name} is {short(theirs)}, expected {short(mine)}")
        elif not _is_sound(theirs, like=mine):
            words.append(f"{name} has NaN or infinity, expected finite numbers")
    return sorted(words)


def _kind(tensor: Tensor) -> object:
    """Floating point of any precision; else the exact type."""
    return "float" if tensor.is_floating_point() else tensor.dtype
