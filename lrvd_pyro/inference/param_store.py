"""Root Pyro modules with names of their own, so that two of them both train."""

import itertools
from typing import Any, TypeVar

import pyro
from pyro.nn import PyroModule
from torch import nn

from lrvd_pyro._compat.pyro import (
    held_parameters,
    name_of,
    plain_parameter,
    rename,
    start_as_root,
)

_numbers = itertools.count()


class FreezableModule(PyroModule):
    """A PyroModule whose frozen parameters stay frozen.

    Pyro's store sets ``requires_grad`` of whatever it registers, on first use.
    """

    def __getattr__(self, name: str) -> Any:
        parameter = plain_parameter(self, name)
        if parameter is not None and not parameter.requires_grad:
            return parameter
        return super().__getattr__(name)


class UniqueModule(FreezableModule):
    """A root PyroModule under a name that no other object of this process bears.

    Pyro's store keeps parameters by name; a second root of the same name would be
    handed the first one's parameters and train nothing. Copies and unpickled objects
    get a new name too. A subclass that lacks an abstract method cannot be made.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # As ABCMeta does; PyroModule has a metaclass of its own already.
        cls.__abstractmethods__ = frozenset(  # type: ignore[attr-defined]
            name
            for name in dir(cls)
            if getattr(getattr(cls, name, None), "__isabstractmethod__", False)
        )

    def __init__(self) -> None:
        super().__init__(_new_name(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        start_as_root(self)
        give_own_name(self)

    def release(self) -> None:
        """Take this module's parameters out of Pyro's store; they keep their values.

        Pyro's store holds every parameter it has seen until told otherwise: call this
        when an object in a sweep or a notebook is done with. (A model's hooks stay on
        its network until ``model.space.close()``.)
        """
        store = pyro.get_param_store()
        for name in list(store.keys()):
            if name.startswith((f"{name_of(self)}.", f"{name_of(self)}$$$")):
                del store[name]


Root = TypeVar("Root", bound=nn.Module)


def give_own_name(root: Root) -> Root:
    """The same root module, under a name that no other object of this process bears.

    For Pyro's AutoGuides, which all bear the name of their class, before their first
    call.
    """
    rename(root, _new_name(root))
    return root


def _new_name(root: nn.Module) -> str:
    return f"{type(root).__name__}_{next(_numbers)}"


def waits_for_first_call(guide: Any) -> bool:
    """Whether a guide is an AutoGuide that has no parameters yet."""
    return getattr(guide, "prototype_trace", ()) is None


def check_name_is_free(guide: Any) -> None:
    """Raise if Pyro's store would hand a guide the parameters of another one.

    That of an AutoGuide made earlier, or of the one that this is a copy of.

    Raises:
        RuntimeError: With the way out.
    """
    if not isinstance(guide, PyroModule) or isinstance(guide, UniqueModule):
        return
    name, store = name_of(guide), pyro.get_param_store()
    if waits_for_first_call(guide):
        taken = [key for key in store.keys() if key.startswith(f"{name}.")]
    else:
        own = guide.named_parameters()
        keys = {f"{name}.{n.removesuffix('_unconstrained')}": p for n, p in own}
        held = held_parameters()
        taken = [key for key, p in keys.items() if held.get(key, p) is not p]
    if taken:
        raise RuntimeError(
            f"Pyro's store holds {sorted(taken)} of another guide, which this {name} "
            f"would train instead of its own; call "
            f"lrvd_pyro.inference.give_own_name(guide) before its first use, or "
            f"pyro.clear_param_store() before making both"
        )


def check_registered(name: str, parameter: nn.Parameter) -> None:
    """Raise if Pyro's store holds another tensor under a parameter's name.

    SVI trains the tensor in the store; this one would stay as it is.

    Raises:
        RuntimeError: With the name and the way out.
    """
    store: Any = pyro.get_param_store()
    if name in store and store[name].unconstrained() is not parameter:
        raise RuntimeError(
            f"Pyro's store holds another tensor under {name!r}, so that SVI would not "
            f"train the present one (a parameter was replaced, or a store was loaded); "
            f"call release() on the model or guide to go on with its own values"
        )
