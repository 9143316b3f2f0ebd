"""The kinds of objects that a training run is made of, checked when it is resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lrvd_pyro.inference.elbo import RankELBO
from lrvd_pyro.storage.schema import Misfit, list_of, record, text

__all__ = ["Stateful", "check_kinds", "kinds_of", "listed"]

_Kinds = dict[str, list[str]]  # the class names under each argument of a checkpoint


class Stateful(Protocol):
    """An object that saves and restores its own state, as torch's schedulers do."""

    def state_dict(self) -> dict[str, Any]:
        """Dicts, lists and tuples of numbers, texts and tensors."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Go on where `state_dict` was taken."""


def listed(schedule: object) -> list[Any]:
    """One schedule, a list of them or None, as a list."""
    if schedule is None:
        return []
    return [*schedule] if isinstance(schedule, list | tuple) else [schedule]


def kinds_of(
    model: object,
    guide: object,
    optimizer: object,
    elbo: object,
    sampler: object,
    schedule: object,
) -> _Kinds:
    """Give the class names of the objects under each argument.

    Raises:
        TypeError: If one has no state to store.
    """
    if not isinstance(elbo, RankELBO):
        raise TypeError(
            f"elbo is a {type(elbo).__name__}; expected the RankELBO itself, which "
            f"makes elbo(model, guide) and is SVI's loss"
        )
    objects = {
        "model": [model],
        "guide": [guide],
        "optimizer": [optimizer],
        "sampler": [] if sampler is None else [sampler],
        "schedule": listed(schedule),
    }
    for name in ("sampler", "schedule"):
        for each in objects[name]:
            if not hasattr(each, "load_state_dict"):
                raise TypeError(
                    f"{name} is a {type(each).__name__} without state_dict and "
                    f"load_state_dict; expected lrvd_pyro's ResumableSampler or "
                    f"RankSchedule, or a scheduler of torch"
                )
    return {name: [_kind(each) for each in them] for name, them in objects.items()}


def check_kinds(path: Path, state: Any, present: Mapping[str, list[str]]) -> None:
    """Raise unless the same kinds of objects are present as were saved.

    Args:
        path: The checkpoint, for the message.
        state: Its state.
        present: The kinds of the objects that are to take it.

    Raises:
        ValueError: With the first argument whose kinds differ.
    """
    saved: Any = state.get("kinds") if isinstance(state, dict) else None
    try:
        record(dict.fromkeys(present, list_of(text)))(saved, "kinds")
    except Misfit as error:
        raise ValueError(f"{path}: {error}; resume an earlier checkpoint") from None
    for name in present:
        if saved[name] != present[name]:
            there, here = (", ".join(k[name]) or "None" for k in (saved, present))
            raise ValueError(
                f"{path} was written with {name}={there} and resume was given "
                f"{name}={here}; pass what that run had, made by the same call"
            )


def _kind(thing: object) -> str:
    # The top package alone: classes may move to another module between versions.
    package = type(thing).__module__.partition(".")[0]
    return f"{package}.{type(thing).__qualname__}"
