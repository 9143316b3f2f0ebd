"""One draw of the latent variables per example of a batch."""

import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch.distributions import Distribution

from lrvd_pyro._compat.pyro import messengers
from lrvd_pyro.inference.programs import Site, is_latent

__all__ = ["Multiplicities", "PerExample", "drawn_per_example"]


class PerExample(poutine.messenger.Messenger):
    """Draw every latent site once per example, and count its density once in all.

    Each latent site gets an independence frame of size B, left of the program's own
    plates. The scale of the site is multiplied by 1/B, so that the sum over examples of
    its log density becomes their mean. An ELBO whose likelihood is scaled by N/B
    therefore stays unbiased: each example is a Monte Carlo estimate with its own draw.
    All levels of a hierarchy are drawn together. Observed, deterministic and subsample
    sites stay as they are.

    Example::

        with PerExample(len(labels)):
            gate = guide(**batch)["gate"]      # B x R instead of R

    Wrong when the program mixes the leading axis of a value, as ``z / z.norm()`` does:
    the examples then see each other's draws.

    Args:
        size: The number of examples, B.

    Attributes:
        unexpanded: By site name, the distribution as the program gave it. Only sites
            that do not depend on another site's draw are listed.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.unexpanded: dict[str, Distribution] = {}

    def __enter__(self) -> "PerExample":
        self.unexpanded.clear()
        return super().__enter__()

    def _pyro_sample(self, msg: Site) -> None:
        if not is_latent(msg):
            return
        fn = msg["fn"]
        inner_dims = [f.dim for f in msg["cond_indep_stack"] if f.vectorized]
        dim = min(inner_dims, default=0) - 1
        shape = torch.broadcast_shapes(fn.batch_shape, (self.size, *[1] * (-dim - 1)))
        # A site below a drawn scale has the batch axis already.
        if shape != fn.batch_shape:
            self.unexpanded[msg["name"]] = fn
            msg["fn"] = fn.expand(shape)
        # A bare frame and no pyro.plate, which would add a subsample site of its own.
        frame = CondIndepStackFrame("_examples", dim, self.size, 0)
        msg["cond_indep_stack"] = (frame, *msg["cond_indep_stack"])
        msg["scale"] = msg["scale"] / self.size


class Multiplicities(poutine.messenger.Messenger):
    """Read the multiplicity of each site, ``infer={"multiplicity": w}``.

    The reader must wrap the program before `poutine.replay` does, since replaying
    against a guide replaces ``infer``.

    Attributes:
        by_site: The multiplicity of each site that has one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_site: dict[str, float] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if "multiplicity" in msg["infer"]:
            self.by_site[msg["name"]] = msg["infer"]["multiplicity"]


def drawn_per_example() -> bool:
    """Whether a `PerExample` wraps the program that runs at present."""
    return any(isinstance(handler, PerExample) for handler in messengers())
