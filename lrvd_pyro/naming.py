"""Root Pyro modules with names of their own, so that two of them both train."""

import itertools
from typing import Any

import pyro
from pyro.nn import PyroModule

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
        when an object in a sweep or a notebook is done with.
        """
        store = pyro.get_param_store()
        for name in list(store.keys()):
            if name.startswith((f"{self._pyro_name}.", f"{self._pyro_name}$$$")):
                del store[name]
