"""Priors over the rank components: small Pyro programs.

A prior is any callable from a `RankSpace` to the gate, a tensor of event shape (R,).
Every latent site in it has exactly one event dimension (`.to_event(1)`, a global scale
has shape (1,)), stands in no plate, and indexes by ``[..., index]``, so that the
program can be drawn once per batch or once per example::

    def centered(space):
        scale = pyro.sample("scale", dist.HalfCauchy(space.ones(1)).to_event(1))
        z = pyro.sample("z", dist.Normal(space.ones(), 1).to_event(1))
        return scale * z

Parameters to learn belong in a PyroModule, as in `ARD`. A dict ``start`` says where a
guide should start a site; elsewhere that is 1.

A scale of the gates means something only if A and B have one too: without
``GateLoRA(..., weight_prior=Normal(0, 1))`` the map b -> b s undoes it.
"""

from lrvd_pyro.priors.base import Prior
from lrvd_pyro.priors.gaussian import ARD, Normal
from lrvd_pyro.priors.hierarchical import Hierarchical, Horseshoe
from lrvd_pyro.priors.log_uniform import LogUniform, TruncatedLogUniform
from lrvd_pyro.priors.spike_slab import SpikeSlab

__all__ = [
    "ARD",
    "Hierarchical",
    "Horseshoe",
    "LogUniform",
    "Normal",
    "Prior",
    "SpikeSlab",
    "TruncatedLogUniform",
]
