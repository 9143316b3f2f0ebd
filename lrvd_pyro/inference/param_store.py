"""Root Pyro modules under unique names, so that two of them both train."""

import inspect
import itertools
from typing import Any, Self, TypeVar

import pyro
from pyro.nn import PyroModule
from pyro.params.param_store import param_with_module_name
from torch import nn

from lrvd_pyro._compat.pyro import (
    held_parameters,
    name_of,
    plain_parameter,
    rename,
    start_as_root,
)
from lrvd_pyro.inference.programs import Guide

__all__ = [
    "FreezableModule",
    "UniqueModule",
    "check_has_parameters",
    "check_name_is_free",
    "check_registered",
    "give_own_name",
    "register_trainable",
    "waits_for_first_call",
]

_numbers = itertools.count()


class FreezableModule(PyroModule):
    """A PyroModule whose frozen parameters stay frozen.

    Pyro's store sets ``requires_grad`` on every parameter that it registers. Reading an
    attribute registers it, so a frozen parameter is read past Pyro.
    """

    def __getattr__(self, name: str) -> Any:
        parameter = plain_parameter(self, name)
        if parameter is not None and not parameter.requires_grad:
            return parameter
        return super().__getattr__(name)


class UniqueModule(FreezableModule):
    """A root PyroModule under a name that no other object of this process has.

    Pyro's store keeps parameters by name. A second root of the same name would be
    handed the parameters of the first one, and would train nothing. Copies and
    unpickled objects therefore get a new name too. A subclass that lacks an abstract
    method cannot be made.
    """

    passed: frozenset[str]  # the names of the arguments that it was made with

    def __new__(cls, *args: object, **keywords: object) -> Self:
        made = super().__new__(cls)
        # Past nn.Module, which takes attributes only once it is set up.
        object.__setattr__(made, "passed", frozenset(keywords))
        return made

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Else inspect would show the arguments of __new__.
        _, *rest = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(rest)  # type: ignore[attr-defined]
        # ABCMeta would do this, but PyroModule has a metaclass of its own already.
        cls.__abstractmethods__ = frozenset(  # type: ignore[attr-defined]
            name
            for name in dir(cls)
            if getattr(getattr(cls, name, None), "__isabstractmethod__", False)
        )

    def __init__(self) -> None:
        super().__init__(_new_name(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        give_own_name(self)

    def release(self) -> None:
        """Take this module's parameters out of Pyro's store; they keep their values.

        The store holds every parameter that it has seen. Call this when a sweep or a
        notebook has done with the object. A model's hooks stay on its network until
        ``model.space.close()``.
        """
        store = pyro.get_param_store()
        for name in list(store.keys()):
            # Pyro ends a module's name by "." for PyroModules and by "$$$" for others.
            if name.startswith((f"{name_of(self)}.", f"{name_of(self)}$$$")):
                del store[name]


_Root = TypeVar("_Root", bound=PyroModule)


def give_own_name(root: _Root) -> _Root:
    """Give a root module a name that no other object of this process has.

    Call it on Pyro's AutoGuides before their first call: an AutoGuide has the name of
    its class, and so has every other guide of that class. A copy of one has its name.

    Example::

        guide = give_own_name(AutoNormal(model))

    Args:
        root: A module that is not part of another PyroModule.

    Returns:
        The same module.
    """
    start_as_root(root)  # a copy has the mark that the original has run
    rename(root, _new_name(root))
    return root


def _new_name(root: nn.Module) -> str:
    return f"{type(root).__name__}_{next(_numbers)}"


def waits_for_first_call(guide: object) -> bool:
    """Whether a guide is an AutoGuide that has no parameters yet."""
    return getattr(guide, "prototype_trace", ()) is None


def check_has_parameters(guide: object, call: str, instead: str) -> None:
    """Raise unless a guide is a module that has its parameters.

    Args:
        guide: The guide.
        call: The call that needs them.
        instead: What to do with a function as a guide.

    Raises:
        TypeError: If ``guide`` is a function.
        ValueError: If ``guide`` is an AutoGuide that has no parameters yet.
    """
    if not isinstance(guide, nn.Module):
        raise TypeError(
            f"guide is a {type(guide).__name__} without parameters of its own; "
            f"{instead}"
        )
    if waits_for_first_call(guide):
        raise ValueError(
            f"{type(guide).__name__} makes its parameters on its first call; call "
            f"guide(**batch) once before {call}"
        )


def check_name_is_free(guide: Guide) -> None:
    """Raise if Pyro's store would hand a guide the parameters of another guide.

    The other one is an AutoGuide made earlier, or the original of a copy.

    Raises:
        RuntimeError: With the parameters and the call that mends it.
    """
    if not isinstance(guide, PyroModule) or isinstance(guide, UniqueModule):
        return
    name, store = name_of(guide), pyro.get_param_store()
    if waits_for_first_call(guide):
        taken = [key for key in store.keys() if key.startswith(f"{name}.")]
    else:
        # The guide has parameters: under its keys the store must hold those very ones.
        parameters = guide.named_parameters()
        keys = {f"{name}.{n.removesuffix('_unconstrained')}": p for n, p in parameters}
        held = held_parameters()
        taken = [key for key, p in keys.items() if held.get(key, p) is not p]
    if taken:
        raise RuntimeError(
            f"Pyro's store holds {sorted(taken)} of another guide, which this {name} "
            f"would read and train instead of its own; call "
            f"lrvd_pyro.inference.give_own_name(guide) before its first use, or "
            f"pyro.clear_param_store() before making both"
        )


def check_registered(name: str, parameter: nn.Parameter) -> None:
    """Raise if Pyro's store holds another tensor under a parameter's name.

    SVI trains the tensor in the store; the given parameter would stay as it is.

    Raises:
        RuntimeError: With the name and the call that mends it.
    """
    store: Any = pyro.get_param_store()
    if name in store and store[name].unconstrained() is not parameter:
        raise RuntimeError(
            f"Pyro's store holds another tensor under {name!r}, so that SVI would not "
            f"train the present one (a parameter was replaced, or a store was loaded); "
            f"call release() on the model or guide to go on with its own values"
        )


def register_trainable(root: str, module: nn.Module) -> None:
    """Show Pyro the trainable parameters of a module, and only them.

    Args:
        root: The module's name in Pyro's store.
        module: The module.

    Raises:
        RuntimeError: If the store holds another tensor under a parameter's name.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            path = param_with_module_name(root, name)
            pyro.param(path, parameter)
            check_registered(path, parameter)
