"""Hostile files: damage, and the edits of a stranger who recomputes the hashes.

A folder of `lrvd_pyro.save` and a file of `lrvd_pyro.checkpoint` are edited in place.
Each mutation says in words what it did. A new mutation is one more entry of FOLDER or
CHECKPOINT. Kinds in DAMAGE leave the hashes as they were.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fault_trees import ENDLESS, TENSOR_EDITS, TREE_EDITS, TWIN, Edit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lrvd_pyro.storage.hashes import seal
from lrvd_pyro.training import tree_file

# What was written, and what another run wrote of the same kind.
Mutation = Callable[[Path, Path, Random], str]

CONFIGS = ("lrvd_config.json", "adapter_config.json")
TENSORS = ("lrvd_posterior.safetensors", "adapter_model.safetensors")
STRANGER = "megatron.stranger"  # a module that leaves a trace when it is imported
# The fields that a stranger sets in ``adapter_config.json``, one at a time.
FIELDS: list[dict[str, Any]] = [
    {"megatron_config": {"a": 1}, "megatron_core": STRANGER},
    {"auto_mapping": {"base_model_class": "Any", "parent_library": STRANGER}},
    {"layer_replication": [[0, 2]] * 3},
    {"target_modules": ENDLESS},
    {"target_modules": "all-linear"},
    {"target_modules": ["out"], "layers_to_transform": [0], "layers_pattern": ENDLESS},
    {"exclude_modules": ENDLESS},
    {"r": 10**7},
    {"r": 0},
    {"lora_alpha": "x"},
    {"lora_alpha": math.nan},
    {"lora_dropout": math.nan},
    {"lora_dropout": 0.5},
    {"modules_to_save": ["norm", "__class__", "../x"]},
    {"modules_to_save": ["hidden"]},
    {"trainable_token_indices": [0, 1]},
    {"trainable_token_indices": {"hidden": [0]}},
    {"target_parameters": ["hidden.weight"]},
    {"rank_pattern": {ENDLESS: 2}, "alpha_pattern": {ENDLESS: 2}},
    {"bias": "all"},
    {"bias": "evil"},
    {"lora_bias": True},
    {"use_dora": True},
    {"use_rslora": True},
    {"fan_in_fan_out": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    {"use_qalora": True, "qalora_group_size": 0},
    {"use_bdlora": {"a": 1}},
    {"alora_invocation_tokens": [1]},
    {"arrow_config": {"top_k": 3}},
    {"runtime_config": {"ephemeral_gpu_offload": True}},
    {"peft_type": "IA3"},
    {"peft_type": "../x"},
    {"task_type": "CAUSAL_LM"},
    {"inference_mode": "x"},
    {"base_model_name_or_path": "../../etc", "revision": "x"},
]
_NORMAL = "torch.distributions.Normal"
# Descriptions of a distribution, for any argument in ``lrvd_config.json``.
DESCRIPTIONS: list[Any] = [
    {"instance": "torch.distributions.LKJCholesky", "keywords": {"dim": 10**7}},
    {"instance": _NORMAL, "keywords": {"loc": 0, "scale": -1}},
    {"instance": _NORMAL, "keywords": {"loc": 0, "scale": math.nan}},
    {"instance": _NORMAL, "keywords": {"loc": [0] * 5, "scale": 1}},
    {"instance": _NORMAL, "keywords": {"surprise": 1}},
    {"instance": "torch.distributions.Distribution", "keywords": {}},
    {"instance": "torch.distributions.Categorical", "keywords": {"probs": [1, -1]}},
    {"instance": "pyro.distributions.Delta", "keywords": {"v": 1}},
    {"instance": "os.system", "keywords": {"command": "false"}},
    {"instance": "torch.distributions.kl.os.system", "keywords": {}},
    {"class": STRANGER},
    {"class": "builtins.exec"},
    {"class": _NORMAL},
    {"class": 5},
    {"partial": _NORMAL, "args": [{"unstorable": "x"}], "keywords": {}},
    {"partial": _NORMAL, "args": 3, "keywords": {}},
    {"partial": _NORMAL, "args": [], "keywords": "x"},
    {"unstorable": "x"},
    {},
]


def flipped(path: Path, rng: Random) -> str:
    """One bit of a file turned."""
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name}, byte {place} of {len(content)}, bit {bit}"


def truncated(path: Path, rng: Random) -> str:
    """The end of a file lost."""
    content = path.read_bytes()
    left = rng.choice([0, rng.randrange(len(content)), len(content) - 1])
    path.write_bytes(content[:left])
    return f"{path.name}, {left} of {len(content)} bytes"


def appended(path: Path, rng: Random) -> str:
    """Bytes after the end of a file."""
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 8, 1000])))
    return path.name


def missing(path: Path, rng: Random) -> str:
    """A file that is not there, or is a folder."""
    path.unlink()
    if rng.random() < 0.3:
        path.mkdir()
    return path.name


FILE_DAMAGE: dict[str, Callable[[Path, Random], str]] = {
    "flipped bit": flipped,
    "truncated": truncated,
    "bytes appended": appended,
    "file missing": missing,
}


def _in_folder(damage: Callable[[Path, Random], str]) -> Mutation:
    return lambda folder, other, rng: damage(
        folder / rng.choice(CONFIGS + TENSORS), rng
    )


def _to_file(damage: Callable[[Path, Random], str]) -> Mutation:
    return lambda path, other, rng: damage(path, rng)


def swapped(folder: Path, other: Path, rng: Random) -> str:
    """A file of another run."""
    name = rng.choice(CONFIGS + TENSORS)
    (folder / name).write_bytes((other / name).read_bytes())
    return name


def read(path: Path, file: str) -> Any:
    """The tree in a file of a folder, or without a name in a checkpoint."""
    if not file:
        return tree_file.read(path)[0]
    inner = path / file
    return load_file(inner) if file in TENSORS else json.loads(inner.read_text())


def rewrite(path: Path, file: str, edit: Edit, rng: Random) -> str:
    """Edit a file of a folder, or a checkpoint, and seal it again."""
    tree, told = edit(read(path, file), rng)
    if not file:
        tree_file.write(path, tree)
        return told
    if file in TENSORS:
        copies = {name: t.clone().contiguous() for name, t in tree.items()}
        save_file(copies, path / file, metadata={"format": "pt"})
    else:
        text = json.dumps(tree).replace(json.dumps(TWIN)[1:-1], "")
        (path / file).write_text(text)
    seal(path)
    return f"{file}: {told}"


def _edited(edit: Edit, *files: str) -> Mutation:
    """An edit of one of some files; one that is named more often is hit more often."""
    return lambda path, other, rng: rewrite(path, rng.choice(files), edit, rng)


def field(config: dict[str, Any], rng: Random) -> tuple[dict[str, Any], str]:
    """A field of PEFT's that a stranger chose."""
    chosen = rng.choice(FIELDS)
    return config | chosen, ascii(chosen)[:60]


