"""One safetensors file for nested dicts and lists of numbers, texts and tensors.

The tensors are tensors of the file; everything else is JSON in its header. Nothing is
ever looked up by name or run, so a file from a stranger is safe to read.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lrvd_pyro.storage.atomic import written_file

__all__ = ["FORMAT", "read", "write"]

FORMAT = "lrvd_pyro checkpoint"

_VERSION = 2


def write(path: Path, tree: object) -> None:
    """Write a tree to a file, which is then whole, or after a kill as it was before.

    Raises:
        TypeError: If the tree holds anything but dicts, lists, tuples, numbers, texts,
            None and tensors.
        ValueError: If ``path`` is a folder.
        OSError: If the disk is full or read-only, or the file cannot be written.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; give the path of a file: "
            f'checkpoint("{path}/run.safetensors", ...)'
        )
    tensors: dict[str, Tensor] = {}
    content = json.dumps(_pack(tree, tensors))
    header = {"format": FORMAT, "version": str(_VERSION), "content": content}
    with written_file(path) as partial:
        # Not by save_file, whose own temporary file would outlive a kill.
        partial.write_bytes(save(tensors, header))


def read(path: Path) -> tuple[Any, int]:
    """Read the tree in a file, with tensors on the CPU, and the format's version.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is damaged, is something else, or has a newer format.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; expected a file that checkpoint(path, ...) "
            f"wrote. Where a run may be new: if path.exists(): resume(path, ...)"
        )
    try:
        # Once: a second look may see the file of a later write.
        content = path.read_bytes()
        tensors = load(content)
        header = _metadata(content)
        _check_format(path, header)
        return _unpack(json.loads(header["content"]), tensors), int(header["version"])
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; expected the whole file that checkpoint(path,"
            f" ...) wrote. Copy it again, or resume an earlier one"
        ) from error


def _pack(tree: object, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Give a tree as JSON, and add its tensors to ``tensors`` under their paths.

    Raises:
        TypeError: With the path of an element of another type.
    """
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Tensor):
        # Two paths may be equal as texts, of the keys 2 and "2".
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        tensors[name] = tree.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(tree, dict):
        # As pairs: JSON turns every key into a text, and optimizers have numbers.
        items = [(k, f"{path}/{k}" if path else str(k), v) for k, v in tree.items()]
        return {
            "dict": [[_pack(k, tensors), _pack(v, tensors, at)] for k, at, v in items]
        }
    if isinstance(tree, list | tuple):
        items = [_pack(v, tensors, f"{path}/{i}") for i, v in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    raise TypeError(
        f"{path} is a {type(tree).__name__}; a checkpoint holds dicts, lists and "
        f"tuples of numbers, texts, None and tensors: convert it, torch.as_tensor(...)"
    )


def _unpack(tree: object, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_pack`; subclasses of dict, list and tuple come back as plain."""
    if isinstance(tree, list):
        return [_unpack(element, tensors) for element in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(element, tensors) for element in content)
    return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}


def _metadata(content: bytes) -> dict[str, str]:
    """The texts in the header of a safetensors file, which `load` leaves out."""
    size = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    return header.get("__metadata__") or {}


def _check_format(path: Path, header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is another safetensors file; expected one that checkpoint(path, "
            f"...) wrote"
        )
    if int(header["version"]) > _VERSION:
        raise ValueError(
            f"{path} has format version {header['version']}; this lrvd_pyro reads up "
            f"to {_VERSION}: pip install -U lrvd_pyro"
        )
