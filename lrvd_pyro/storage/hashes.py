"""Hashes of a folder's files, in its config: a flipped bit is found and named."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["CONFIG", "check_hashes", "seal"]

CONFIG = "lrvd_config.json"


def seal(folder: Path) -> None:
    """Write the hash of every other file, and of the config itself, into the config.

    The SHA-256 of each file stands under "hashes"; that of the config's content, by
    sorted names and without the entry, under "hash".

    Args:
        folder: A folder with a config, which is written again.
    """
    path = folder / CONFIG
    config = json.loads(path.read_bytes())
    others = sorted(file for file in folder.iterdir() if file.name != CONFIG)
    config["hashes"] = {file.name: _hash(file.read_bytes()) for file in others}
    config["hash"] = _own_hash(config)
    path.write_text(json.dumps(config, indent=2))


def check_hashes(
    folder: Path, config: Mapping[str, Any], files: Mapping[str, bytes]
) -> None:
    """Raise a ValueError unless the files are those that the config was sealed with.

    Args:
        folder: The folder, for the message.
        config: Its config, of a format that has hashes.
        files: The contents of the other files, by name.
    """
    names = {"hash", "hashes"} - config.keys()
    hashes = config.get("hashes")
    if names or not isinstance(hashes, dict):
        raise ValueError(
            f"{folder / CONFIG} lacks {sorted(names) or 'a dict of hashes'}, so its "
            f"files cannot be checked; {_WAY_OUT}"
        )
    changed = [name for name in files if hashes.get(name) != _hash(files[name])]
    if config["hash"] != _own_hash(config):
        changed = [CONFIG]  # the hashes in it cannot be trusted either
    if changed:
        raise ValueError(
            f"{folder / changed[0]} is not the file that was written: its hash "
            f"differs; {_WAY_OUT}"
        )


_WAY_OUT = "copy the folder again, or write it again: save(path, model, guide)"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _own_hash(config: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in config.items() if name != "hash"}
    return _hash(json.dumps(rest, sort_keys=True).encode())
