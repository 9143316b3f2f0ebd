"""One draw of the latent variables per example of a batch."""

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch.distributions import Distribution

from lrvd_pyro._compat.pyro import messengers


class PerExample(poutine.messenger.Messenger):
    """Draw every latent site once per example, and count its density once in all.

    Each latent sample site of the wrapped program gets an independence frame of size B,
    left of the program's own plates, and its scale is multiplied by 1/B: the sum over
    examples of the site's log density becomes their mean. So an ELBO whose likelihood
    is scaled by N/B stays unbiased: example b is a Monte Carlo estimate with its own
    draw. All levels of a hierarchy are drawn together. Observed, deterministic and
    subsample sites stay as they are.

    Args:
        size: The number of examples, B.

    Attributes:
        unexpanded: For each site that did not depend on another site's draw, its
            distribution as the program gave it.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.unexpanded: dict[str, Distribution] = {}

    def __enter__(self) -> "PerExample":
        self.unexpanded.clear()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        fn = msg["fn"]
        inner = [f.dim for f in msg["cond_indep_stack"] if f.vectorized]
        dim = min(inner, default=0) - 1
        shape = torch.broadcast_shapes(fn.batch_shape, (self.size, *[1] * (-dim - 1)))
        if shape != fn.batch_shape:
            self.unexpanded[msg["name"]] = fn
            msg["fn"] = fn.expand(shape)
        frame = CondIndepStackFrame("_examples", dim, self.size, 0)
        msg["cond_indep_stack"] = (frame, *msg["cond_indep_stack"])
        msg["scale"] = msg["scale"] / self.size


class Multiplicities(poutine.messenger.Messenger):
    """Note what sites say of their multiplicity, ``infer={"multiplicity": w}``.

    Replaying a program against its guide replaces ``infer``; this stands before it.

    Attributes:
        found: By site.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, float] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if "multiplicity" in msg["infer"]:
            self.found[msg["name"]] = msg["infer"]["multiplicity"]


def drawn_per_example() -> bool:
    """Whether a `PerExample` is at work around the running program."""
    return any(isinstance(handler, PerExample) for handler in messengers())
