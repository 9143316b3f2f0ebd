"""One safetensors file for nested dicts and lists of numbers, texts and tensors.

The tensors are the file's own; everything else is JSON in its header. Nothing is ever
looked up by name or run, so that such a file can be read from a stranger.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrvd_pyro.storage.atomic import sync

FORMAT = "lrvd_pyro checkpoint"
VERSION = 2


def write(path: Path, tree: Any) -> None:
    """Put a tree into a file, which is there whole or as it was before.

    Raises:
        TypeError: If the tree holds anything but dicts, lists, tuples, numbers, texts,
            None and tensors.
        ValueError: If ``path`` is a folder.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; give the path of a file: "
            f'checkpoint("{path}/run.safetensors", ...)'
        )
    tensors: dict[str, Tensor] = {}
    content = json.dumps(pack(tree, tensors))
    header = {"format": FORMAT, "version": str(VERSION), "content": content}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata=header)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[Any, int]:
    """The tree in a file, its tensors on the CPU, and the version of its format.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is damaged, something else, or of a newer format.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; expected a file that checkpoint(path, ...) "
            f"wrote. Where a run may be new: if path.exists(): resume(path, ...)"
        )
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            _check_format(path, header)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        return unpack(json.loads(header["content"]), tensors), int(header["version"])
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; expected the whole file that checkpoint(path,"
            f" ...) wrote. Copy it anew, or resume an earlier one"
        ) from error


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """A tree as JSON; its tensors are added to ``tensors`` under their paths in it.

    Raises:
        TypeError: With the path of what fits into no such tree.
    """
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Tensor):
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        tensors[name] = tree.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(tree, dict):
        items = [(k, f"{path}/{k}" if path else str(k), v) for k, v in tree.items()]
        return {
            "dict": [[pack(k, tensors), pack(v, tensors, at)] for k, at, v in items]
        }
    if isinstance(tree, list | tuple):
        items = [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    raise TypeError(
        f"{path} is a {type(tree).__name__}; a checkpoint holds dicts, lists and "
        f"tuples of numbers, texts, None and tensors: convert it, torch.as_tensor(...)"
    )


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given; dicts, lists and tuples of other kinds as plain ones."""
    if isinstance(tree, list):
        return [unpack(element, tensors) for element in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(unpack(element, tensors) for element in content)
    return {unpack(k, tensors): unpack(v, tensors) for k, v in content}


def _check_format(path: Path, header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is another safetensors file; expected one that checkpoint(path, "
            f"...) wrote"
        )
    if int(header["version"]) > VERSION:
        raise ValueError(
            f"{path} is of format version {header['version']}; this lrvd_pyro reads up "
            f"to {VERSION}: pip install -U lrvd_pyro"
        )
