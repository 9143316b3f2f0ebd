"""What a model, a guide and a site are to Pyro."""

from collections.abc import Callable
from typing import Any

from pyro.poutine.util import site_is_subsample

__all__ = ["Guide", "Program", "Site", "is_latent"]

# Pyro statements, in a module or a function, called with the batch as keywords.
Program = Callable[..., Any]
# A program whose latent sites are those of the model.
Guide = Program
# One node of a trace, and one message on its way to it: "type", "name", "fn", ...
Site = dict[str, Any]


def is_latent(site: Site) -> bool:
    """Whether a sample site is neither observed nor the indices of a subsample."""
    # Pyro's TypedDict for messages knows no distribution's attributes.
    message: Any = site
    return not message["is_observed"] and not site_is_subsample(message)
