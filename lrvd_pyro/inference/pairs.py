"""Whether a guide belongs to a model."""

from typing import Any, TypeVar

from pyro.nn import PyroModule

from lrvd_pyro.inference.programs import Guide, Program

__all__ = ["paired"]

_Guide = TypeVar("_Guide", bound=Guide | None)


def paired(model: Program, guide: _Guide) -> _Guide:
    """The guide as it reads this model; whatever takes both calls this first.

    A rank-wise guide reads its model. Where model and guide were copied apart, the
    guide's copy holds a copy of the model that nobody trains or averages. What is
    returned shares the guide's parameters and reads the model given here.

    Other guides read no model. Their draws show whether they fit.

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
    rank_guide: Any = guide
    if hasattr(guide, "paired_with") and hasattr(model, "space"):
        rank_guide = rank_guide.paired_with(model)
    its_guide: _Guide = rank_guide
    return its_guide
