"""Priors over the rank components: small Pyro programs.

A prior is any callable from a `RankSpace` to the gate, a tensor of event shape (R,). It
runs once per pass, and its sites are drawn for the batch or for each example at once.
It therefore keeps three rules:

- Every latent site has exactly one event dimension, ``.to_event(1)``; a global scale
  has shape (1,). No site stands in a plate, and no prior uses `pyro.factor`.
- Indices stand last, ``scale[..., index]``: a draw per example is ``B x R``.
- Parameters to learn belong in a PyroModule, as in `ARD`, and not in `pyro.param`.

`GateLoRA` runs the prior when it is made, and shows the contract where it is broken.

A scale of the gates means something only if A and B have one too. Without
``GateLoRA(..., weight_prior=Normal(0, 1))`` the map b -> b s undoes it. Guides start
every site at 1. An attribute ``start``, a dict from site name to number, changes that;
a site whose support ends there needs it.

Example, with one scale that all gates share::

    import pyro
    from pyro import distributions as dist

    def laplace(space):
        scale = pyro.sample("scale", dist.HalfCauchy(space.ones(1)).to_event(1))
        gates = dist.Laplace(0 * space.ones(), scale)
        return pyro.sample("gate", gates.to_event(1))

    on_weights = dist.Normal(0.0, 1.0)
    model = GateLoRA(net, prior=laplace, weight_prior=on_weights, num_data=len(train))
    guide = RankDiagonal(model, learn_mean=True)

`RankSpace.group` gives the index of a scale per module, layer or type; `Hierarchical`
shows how. ``lrvd_pyro.testing.assert_ok`` proves that a prior trains, predicts, saves
and loads. A prior for this package goes to a file of its own here. It is imported
below, and gets a line in tests/helpers/families.py.
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
