"""Priors, likelihoods and guides as JSON: class name and constructor arguments.

An argument is read from the attribute of the same name. Numbers, texts and tuples are
stored as they are; distributions of torch, Pyro and this library by name, as a class, a
``functools.partial`` of one, or an instance with scalar parameters. Nothing else is
ever looked up by name, so that a description can be read from a stranger.
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

HOMES = {
    "pyro.distributions": pyro_distributions,
    "torch.distributions": torch.distributions,
    "lrvd_pyro.distributions": distributions,
}


class Unstorable(Exception):
    """An argument that JSON cannot hold; its message is the argument's name."""


def describe(thing: object, home: ModuleType) -> dict[str, Any]:
    """Name and constructor arguments of an object whose class ``home`` may define."""
    if inspect.isroutine(thing):
        return {"name": thing.__name__, "builtin": False, "arguments": {}}
    cls = type(thing)
    names = [n for n in _parameters(cls) if hasattr(thing, n)]
    return {
        "name": cls.__name__,
        "builtin": builtins(home).get(cls.__name__) is cls,
        "arguments": {name: encode(getattr(thing, name)) for name in names},
    }


def builtins(home: ModuleType) -> dict[str, type]:
    """The classes that a module or package of this library offers, by name."""
    package = f"{home.__name__}."
    return {
        name: cls
        for name, cls in vars(home).items()
        if isinstance(cls, type) and f"{cls.__module__}.".startswith(package)
    }


def encode(value: Any) -> Any:
    """A constructor argument as JSON; what JSON cannot hold as its name alone."""
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
        found = {key: getattr(value, key, None) for key in _parameters(type(value))}
        if all(isinstance(v, Tensor) and v.dim() == 0 for v in found.values()):
            return {"instance": name, "keywords": {k: encode(found[k]) for k in found}}
    return {"unstorable": getattr(value, "__name__", type(value).__name__)}


def decode(value: Any) -> Any:
    """The argument that `encode` was given; lists as tuples.

    Raises:
        Unstorable: If it was stored by its name alone.
        ValueError: If it is nothing that `encode` gives.
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
    folder: Path, config: Mapping[str, Any], part: str, given: Any, home: ModuleType
) -> Any:
    """The prior or likelihood as it was saved, or the given one, its name checked."""
    saved = config[part]
    if given is not None:
        _check_name(folder, part, describe(given, home)["name"], saved["name"])
        return given
    cls = builtins(home).get(saved["name"]) if saved["builtin"] else None
    if cls is None:
        raise _must_pass(folder, part, saved["name"], f"is none of {home.__name__}")
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
    """The model as it was saved, on a network with its adapter.

    Args:
        folder: Where the config stands, for the messages.
        config: As `save` writes it.
        make: The model's class, or a function with its arguments; None takes the name.
        net: The network.
        given: Arguments that the folder does not tell, or not alone.
    """
    saved = config["model"]
    make = make or (builtins(models).get(saved["name"]) if saved["builtin"] else None)
    if make is None:
        reason = f"is none of {models.__name__}"
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
    saved = config["guide"]
    arguments: dict[str, Any] = {}
    if make is None:
        found: Any = builtins(guides).get(saved["name"]) if saved["builtin"] else None
        if found is None or not issubclass(found, RankGuide):
            raise _must_pass(folder, "guide", saved["name"], "has to be made by you")
        make, arguments = found, saved["arguments"]
    guide = make(model, **arguments)
    _check_name(folder, "guide", type(guide).__name__, saved["name"])
    if waits_for_first_call(guide):
        raise ValueError(
            f"{type(guide).__name__} makes its parameters on its first call; pass "
            f"load(..., guide=make) with a make(model) that calls guide(**batch) and "
            f"returns the guide"
        )
    if isinstance(guide, RankDiagonal) and saved["held"] != list(guide.held):
        guide.hold(saved["held"], model.start())
    return guide


def _parameters(cls: Any) -> list[str]:
    """The constructor's parameters that say what the object is."""
    left_out = {"self", "validate_args", "model", "net", "num_data", "adapter"}
    left_out |= {"prior", "likelihood"}  # which are described by themselves
    parameters = inspect.signature(cls.__init__).parameters.values()
    named = [
        p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return [name for name in named if name not in left_out]


def _distribution(cls: Any) -> str | None:
    """The full name of a distribution class that `_find` will find again."""
    if not (isinstance(cls, type) and issubclass(cls, Distribution)):
        return None
    homes = (n for n, home in HOMES.items() if getattr(home, cls.__name__, 0) is cls)
    home = next(homes, None)
    return home and f"{home}.{cls.__name__}"


def _find(full_name: str) -> Any:
    home, _, name = full_name.rpartition(".")
    cls = getattr(HOMES.get(home), name, None)
    if _distribution(cls) is None:
        raise ValueError(
            f"{full_name!r} is no distribution of {sorted(HOMES)}; install the "
            f"versions of torch, pyro and lrvd_pyro that wrote it"
        )
    return cls


def _must_pass(folder: Path, part: str, name: str, reason: str) -> ValueError:
    return ValueError(
        f"{folder} was saved with the {part} {name!r}, which {reason}, so that its "
        f"name alone does not make it; pass it: load(path, net, {part}=...)"
    )


def _check_name(folder: Path, part: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"the {part} is {found!r}, and {folder} was saved with {expected!r}; pass "
            f"that one: load(path, net, {part}=...)"
        )
