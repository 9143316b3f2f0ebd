"""Private parts of Pyro."""

import inspect
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pyro
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.nn import PyroModule
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger, unwrap
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

__all__ = [
    "held_parameters",
    "innermost",
    "mcmc_is_running",
    "messengers",
    "model_of",
    "name_in_tree",
    "name_of",
    "other_thread_in_pyro",
    "plain_child",
    "plain_parameter",
    "rename",
    "restored_without_a_step",
    "start_as_root",
    "unpack_latent",
]


def messengers() -> list[Messenger]:
    """The effect handlers around the running program.

    Private, since a handler sees its messages and not the other handlers.
    """
    return _PYRO_STACK


def mcmc_is_running() -> bool:
    """Whether `pyro.infer.mcmc` runs the present program.

    Read from the frames of the call, since MCMC leaves no mark in the program's trace.
    """
    return _within(inspect.currentframe(), ("pyro.infer.mcmc",))


def other_thread_in_pyro(*modules: str) -> str | None:
    """The name of another thread that runs code of these modules of Pyro, if any.

    Read from the frames of the threads, since a handler does not say who entered it.
    """
    if threading.active_count() == 1:
        return None
    frames, me = sys._current_frames(), threading.get_ident()
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if thread.ident != me and _within(frame, modules):
            return thread.name
    return None


def _within(frame: FrameType | None, modules: tuple[str, ...]) -> bool:
    """Whether a frame, or one that called it, runs code of these modules."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(modules):
            return True
        frame = frame.f_back
    return False


def name_of(module: PyroModule) -> str:
    """The name under which Pyro's store keeps the parameters of a root module.

    Private, since a PyroModule accepts a name and no public name returns it.
    """
    name: str = module._pyro_name
    return name


def name_in_tree(module: object) -> str:
    """The name of a PyroModule that is a child of another; "" of anything else.

    Private for the same reason as `name_of`.
    """
    return getattr(module, "_pyro_name", "")


def innermost(program: object) -> Any:
    """The program within Pyro's handlers, or within other wrappers.

    Private, since the module of Pyro's own ``unwrap`` does not list it.
    """
    while True:
        inner = unwrap(inspect.unwrap(program))  # type: ignore[arg-type]
        if inner is program:
            return inner
        program = inner


def model_of(guide: object) -> Any:
    """The program that an AutoGuide was made for; None of any other guide, or a copy.

    Private, since a copied AutoGuide raises where its model is read.
    """
    held = getattr(guide, "_model", None)
    return innermost(held[0]) if isinstance(held, tuple) and held else None


def rename(root: PyroModule, name: str) -> None:
    """Give a root PyroModule, and all modules within it, another name.

    Private, since AutoGuides accept no name.
    """
    root._pyro_set_supermodule(name, root._pyro_context)


def start_as_root(root: PyroModule) -> None:
    """Make a module that was copied while Pyro ran it a root of its own.

    Private, since the copy has the context of the running original, marked as used.
    """
    root._pyro_context.used = False


def plain_child(module: nn.Module, name: str) -> nn.Module:
    """A submodule, read without a Pyro statement.

    Private, since attribute access on a PyroModule registers all its parameters.
    """
    child: nn.Module | None = module._modules[name]
    assert child is not None
    return child


def plain_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter by its name, or None, read without a Pyro statement.

    Private, since attribute access on a PyroModule registers it, which unfreezes it.
    """
    # through __dict__, since unpickling reads attributes before _parameters exists
    parameters: dict[str, nn.Parameter] = module.__dict__.get("_parameters", {})
    return parameters.get(name)


def held_parameters() -> dict[str, Tensor]:
    """The unconstrained tensors of Pyro's store, which are what SVI trains.

    Private, since ``items()`` of the store returns newly constrained tensors.
    """
    store: Any = pyro.get_param_store()
    held: dict[str, Tensor] = store._params
    return held


def restored_without_a_step(optimizer: PyroOptim) -> bool:
    """Whether an optimizer's restored state still waits for its parameters.

    Private, since Pyro assigns that state at the next step and shows it nowhere.
    """
    return bool(optimizer._state_waiting_to_be_consumed)


def unpack_latent(
    guide: AutoContinuous, unconstrained: Tensor
) -> Iterator[tuple[Any, Tensor]]:
    """The sites of an AutoContinuous guide, each with its part of the joint latent.

    Private, since an AutoGuide splits its latent only for its own use.
    """
    sites: Iterator[tuple[Any, Tensor]] = guide._unpack_latent(unconstrained)
    return sites
