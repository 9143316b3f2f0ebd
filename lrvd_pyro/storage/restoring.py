"""Saved tensors in the place of those of a model that was made again."""

import warnings
from pathlib import Path

from torch import nn

from lrvd_pyro.storage.config import Parts, joined
from lrvd_pyro.storage.fit import unlike
from lrvd_pyro.storage.schema import some

__all__ = ["match_base", "restore"]


def match_base(parts: Parts, saved: Parts) -> None:
    """Leave out tensors of the base that are not to be restored, in place.

    Folders before format 3 have none. Another base, as one that is not quantized, may
    have others: then those that fit are restored.
    """
    mine, theirs = parts["base"], saved["base"]
    both = mine.keys() & theirs.keys()
    fitting = {name for name in both if mine[name].shape == theirs[name].shape}
    parts["base"] = {name: mine[name] for name in fitting}
    saved["base"] = {name: theirs[name] for name in fitting}


def restore(path: Path, parts: Parts, saved: Parts, frozen: set[str]) -> None:
    """Give the tensors the saved values; every check comes before the first write.

    Args:
        path: The file, for messages.
        parts: The tensors of the model and guide, by part and name.
        saved: Those of the file.
        frozen: Names of parameters that do not train.

    Raises:
        ValueError: If names, shapes or kinds of numbers differ.

    Warns:
        UserWarning: If the base has buffers that were not saved.
    """
    _leave_new_buffers(path, parts, saved)
    present, stored = joined(parts), joined(saved)
    if wrong := unlike(stored, present):
        raise ValueError(
            f"{path} does not fit this model and guide: {some(wrong)}; "
            f"pass net, prior, likelihood and guide as they were saved, or write the "
            f"folder again: save(path, model, guide)"
        )
    for name, tensor in present.items():
        # By .data, for the precision that was saved: copy_ would keep the present one.
        # The base keeps its own.
        dtype = tensor.dtype if name.startswith("base.") else stored[name].dtype
        tensor.data = stored[name].to(tensor.device, dtype)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(name not in frozen)


def _leave_new_buffers(path: Path, parts: Parts, saved: Parts) -> None:
    """Leave buffers of the base that were not saved as they are, and say so."""
    if new := sorted(parts["base"].keys() - saved["base"].keys()):
        warnings.warn(
            f"{path} has no values for {some(new)}, buffers that net has beyond the "
            f"base that was saved; they stay as they are",
            stacklevel=4,
        )
        parts["base"] = {n: t for n, t in parts["base"].items() if n not in new}
