"""Root Pyro modules with names of their own, so that two of them both train."""

import itertools
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import nn

_numbers = itertools.count()


class UniqueModule(PyroModule):
    """A root PyroModule under a name that no other object of this process bears.

    Pyro's store keeps parameters by name; a second root of the same name would be
    handed the first one's parameters and train nothing. Copies and unpickled objects
    get a new name too.
    """

    def __init__(self) -> None:
        super().__init__(self._new_name())

    @classmethod
    def _new_name(cls) -> str:
        return f"{cls.__name__}_{next(_numbers)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pyro_context.used = False
        self._pyro_set_supermodule(self._new_name(), self._pyro_context)

    def release(self) -> None:
        """Take this module's parameters out of Pyro's store; they keep their values.

        Pyro's store holds every parameter it has seen until told otherwise: call this
        when an object in a sweep or a notebook is done with. (A model's hooks stay on
        its network until ``model.space.close()``.)
        """
        store = pyro.get_param_store()
        for name in list(store.keys()):
            if name.startswith((f"{self._pyro_name}.", f"{self._pyro_name}$$$")):
                del store[name]


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
