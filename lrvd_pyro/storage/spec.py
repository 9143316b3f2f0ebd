"""Models, priors, likelihoods and guides as JSON: class name and constructor arguments.

An argument is read from the attribute of the same name. Numbers, texts and tuples are
stored as they are. A distribution of torch, Pyro or this library is stored by name: a
class, a ``functools.partial`` of one, or an instance with scalar parameters. Nothing
else is ever looked up by name, so a description from a stranger is safe to read.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel
from pyro import distributions as pyro_distributions
from torch import Tensor, nn
from torch.distributions import Distribution

from lrvd_pyro import distributions, guides, models
from lrvd_pyro.guides import RankDiagonal, RankGuide
from lrvd_pyro.inference.param_store import waits_for_first_call
from lrvd_pyro.models.base import RankModel

__all__ = [
    "Unstorable",
    "build",
    "build_guide",
    "build_model",
    "decode",
    "describe",
    "encode",
]

_HOMES = {
    "pyro.distributions": pyro_distributions,
    "torch.distributions": torch.distributions,
    "lrvd_pyro.distributions": distributions,
}


class Unstorable(Exception):
    """An argument that JSON cannot hold; its message is the argument's name."""


def describe(thing: object, home: ModuleType) -> dict[str, Any]:
    """Give an object's class name and constructor arguments as JSON.

    Args:
        thing: A model, prior, likelihood or guide; a function is described by its name.
        home: The package that defines the builtin classes of this kind.
    """
    if inspect.isroutine(thing):
        return {"name": thing.__name__, "builtin": False, "arguments": {}}
    cls = type(thing)
    names = [n for n in _parameters(cls) if hasattr(thing, n)]
    return {
        "name": cls.__name__,
        # By identity: a user's class may bear the name of a builtin one.
        "builtin": _builtins(home).get(cls.__name__) is cls,
        "arguments": {name: encode(getattr(thing, name)) for name in names},
    }


