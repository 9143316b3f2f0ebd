"""Edits of trees: of dicts, lists and tuples of numbers, texts and tensors.

An edit takes a tree and a generator; it gives the edited tree and says what it did.
"""

import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

Edit = Callable[[Any, Random], tuple[Any, str]]
Path = tuple[Any, ...]

TWIN = "\x01"  # before a key: the key once more, where a tree becomes JSON
# On a name of six letters a regular expression like this takes years.
ENDLESS = "(?:.?){300}!"
NAMES: tuple[str, ...] = (
    "norm",
    "out",
    "",
    "../x",
    "hidden.lora_A",
    "base_model.model.hidden",
    "a.b",
)
NAMES += (ENDLESS, "(a+)+$", "__class__", "x" * 10_000, "\ud800", "\0", "os.system")
NUMBERS: tuple[Any, ...] = (math.nan, math.inf, -math.inf, -1, 0, 10**7, 2**63, 1e308)
NUMBERS += (-(10**9), 10**400, 0.5)
DTYPES = (torch.long, torch.float64, torch.bool, torch.complex64, torch.float16)


def paths(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every place below the root, and what stands there."""
    keys: Any = ()
    if isinstance(tree, dict):
        keys = tree
    elif isinstance(tree, list | tuple):
        keys = range(len(tree))
    for key in keys:
        yield (*path, key), tree[key]
        yield from paths(tree[key], (*path, key))


def put(tree: Any, path: Path, value: Any) -> Any:
    """The tree with another value at a place."""
    if not path:
        return value
    key, *rest = path
    inner = put(tree[key] if rest else None, tuple(rest), value)
    if isinstance(tree, dict):
        return {**tree, key: inner}
    items = [*tree]
    items[key] = inner
    return type(tree)(items)


def drop(tree: Any, path: Path) -> Any:
    """The tree without a place."""
    *outer, key = path
    parent = at(tree, tuple(outer))
    if isinstance(parent, dict):
        left: Any = {k: v for k, v in parent.items() if k != key}
    else:
        left = type(parent)(v for i, v in enumerate(parent) if i != key)
    return put(tree, tuple(outer), left)


def at(tree: Any, path: Path) -> Any:
    """What stands at a place."""
    for key in path:
        tree = tree[key]
    return tree


def pick(tree: Any, rng: Random, kind: Any = object) -> tuple[Path, Any]:
    """Some place with a value of a kind; every depth is as likely."""
    found = [(p, v) for p, v in paths(tree) if isinstance(v, kind)]
    if not found:
        raise LookupError(f"no {kind} in the tree")
    depth = rng.choice(sorted({len(path) for path, _ in found}))
    return rng.choice([each for each in found if len(each[0]) == depth])


def deleted(tree: Any, rng: Random) -> tuple[Any, str]:
    """One entry less."""
    path, _ = pick(tree, rng)
    return drop(tree, path), f"without {where(path)}"


def retyped(tree: Any, rng: Random) -> tuple[Any, str]:
    """A value of another type."""
    path, value = pick(tree, rng)
    others: list[Any] = [None, True, 7, 0.5, "text", [value], {"a": value}, [], {}]
    if isinstance(value, int | float) and abs(value) < 1e300:
        others += [str(value), float(value), int(value == value and value)]
    if isinstance(value, list | tuple):
        others += [{str(i): v for i, v in enumerate(value)}]
    new = rng.choice([each for each in others if type(each) is not type(value)])
    return put(tree, path, new), f"{where(path)} as {short(new)}"


def resized(tree: Any, rng: Random) -> tuple[Any, str]:
    """A list or text that is longer, shorter or empty."""
    path, value = pick(tree, rng, list | tuple | str)
    new = rng.choice([value + value, value[:0], value[1:], value[:-1], value * 1000])
    return put(tree, path, new), f"{where(path)} of length {len(new)}"


def twice(tree: Any, rng: Random) -> tuple[Any, str]:
    """A key twice in a dict, the second time with another value."""
    path, value = pick(tree, rng)
    parent = at(tree, path[:-1])
    if isinstance(parent, dict):
        twin = (*path[:-1], f"{TWIN}{path[-1]}")
        others: list[Any] = [None, 7, "text", [], {}]
        return put(tree, twin, rng.choice(others)), f"{where(path)} twice"
    double = [*parent[: path[-1]], value, *parent[path[-1] :]]
    return put(tree, path[:-1], type(parent)(double)), f"{where(path)} twice"


def renumbered(tree: Any, rng: Random) -> tuple[Any, str]:
    """Another number: NaN, infinite, huge, negative."""
    path, value = pick(tree, rng, int | float)
    new = rng.choice([each for each in NUMBERS if each != value])
    return put(tree, path, new), f"{where(path)} = {short(new)}"


def unknown(tree: Any, rng: Random) -> tuple[Any, str]:
    """A key that nobody knows."""
    found = [path for path, value in paths(tree) if isinstance(value, dict)]
    path = rng.choice([(), *found])
    key = rng.choice(["surprise", "lora_A", "__class__", "format2"])
    return put(tree, (*path, key), rng.choice([1, None, "x"])), f"{where(path)}/{key}"


def renamed(tree: Any, rng: Random) -> tuple[Any, str]:
    """Another name, of a module, a class, a tensor, or a key."""
    new = rng.choice(NAMES)
    if rng.random() < 0.7:
        path, _ = pick(tree, rng, str)
        return put(tree, path, new), f"{where(path)} = {short(new)}"
    path, value = pick(tree, rng)
    while not isinstance(path[-1], str):
        path, value = pick(tree, rng)
    changed = put(drop(tree, path), (*path[:-1], new), value)
    return changed, f"{where(path)} under the name {short(new)}"


def without_tensor(tree: Any, rng: Random) -> tuple[Any, str]:
    """A tensor less."""
    path, _ = pick(tree, rng, Tensor)
    return drop(tree, path), f"without the tensor {where(path)}"


def _tensor_edit(change: Callable[[Tensor, Random], Tensor]) -> Edit:
    def edit(tree: Any, rng: Random) -> tuple[Any, str]:
        path, value = pick(tree, rng, Tensor)
        new = change(value, rng)
        if path[0] == "tensors" and rng.random() < 0.5:  # a checkpoint's layout agrees
            layout = (str(new.dtype), tuple(new.shape), tree["layout"][path[1]][2])
            tree = put(tree, ("layout", path[1]), layout)
        told = f"{where(path)} as {short(new)}"
        return put(tree, path, new), told

    return edit


def _reshaped(value: Tensor, rng: Random) -> Tensor:
    flat = value.reshape(-1)
    wider = torch.cat([flat, flat])
    return (
        rng.choice([flat[:-1], wider, value[None], value[None].expand(3, -1) * 1])
        if value.dim() == 1
        else rng.choice([flat[1:], wider, value[None]])
    )


def _emptied(value: Tensor, rng: Random) -> Tensor:
    return value.reshape(-1)[:0]


def _cast(value: Tensor, rng: Random) -> Tensor:
    return value.to(rng.choice([d for d in DTYPES if d != value.dtype]))


def _spoiled(value: Tensor, rng: Random) -> Tensor:
    if not value.is_floating_point():  # a generator's bytes, a mask
        return value.bitwise_not()
    new = value.clone().reshape(-1)
    new[rng.randrange(len(new))] = rng.choice([math.nan, math.inf, -math.inf, 1e38])
    return new.reshape(value.shape)


def tensor_renamed(tree: Any, rng: Random) -> tuple[Any, str]:
    """A tensor under another name."""
    path, value = pick(tree, rng, Tensor)
    key = f"{path[-1]}x" if isinstance(path[-1], str) else 7
    parent = at(tree, path[:-1])
    if not isinstance(parent, dict):
        return drop(tree, path), f"without {where(path)}"
    return put(drop(tree, path), (*path[:-1], key), value), f"{where(path)} renamed"


def tensor_added(tree: Any, rng: Random) -> tuple[Any, str]:
    """A tensor too many."""
    path, value = pick(tree, rng, Tensor)
    if not isinstance(at(tree, path[:-1]), dict):
        path = ("surprise",)
    else:
        path = (*path[:-1], rng.choice([f"{path[-1]}2", "surprise", "net.x", "x/y"]))
    return put(tree, path, value.clone()), f"also {where(path)}"


TREE_EDITS: dict[str, Edit] = {
    "entry deleted": deleted,
    "entry retyped": retyped,
    "entry resized": resized,
    "entry twice": twice,
    "number": renumbered,
    "unknown entry": unknown,
    "name": renamed,
}
TENSOR_EDITS: dict[str, Edit] = {
    "tensor deleted": without_tensor,
    "tensor reshaped": _tensor_edit(_reshaped),
    "tensor emptied": _tensor_edit(_emptied),
    "tensor retyped": _tensor_edit(_cast),
    "tensor NaN, inf": _tensor_edit(_spoiled),
    "tensor renamed": tensor_renamed,
    "tensor too many": tensor_added,
}


def where(path: Path) -> str:
    """A path in words."""
    return "/".join(str(key)[:40] for key in path) or "the root"


def short(value: Any) -> str:
    """A value in words, at most 100 letters."""
    if isinstance(value, int) and abs(value) > 2**64:
        return "10**400"
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return ascii(value)[:100]
