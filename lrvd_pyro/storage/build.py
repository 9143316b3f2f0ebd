"""Models, priors, likelihoods and guides made again from what a folder says of them."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from peft import PeftModel
from pyro.infer.autoguide import AutoGuide
from torch import nn

from lrvd_pyro import guides, models
from lrvd_pyro.guides import RankDiagonal, RankGuide
from lrvd_pyro.inference.param_store import waits_for_first_call
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.storage.schema import short
from lrvd_pyro.storage.spec import Unstorable, builtin_classes, decode, describe

__all__ = ["build", "build_guide", "build_model"]


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
    cls = builtin_classes(home).get(saved["name"]) if saved["builtin"] else None
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
        make: The model's class, a partial of it, or a function of the same arguments.
            None takes the class of the saved name.
        net: The network.
        given: Arguments that are not read from the config, or that replace it.

    Raises:
        ValueError: If the name differs, or the config alone does not make it.
    """
    saved = config["model"]
    make = make or (
        builtin_classes(models).get(saved["name"]) if saved["builtin"] else None
    )
    if make is None:
        reason = f"is not a class of {models.__name__}"
        raise _must_pass(folder, "model", saved["name"], reason)
    known = {"num_data": config["num_data"], "adapter": config["adapter"], **given}
    arguments = known | _stored(folder, "model", make, saved, net, known)
    model = make(net, **arguments)
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
        make: The guide's class, a partial of it, or a function from the model to the
            guide. None takes the class of the saved name.
        model: The model.

    Raises:
        ValueError: If the name differs, the config alone does not make it, or the guide
            has no parameters yet.
    """
    saved = config["guide"]
    if make is None:
        cls: Any = (
            builtin_classes(guides).get(saved["name"]) if saved["builtin"] else None
        )
        # Other guides need a first call with a batch, and no folder holds a batch.
        if cls is None or not issubclass(cls, RankGuide):
            raise _must_pass(folder, "guide", saved["name"], "you must make yourself")
        make = cls
    arguments = {}
    family = _class_of(make, "guide")
    if family and not issubclass(family, AutoGuide):  # which waits for a first call
        arguments = _stored(folder, "guide", make, saved, model, {})
    guide = make(model, **arguments)
    _check_name(folder, "guide", type(guide).__name__, saved["name"])
    if waits_for_first_call(guide):
        raise ValueError(
            f"{type(guide).__name__} makes its parameters on its first call; pass "
            f"load(..., guide=make) with a make(model) that calls guide(**batch) and "
            f"returns the guide"
        )
    if isinstance(guide, RankDiagonal) and saved.get("held") != list(guide.held):
        _check_held(folder, saved.get("held"), model.start())
        # Sizes decide which site a new guide holds, and pruning can make sizes equal.
        guide.hold(saved["held"], model.start())
    return guide


def _check_held(folder: Path, held: object, sites: Mapping[str, object]) -> None:
    if not isinstance(held, list) or not all(
        isinstance(name, str) and name in sites for name in held
    ):
        raise ValueError(
            f"{folder} has the guide's sites {short(held)}; expected a list of some of "
            f"{sorted(sites)}: write the folder again, save(path, model, guide)"
        )


def _stored(
    folder: Path,
    part: str,
    make: Callable[..., object],
    saved: Mapping[str, Any],
    first: object,
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """The saved arguments for ``make(first, **known, ...)``, without what it has.

    A class gets all of them. A function makes by itself what no config can hold.

    Raises:
        TypeError: If ``make`` is an object that is made already.
        ValueError: If ``make`` does not take the arguments, or the config cannot hold
            one that it needs.
    """
    family, has = _class_of(make, part), {*known, *getattr(make, "keywords", ())}
    if family:
        _check_name(folder, part, family.__name__, saved["name"])
    stored = {n: v for n, v in saved["arguments"].items() if n not in has}
    arguments: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, value in stored.items():
        try:
            arguments[name] = decode(value)
        except Unstorable as error:
            missing[name] = str(error)
    needed = stored if family else arguments
    if saved["builtin"]:
        _check_flags(folder, make, arguments)
    try:
        inspect.signature(make).bind(first, **{**known, **needed})
    except TypeError as error:
        names = ", ".join(f"{name}=..." for name in {**known, **needed})
        raise ValueError(
            f"{folder} needs {saved['name']}({'net' if known else 'model'}, {names}), "
            f"but of the {part} that was passed {error}; give the class such a "
            f"constructor, or pass a function that takes these: load(path, net, "
            f"{part}=make)"
        ) from None
    if family and missing:
        name, kind = next(iter(missing.items()))
        if name == "weight_prior":
            raise _must_pass(folder, name, kind, "is more than a name and numbers")
        raise ValueError(
            f"{folder} does not hold the argument {name!r} ({kind}) of the {part} "
            f"{saved['name']!r}: JSON cannot, or no attribute has its name; pass it: "
            f"load(path, net, {part}=functools.partial({saved['name']}, {name}=...)), "
            f"or a function"
        )
    return arguments


def _check_flags(
    folder: Path, make: Callable[..., object], arguments: Mapping[str, object]
) -> None:
    """Raise a ValueError where a flag is none: any value would count as true."""
    usual = {n: p.default for n, p in inspect.signature(make).parameters.items()}
    for name, value in arguments.items():
        if isinstance(usual.get(name), bool) and not isinstance(value, bool):
            raise ValueError(
                f"{folder} has {name}={short(value)}; expected true or false: write "
                f"the folder again, save(path, model, guide)"
            )


def _class_of(make: Callable[..., object], part: str) -> type | None:
    """The class that ``make`` is, or is a partial of; None for a function.

    Raises:
        TypeError: If ``make`` is an object that is made already.
    """
    if isinstance(make, nn.Module):
        raise TypeError(
            f"{part} is a {type(make).__name__} object; expected its class, a partial "
            f"of it, or a function that makes it: load(path, net, "
            f"{part}={type(make).__name__})"
        )
    made = make.func if isinstance(make, partial) else make
    return made if isinstance(made, type) else None


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