def encode(value: object) -> Any:
    """Give a constructor argument as JSON, or its name alone where JSON cannot hold it.

    `decode` is the inverse.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.detach().item()
    if isinstance(value, tuple | list):
        return [encode(element) for element in value]
    if name := _distribution(value):
        return {"class": name}
    if isinstance(value, partial) and (name := _distribution(value.func)):
        keywords = {key: encode(v) for key, v in value.keywords.items()}
        return {"partial": name, "args": encode(value.args), "keywords": keywords}
    if isinstance(value, Distribution) and (name := _distribution(type(value))):
        stored = {key: getattr(value, key, None) for key in _parameters(type(value))}
        if all(isinstance(v, Tensor) and v.dim() == 0 for v in stored.values()):
            keywords = {key: encode(v) for key, v in stored.items()}
            return {"instance": name, "keywords": keywords}
    return {"unstorable": getattr(value, "__name__", type(value).__name__)}


def decode(value: object) -> Any:
    """Give back the argument that `encode` was given, with lists as tuples.

    Raises:
        Unstorable: If the argument was stored by its name alone.
        ValueError: If a name is not that of a known distribution.
    """
    if isinstance(value, list):
        return tuple(decode(element) for element in value)
    if not isinstance(value, dict):
        return value
    keywords = {key: decode(v) for key, v in value.get("keywords", {}).items()}
    if "class" in value:
        return _find(value["class"])
    if "partial" in value:
        return partial(_find(value["partial"]), *decode(value["args"]), **keywords)
    if "instance" in value:
        return _find(value["instance"])(**keywords)
    raise Unstorable(value.get("unstorable", value))


def build(
    folder: Path, config: Mapping[str, Any], part: str, given: object, home: ModuleType
) -> Any:
    """Make the prior or likelihood that was saved, or take the given one.

    Args:
        folder: The folder of the config, for messages.
        config: The config that `save` wrote.
        part: "prior" or "likelihood".
        given: What the user passed, of the saved name; None makes it from the config.
        home: The package that defines the builtin classes of this kind.

    Raises:
        ValueError: If the name differs, or the config alone does not make it.
    """
    saved = config[part]
    if saved is None and given is None:
        return None
    saved = saved or {"name": "None"}
    if given is not None:
        _check_name(folder, part, describe(given, home)["name"], saved["name"])
        return given
    cls = _builtins(home).get(saved["name"]) if saved["builtin"] else None
    if cls is None:
        reason = f"is not a class of {home.__name__}"
        raise _must_pass(folder, part, saved["name"], reason)
    try:
        return cls(**{key: decode(v) for key, v in saved["arguments"].items()})
    except Unstorable as error:
        name = f"{saved['name']} of {error}"
        raise _must_pass(folder, part, name, "has an argument with no name") from None


def build_model(
    folder: Path,
    config: Mapping[str, Any],
    make: Callable[..., RankModel] | None,
    net: PeftModel,
    given: Mapping[str, Any],
) -> RankModel:
    """Make the model that was saved, on a network with its adapter.

    Args:
        folder: The folder of the config, for messages.
        config: The config that `save` wrote.
        make: The model's class, or a function that takes the same arguments. None takes
            the class of the saved name.
        net: The network.
        given: Arguments that are not read from the config, or that replace it.

    Raises:
        ValueError: If the name differs, or the config alone does not make it.
    """
    saved = config["model"]
    make = make or (_builtins(models).get(saved["name"]) if saved["builtin"] else None)
    if make is None:
        reason = f"is not a class of {models.__name__}"
        raise _must_pass(folder, "model", saved["name"], reason)
    arguments = dict(given)
    for name, value in saved["arguments"].items():
        if arguments.get(name) is None:
            try:
                arguments[name] = decode(value)
            except Unstorable as error:
                reason = "is more than a name and numbers"
                raise _must_pass(folder, name, str(error), reason) from None
    model = make(
        net, num_data=config["num_data"], adapter=config["adapter"], **arguments
    )
    _check_name(folder, "model", type(model).__name__, saved["name"])
    return model


def build_guide(
    folder: Path,
    config: Mapping[str, Any],
    make: Callable[[RankModel], nn.Module] | None,
    model: RankModel,
) -> nn.Module:
    """Make the guide that was saved, for a model that is already built.

    Args:
        folder: The folder of the config, for messages.
        config: The config that `save` wrote.
        make: The guide's class, or a function from the model to the guide. None takes
            the class of the saved name.
        model: The model.

    Raises:
        ValueError: If the name differs, the config alone does not make it, or the guide
            has no parameters yet.
    """
    saved = config["guide"]
    arguments: dict[str, Any] = {}
    if make is None:
        cls: Any = _builtins(guides).get(saved["name"]) if saved["builtin"] else None
        # Other guides need a first call with a batch, and no folder holds a batch.
        if cls is None or not issubclass(cls, RankGuide):
            raise _must_pass(folder, "guide", saved["name"], "you must make yourself")
        make, arguments = cls, saved["arguments"]
    guide = make(model, **arguments)
    _check_name(folder, "guide", type(guide).__name__, saved["name"])
    if waits_for_first_call(guide):
        raise ValueError(
            f"{type(guide).__name__} makes its parameters on its first call; pass "
            f"load(..., guide=make) with a make(model) that calls guide(**batch) and "
            f"returns the guide"
        )
    if isinstance(guide, RankDiagonal) and saved["held"] != list(guide.held):
        # Sizes decide which site a new guide holds, and pruning can make sizes equal.
        guide.hold(saved["held"], model.start())
    return guide


def _builtins(home: ModuleType) -> dict[str, type]:
    """The classes of this library that one of its packages offers, by name."""
    package = f"{home.__name__}."
    return {
        name: cls
        for name, cls in vars(home).items()
        if isinstance(cls, type) and f"{cls.__module__}.".startswith(package)
    }


def _parameters(cls: type[object]) -> list[str]:
    """The parameters of a constructor that say what the object is."""
    left_out = {"self", "validate_args", "model", "net", "num_data", "adapter"}
    left_out |= {"prior", "likelihood"}  # the config describes these two separately
    constructor: Any = cls.__init__
    named = [
        p.name
        for p in inspect.signature(constructor).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return [name for name in named if name not in left_out]


def _distribution(cls: object) -> str | None:
    """The full name of a distribution class that `_find` will find again."""
    if not (isinstance(cls, type) and issubclass(cls, Distribution)):
        return None
    homes = (n for n, home in _HOMES.items() if getattr(home, cls.__name__, 0) is cls)
    home = next(homes, None)
    return home and f"{home}.{cls.__name__}"


def _find(full_name: str) -> Any:
    home, _, name = full_name.rpartition(".")
    cls = getattr(_HOMES.get(home), name, None)
    if _distribution(cls) is None:
        raise ValueError(
            f"{full_name!r} is not a distribution of {sorted(_HOMES)}; install the "
            f"versions of torch, pyro and lrvd_pyro that wrote it"
        )
    return cls


def _must_pass(folder: Path, part: str, name: str, reason: str) -> ValueError:
    return ValueError(
        f"{folder} was saved with the {part} {name!r}, which {reason}; its name alone "
        f"does not make it, so pass it: load(path, net, {part}=...)"
    )


def _check_name(folder: Path, part: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"the {part} is {found!r}, but {folder} was saved with {expected!r}; pass "
            f"that one: load(path, net, {part}=...)"
        )
