"""One safetensors file for nested dicts and lists of numbers, texts and tensors.

The tensors are tensors of the file; everything else is JSON in its header. Nothing is
ever looked up by name or run, so a file from a stranger is safe to read.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from lrvd_pyro.storage.atomic import written_file

__all__ = ["FORMAT", "read", "write"]

FORMAT = "lrvd_pyro checkpoint"

_VERSION, _HASHED = 3, 3  # the present format, and the first with a hash


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
    header["hash"] = _hash(content, tensors)
    with written_file(path) as partial:
        # Not by save_file, whose own temporary file would outlive a kill.
        partial.write_bytes(tensor_bytes(tensors, header))


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
    content = path.read_bytes()  # once: another process may replace the file
    try:
        header = _header(content)
        version = _version(path, header)
        tensors = load_tensors(content)
        _check_hash(path, version, header, tensors)
        return _unpack(json.loads(header["content"]), tensors), version
    except (SafetensorError, LookupError, TypeError, RecursionError, _Damage) as error:
        raise _damaged(path, error) from error
    except json.JSONDecodeError as error:
        raise _damaged(path, error) from error


class _Damage(Exception):
    """What is wrong with a file's bytes."""


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{path} is damaged: {reason}; expected the whole file that checkpoint(path, "
        f"...) wrote. Copy it again, or resume an earlier one"
    )


def _header(content: bytes) -> dict[str, str]:
    """The metadata in a safetensors file: its JSON begins after 8 bytes of length."""
    end = 8 + int.from_bytes(content[:8], "little")
    if not 8 < end <= len(content):
        raise _Damage(f"it has {len(content)} bytes and a header of {end}")
    try:
        header = json.loads(content[8:end])
    except ValueError as error:
        raise _Damage(f"its header is no JSON: {error}") from error
    found = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(found, dict) or not all(
        isinstance(v, str) for v in found.values()
    ):
        raise _Damage("its header's metadata are no texts")
    return found


def _check_hash(
    path: Path, version: int, header: dict[str, str], tensors: dict[str, Tensor]
) -> None:
    if version < _HASHED and "hash" not in header:
        warnings.warn(
            f"{path} was written by an earlier version, without a hash of its content: "
            f"damage may go unseen; call checkpoint(path, ...) to write it again",
            stacklevel=4,
        )
    elif header["hash"] != _hash(header["content"], tensors):
        raise _Damage("its hash differs from that of its content")


def _hash(content: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the JSON and of each tensor: name, kind, shape and bytes."""
    found = hashlib.sha256(content.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), [*tensor.shape]]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


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
    if len(tree) != 1:
        raise _Damage(f"a node has the names {sorted(tree)}, and not one of them")
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(element, tensors) for element in content)
    if kind == "dict" and all(isinstance(i, list) and len(i) == 2 for i in content):
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
    raise _Damage(f"a node {kind!r} is not as written")


def _version(path: Path, header: dict[str, str]) -> int:
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is another safetensors file; expected one that checkpoint(path, "
            f"...) wrote"
        )
    if header["version"] not in map(str, range(1, _VERSION + 1)):
        raise ValueError(
            f"{path} has format version {header['version']:.20}; this lrvd_pyro reads "
            f"up to {_VERSION}: pip install -U lrvd_pyro"
        )
    return int(header["version"])
