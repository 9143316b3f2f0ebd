"""Private parts of Pyro."""

import inspect
from collections.abc import Iterator
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

__all__ = [
    "held_parameters",
    "mcmc_is_running",
    "messengers",
    "name_of",
    "plain_child",
    "plain_parameter",
    "rename",
    "restored_without_a_step",
    "start_as_root",
    "unpack_latent",
]


def messengers() -> list[Any]:
    """The effect handlers around the running program.

    Private, since Pyro shows a handler its messages and not its neighbors.
    """
    return _PYRO_STACK


def mcmc_is_running() -> bool:
    """Whether `pyro.infer.mcmc` runs the present program.

    Looked up in the frames of the call, since MCMC leaves no mark in the program's
    trace.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("pyro.infer.mcmc"):
            return True
        frame = frame.f_back
    return False


def name_of(module: PyroModule) -> str:
    """The name under which Pyro's store keeps the parameters of a root module.

    Private, since a PyroModule takes its name and does not give it back.
    """
    name: str = module._pyro_name
    return name


def rename(root: Any, name: str) -> None:
    """Give a root PyroModule, and all within it, another name.

    Private, since AutoGuides take none.
    """
    root._pyro_set_supermodule(name, root._pyro_context)


def start_as_root(root: Any) -> None:
    """Let a module that was copied while Pyro ran it be a root of its own.

    Private, since a copy takes the context of the running original along.
    """
    root._pyro_context.used = False


def plain_child(module: nn.Module, name: str) -> nn.Module:
    """A submodule, read without telling Pyro.

    Private, since attribute access registers all its parameters with Pyro.
    """
    child: nn.Module | None = module._modules[name]
    assert child is not None
    return child


def plain_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter by its name, if there is one, read without telling Pyro.

    Private, since attribute access registers it, which unfreezes it.
    """
    own: dict[str, nn.Parameter] = module.__dict__.get("_parameters", {})
    return own.get(name)


def held_parameters() -> dict[str, Tensor]:
    """The unconstrained tensors of Pyro's store, which is what SVI trains.

    Private, since reading the store's items constrains them anew.
    """
    store: Any = pyro.get_param_store()
    held: dict[str, Tensor] = store._params
    return held


def restored_without_a_step(optimizer: PyroOptim) -> bool:
    """Whether an optimizer's restored state waits for its parameters.

    Private, since Pyro hands the state out at the next step and shows it nowhere.
    """
    return bool(optimizer._state_waiting_to_be_consumed)


def unpack_latent(guide: Any, unconstrained: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """The sites of an AutoContinuous guide, each with its part of the joint latent.

    Private, since AutoGuides split their latent for themselves.
    """
    sites: Iterator[tuple[Any, Tensor]] = guide._unpack_latent(unconstrained)
    return sites