def description(config: dict[str, Any], rng: Random) -> tuple[dict[str, Any], str]:
    """A distribution that a stranger chose, as some argument."""
    chosen = rng.choice(DESCRIPTIONS)
    known = [
        (part, name)
        for part in ("model", "prior", "guide", "likelihood")
        for name in (config[part] or {}).get("arguments", {})
    ]
    part, name = rng.choice([("model", "weight_prior"), rng.choice(known)])
    config[part]["arguments"][name] = chosen
    return config, f"{part} {name} = {ascii(chosen)[:60]}"


def nested(folder: Path, other: Path, rng: Random) -> str:
    """JSON deeper than Python's stack."""
    path = folder / rng.choice(CONFIGS)
    config = path.read_text().rstrip().removesuffix("}")
    deep = rng.choice(["[", '{"a":']) * 100_000
    path.write_text(f'{config}, "surprise": {deep}')
    seal_text(folder)
    return path.name


def seal_text(folder: Path) -> None:
    """Write the hashes again where the config can be read at all."""
    try:
        seal(folder)
    except (ValueError, RecursionError):
        pass


def spliced(path: Path, other: Path, rng: Random) -> str:
    """The words of one run, the tensors of another."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(other), path, metadata=header)
    return "the tensors of another run"


def header(path: Path, other: Path, rng: Random) -> str:
    """Words of the header that `tree_file.write` would never write."""
    with safe_open(path, "pt") as file:
        words = dict(file.metadata())
    nodes = ["[", "", "5", "null", '{"tensor": 5}', '{"tensor": "x"}', '{"tensor": []}']
    nodes += ['{"dict": 3}', '{"dict": [[1]]}', '{"evil": []}', '{"a": 1, "b": 2}']
    nodes += ["{}", '{"dict": [[{"dict": []}, 1]]}', "[" * 100_000, '{"tuple": 3}']
    edits: list[dict[str, str | None]] = [{"content": node} for node in nodes]
    edits += [{"version": v} for v in ("3", "x", "-1", "0", "1", "", "1e3", None)]
    edits += [{"format": "x"}, {"format": None}, {"content": None}]
    edits += [
        {"content": words["content"].replace('{"dict"', f'{{"{n}"', 1)} for n in "a"
    ]
    edits += [{"content": words["content"].replace('"tensor"', '"tuple"')}]
    chosen = rng.choice(edits)
    left = {k: v for k, v in {**words, **chosen}.items() if v is not None}
    save_file(load_file(path), path, metadata=left)
    return ascii(chosen)[:60]


DAMAGE = {*FILE_DAMAGE, "file of another run", "tensors of another run"}
FOLDER: dict[str, Mutation] = {
    **{kind: _in_folder(damage) for kind, damage in FILE_DAMAGE.items()},
    "file of another run": swapped,
    **{
        kind: _edited(edit, *CONFIGS[:1] * 3, CONFIGS[1])
        for kind, edit in TREE_EDITS.items()
    },
    **{
        kind: _edited(edit, *TENSORS[:1] * 4, TENSORS[1])
        for kind, edit in TENSOR_EDITS.items()
    },
    "PEFT's fields": _edited(field, "adapter_config.json"),
    "distributions": _edited(description, "lrvd_config.json"),
    "nested deeply": nested,
}
CHECKPOINT: dict[str, Mutation] = {
    **{kind: _to_file(damage) for kind, damage in FILE_DAMAGE.items()},
    "tensors of another run": spliced,
    **{kind: _edited(edit, "") for kind, edit in TREE_EDITS.items()},
    **{kind: _edited(edit, "") for kind, edit in TENSOR_EDITS.items()},
    "header": header,
}
