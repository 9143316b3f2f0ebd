"""The form of a checkpoint's state: every entry is checked before the first is used."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrvd_pyro.storage.config import check_origin
from lrvd_pyro.storage.fingerprint import fingerprint_form
from lrvd_pyro.storage.random_state import check_random_state
from lrvd_pyro.storage.schema import (
    Check,
    Misfit,
    anything,
    flag,
    like,
    list_of,
    number,
    optional,
    record,
    short,
    table_of,
    text,
    whole,
)
from lrvd_pyro.training.kinds import Stateful
from lrvd_pyro.training.tensors import Layout

__all__ = ["check_form", "check_tensors"]

_ranks = {
    "modules": list_of(text),
    "ranks": list_of(whole(1)),
    "origin": list_of(whole(0)),
}
_optimizer = {
    "steps": optional(whole(0)),
    "torch": text,
    "groups": list_of(record({"params": list_of(text)}, more=True)),
    "moments": table_of(table_of(anything)),
}


def check_form(
    path: Path,
    state: Any,
    *,
    sampler: Stateful | None,
    schedules: Sequence[Stateful],
) -> None:
    """Raise unless a state has the entries that `checkpoint` writes, of their kinds.

    Args:
        path: The checkpoint, for the message.
        state: What it holds.
        sampler: The sampler.
        schedules: The schedules, in order.

    Raises:
        ValueError: With the first entry that is not as expected.
    """
    checks: dict[str, Check] = {
        "kinds": table_of(list_of(text)),
        "ranks": record(_ranks),
        "layout": table_of(_layout),
        "base": fingerprint_form,
        "tensors": table_of(anything),
        "linearized_scale": number,
        "optimizer": record(_optimizer),
        "elbo": record({"step": whole(0)}),
        "sampler": _state_of(sampler),
        "schedule": list_of(anything),
        "random": check_random_state,
        "extra": anything,
    }
    try:
        record(checks)(state, "")
        check_origin(state["ranks"]["origin"], state["ranks"]["ranks"])
        if len(state["schedule"]) != len(schedules):
            expected = f"the states of {len(schedules)} schedules"
            raise Misfit("schedule", state["schedule"], expected)
        for i, (each, saved) in enumerate(zip(schedules, state["schedule"])):
            _state_of(each)(saved, f"schedule[{i}]")
    except Misfit as error:
        raise ValueError(f"{path}: {error}; resume an earlier checkpoint") from None


def check_tensors(path: Path, tensors: Mapping[str, Any], layout: Layout) -> None:
    """Raise unless tensors have the saved layout and finite numbers.

    Args:
        path: The checkpoint, for the message.
        tensors: Its tensors of model and guide, by name.
        layout: Their layout, which fits the run.

    Raises:
        ValueError: With the first that has not.
    """
    if names := sorted(tensors.keys() ^ layout.keys()):
        raise ValueError(
            f"{path} has tensors and a layout that differ in {short(names)}; resume an "
            f"earlier checkpoint"
        )
    for name, (dtype, shape, trains) in layout.items():
        tensor = tensors[name]
        found = getattr(tensor, "dtype", None), tuple(getattr(tensor, "shape", ()))
        if (str(found[0]), found[1]) != (dtype, tuple(shape)):
            reason = f"expected one of {dtype}, {list(shape)}"
        elif bool((~tensor.isfinite() if trains else tensor.isnan()).any()):
            reason = "it has NaN or infinity, expected finite numbers"
        else:
            continue
        raise ValueError(
            f"{path}: {name} is {short(tensor)}; {reason}; resume an earlier checkpoint"
        )


def _layout(value: object, place: str) -> None:
    """Accept (dtype, shape, whether it trains)."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise Misfit(place, value, "a dtype, a shape and whether it trains")
    for element, check in zip(value, (text, list_of(whole(0)), flag)):
        check(element, place)


def _state_of(thing: Stateful | None) -> Check:
    """The form of an object's state; that of a user's own class is its own matter."""
    if thing is None:
        return like(None)
    package = type(thing).__module__.partition(".")[0]
    if package not in ("lrvd_pyro", "torch"):
        return anything
    # Those of torch have a rate for each group of the optimizer.
    form = like(live := thing.state_dict(), fixed=package == "torch")
    if "lr_lambdas" not in live:
        return form
    # They hold the attributes of a user's own objects.
    entries = {name: like(value, fixed=True) for name, value in live.items()}
    count = len(live["lr_lambdas"])

    def attributes(value: Any, place: str) -> None:
        list_of(optional(table_of(anything)))(value, place)
        if len(value) != count:
            raise Misfit(place, value, f"{count} of them")

    return record(entries | {"lr_lambdas": attributes})
