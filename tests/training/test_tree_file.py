"""A checkpoint's file: damage is named, and earlier versions are read."""

import json
import warnings
from pathlib import Path

import pytest
import runs
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lrvd_pyro.training import tree_file
from lrvd_pyro.training.checkpoints import resume


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    runs.begun(path, steps=2)
    whole = path.read_bytes()
    run = runs.started("svi")
    before = runs.everything(run)
    for i in range(40):
        place = len(whole) * i // 40
        flipped = bytes([whole[place] ^ (1 << i % 8)])
        path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
        with pytest.raises(ValueError, match="run.safetensors (is|has)"):
            resume(path, **run)
    assert runs.everything(run) == before


def test_a_checkpoint_of_an_earlier_version_loads_with_one_warning(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.safetensors"
    runs.begun(path, steps=2)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    del header["hash"]
    save_file(load_file(path), path, metadata=header | {"version": "2"})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        resume(path, **runs.started("svi"))
    assert [str(w.message).count("without a hash of its content") for w in seen] == [1]


@pytest.mark.parametrize("version", ["1", "2"])
def test_an_earlier_version_without_its_entries_is_refused(
    version: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    runs.begun(path, steps=1)
    tree, _ = tree_file.read(path)
    del tree["optimizer" if version == "2" else "schedule"]
    tree_file.write(path, tree)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    del header["hash"]
    save_file(load_file(path), path, metadata=header | {"version": version})
    with pytest.warns(UserWarning, match="without a hash of its content"):
        with pytest.raises(ValueError, match=f"has no state of version {version}: Key"):
            resume(path, **runs.started("svi"))


def test_a_deep_header_is_damage_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    runs.begun(path, steps=1)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    header["content"] = "[" * 100_000
    save_file(load_file(path), path, metadata=header | {"hash": "0"})
    with pytest.raises(ValueError, match="is damaged"):
        resume(path, **runs.started("svi"))
    header["content"] = json.dumps({"dict": 3})
    save_file(load_file(path), path, metadata=header)
    with pytest.raises(ValueError, match="is damaged"):
        resume(path, **runs.started("svi"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 20, "it has 20 bytes and a header of"),
        (b"\x04" + bytes(7) + b"nope", "its header is no JSON"),
        (
            b"\x1d" + bytes(7) + b'{"__metadata__":{"format":1}}',
            "its header's metadata are no texts",
        ),
    ],
)
def test_bytes_that_are_no_checkpoint_are_named(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"is damaged: {message}"):
        resume(path, **runs.started("svi"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": 2}', r"a node has the names \['a', 'b'\], and not one"),
        ('{"dict": [3]}', "a node 'dict' is not as written"),
        ('{"other": []}', "a node 'other' is not as written"),
    ],
)
def test_nodes_that_are_none_are_named(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    header = {"format": tree_file.FORMAT, "version": "2", "content": content}
    save_file({"x": torch.ones(1)}, path, metadata=header)
    with pytest.warns(UserWarning, match="without a hash"):
        with pytest.raises(ValueError, match=f"is damaged: {message}"):
            resume(path, **runs.started("svi"))
