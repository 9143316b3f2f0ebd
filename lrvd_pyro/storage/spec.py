"""Models, priors, likelihoods and guides as JSON: class name and constructor arguments.

An argument is read from the attribute of the same name. Numbers, texts and tuples are
stored as they are. A distribution of torch, Pyro or this library is stored by name: a
class, a ``functools.partial`` of one, or an instance with scalar parameters. Nothing
else is ever looked up by name, so a description from a stranger is safe to read.
"""

import inspect
import math
from functools import partial
from types import ModuleType
from typing import Any

import torch
from pyro import distributions as pyro_distributions
from torch import Tensor
from torch.distributions import Distribution

from lrvd_pyro import distributions, guides, models
from lrvd_pyro.storage.schema import short

__all__ = ["Unstorable", "builtin_classes", "decode", "describe", "encode"]

_HOMES = {
    "pyro.distributions": pyro_distributions,
    "torch.distributions": torch.distributions,
    "lrvd_pyro.distributions": distributions,
}


_SIZES = {"dim", "event_dim", "batch_shape", "event_shape", "num_masters", "size"}


class Unstorable(Exception):
    """An argument that JSON cannot hold; its message is the argument's name."""


def describe(thing: object, home: ModuleType) -> dict[str, Any]:
    """Give an object's class name and constructor arguments as JSON.

    Args:
        thing: A model, prior, likelihood or guide; a function is described by its name.
        home: The package that defines the builtin classes of this kind.
    """
    if isinstance(thing, partial):
        inner = describe(thing.func, home)["name"]
        return {"name": f"partial of {inner}", "builtin": False, "arguments": {}}
    if inspect.isroutine(thing):
        return {"name": thing.__name__, "builtin": False, "arguments": {}}
    cls = type(thing)
    # By identity: a user's class may bear the name of a builtin one.
    builtin = builtin_classes(home).get(cls.__name__) is cls
    arguments = {}
    for name in _arguments(thing, home):
        if hasattr(thing, name):
            arguments[name] = encode(getattr(thing, name))
        elif not builtin:  # whose own tensors tell the rest
            arguments[name] = {"unstorable": "unknown"}
    return {"name": cls.__name__, "builtin": builtin, "arguments": arguments}


def _arguments(thing: object, home: ModuleType) -> list[str]:
    """The names of constructor arguments that say what an object is."""
    named = [*inspect.signature(type(thing)).parameters.values()]
    if home in (models, guides):
        named = named[1:]  # the network of a model, the model of a guide
    # The config describes these by themselves.
    elsewhere = {"num_data", "adapter", "prior", "likelihood"} if home is models else ()
    names = [p.name for p in named if p.kind is not p.VAR_KEYWORD]
    if len(names) < len(named):  # what a constructor passes on
        names += sorted(getattr(thing, "passed", frozenset()) - {*names})
    return [name for name in names if name not in elsewhere]


def encode(value: object) -> Any:
    """Give a constructor argument as JSON, or its name alone where JSON cannot hold it.

    `decode` is the inverse.
    """
    # By type: an Enum may be a str too, and would come back as a mere text.
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": repr(value)}  # which JSON has no sign for
    if value is None or type(value) in (bool, int, float, str):
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
        keys = [*inspect.signature(type(value)).parameters]
        stored = {k: getattr(value, k, None) for k in keys if k != "validate_args"}
        if all(isinstance(v, Tensor) and v.dim() == 0 for v in stored.values()):
            keywords = {key: encode(v) for key, v in stored.items()}
            return {"instance": name, "keywords": keywords}
    return {"unstorable": getattr(value, "__name__", type(value).__name__)}


def decode(value: object) -> Any:
    """Give back the argument that `encode` was given, with lists as tuples.

    Raises:
        Unstorable: If the argument was stored by its name alone.
        ValueError: If a name is not that of a known distribution, or an argument of
            one is not a number.
    """
    if isinstance(value, list):
        return tuple(decode(element) for element in value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{short(value)} has more than the 64 bits of a tensor")
    if not isinstance(value, dict):
        return value
    stored = value.get("keywords", {})
    if not isinstance(stored, dict):
        raise ValueError(f"keywords {short(stored)}; expected a dict")
    keywords = {key: decode(v) for key, v in stored.items()}
    if value.get("number") in ("inf", "-inf", "nan"):
        return float(value["number"])
    if "class" in value:
        return _find(value["class"])
    if "partial" in value:
        cls, args = _find(value["partial"]), decode(value.get("args"))
        _check_parameters(cls, args, keywords)
        return partial(cls, *args, **keywords)
    if "instance" in value:
        cls = _find(value["instance"])
        _check_parameters(cls, (), keywords)
        try:
            return cls(**keywords)
        except Exception as error:
            raise ValueError(f"{cls.__name__} of {keywords}: {error!r}") from error
    raise Unstorable(value.get("unstorable", value))


def builtin_classes(home: ModuleType) -> dict[str, type]:
    """The classes of this library that one of its packages offers, by name."""
    package = f"{home.__name__}."
    return {
        name: cls
        for name, cls in vars(home).items()
        if isinstance(cls, type) and f"{cls.__module__}.".startswith(package)
    }


def _distribution(cls: object) -> str | None:
    """The full name of a distribution class that `_find` will find again."""
    if not (isinstance(cls, type) and issubclass(cls, Distribution)):
        return None
    homes = (n for n, home in _HOMES.items() if getattr(home, cls.__name__, 0) is cls)
    home = next(homes, None)
    return home and f"{home}.{cls.__name__}"


def _check_parameters(cls: Any, args: object, keywords: dict[str, Any]) -> None:
    """Raise a ValueError unless these are parameters, each a number.

    Other arguments may be sizes: `LKJCholesky` of a huge ``dim`` takes all memory.
    """
    names = {*inspect.signature(cls).parameters} - _SIZES
    numbers = [*args, *keywords.values()] if isinstance(args, tuple) else [None]
    names = names if cls is not Distribution else set()
    if not names or not keywords.keys() <= names or not all(map(_is_number, numbers)):
        raise ValueError(
            f"{cls.__name__} of {short([args, keywords])}; expected numbers, for "
            f"parameters among {sorted(names)}"
        )


def _is_number(value: Any) -> bool:
    """Whether it is one, or a flag such as ``validate_args``."""
    if value is None or isinstance(value, bool):
        return True
    return type(value) in (int, float) and -(2**63) < value < 2**63


def _find(full_name: object) -> Any:
    if not isinstance(full_name, str):
        raise ValueError(f"{short(full_name)} is no name; expected a distribution's")
    home, _, name = full_name.rpartition(".")
    cls = getattr(_HOMES.get(home), name, None)
    if _distribution(cls) is None:
        raise ValueError(
            f"{full_name!r} is not a distribution of {sorted(_HOMES)}; install the "
            f"versions of torch, pyro and lrvd_pyro that wrote it"
        )
    return cls
