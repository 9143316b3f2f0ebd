"""Whether a guide belongs to a model."""

from typing import Any, TypeVar

from pyro.nn import PyroModule

from lrvd_pyro._compat.pyro import innermost, model_of
from lrvd_pyro.inference.programs import Guide, Program

__all__ = ["paired"]

_Guide = TypeVar("_Guide", bound=Guide | None)


def paired(model: Program, guide: _Guide) -> _Guide:
    """The guide as it reads this model; whatever takes both calls this first.

    A rank-wise guide reads its model. Where model and guide were copied apart, the
    guide's copy holds a copy of the model that nobody trains or averages. What is
    returned shares the guide's parameters and reads the model given here.

    An AutoGuide knows the model that it was made on. Other guides read no model: their
    draws show whether they fit.

    Args:
        model: The model. Of a program that is not one, nothing is checked.
        guide: Its guide; None is given back.

    Raises:
        TypeError: If either is wrapped in another module, as by torch's AveragedModel.
        ValueError: If the guide was built on another model.
    """
    for name, part in (("model", model), ("guide", guide)):
        wrapped = None if isinstance(part, PyroModule) else getattr(part, "module", 0)
        if isinstance(wrapped, PyroModule):
            raise TypeError(
                f"{name} is a {type(part).__name__} around a {type(wrapped).__name__}; "
                f"expected that one itself: {name}.module"
            )
    pair = model_of(guide), innermost(model)
    theirs, here = (getattr(each, "space", None) for each in pair)
    lineages = [getattr(space, "lineage", ()) for space in (theirs, here)]
    if theirs and here and not {*lineages[0]} & {*lineages[1]}:
        raise ValueError(
            f"the {type(guide).__name__} was built on another model; pass both as they "
            f"were trained, or make it on this one: {type(guide).__name__}(model)"
        )
    rank_guide: Any = guide
    if hasattr(guide, "paired_with") and hasattr(pair[1], "space"):
        rank_guide = rank_guide.paired_with(pair[1])
    its_guide: _Guide = rank_guide
    return its_guide
