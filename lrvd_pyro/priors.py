"""Priors over the rank components: small Pyro programs.

A prior is any callable from a `RankSpace` to the gate, a tensor of event shape (R,).
Every latent site in it has exactly one event dimension (`.to_event(1)`, a global scale
has shape (1,)), stands in no plate, and indexes by ``[..., index]``, so that the
program can be drawn once per batch or once per example::

    def centred(space):
        scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(1)).to_event(1))
        z = pyro.sample("z", dist.Normal(torch.ones(space.size), 1).to_event(1))
        return scale * z
"""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from lrvd_pyro import distributions, divergence
from lrvd_pyro.noise import PerExample
from lrvd_pyro.rank_space import RankSpace

Prior = Callable[[RankSpace], Tensor]

CONTRACT = """A prior maps a RankSpace to the gate, of event shape (R,):
  - every latent site has one event dimension: .to_event(1), a global scale shape (1,)
  - indexing is by [..., index], and nothing stands in a plate
  - no pyro.factor
for example
  def prior(space):
      scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(1)).to_event(1))
      z = pyro.sample("z", dist.Normal(torch.ones(space.size), 1).to_event(1))
      return scale * z"""


class LogUniform:
    """Scale-invariant gates, ``p(z) = 1 / |z|`` independently for each rank component.

    Improper, without scale: it goes with Gaussian guides, whose KL then depends on the
    noise-to-signal ratio alone. Site: ``gate``, event shape (R,).

    Source: Kingma, Salimans and Welling (2015, arXiv 1506.02557); Molchanov, Ashukha
    and Vetrov (2017, arXiv 1701.05369).
    """

    def __call__(self, space: RankSpace) -> Tensor:
        return pyro.sample("gate", self.distribution(space.size))

    def distribution(self, size: int) -> dist.TorchDistribution:
        """The density over ``size`` components, with one event dimension."""
        prior = distributions.LogUniform().expand([size])
        independent: dist.TorchDistribution = prior.to_event(1)  # type: ignore[no-untyped-call]
        return independent


def latent_sites(prior: Prior, space: RankSpace) -> dict[str, Distribution]:
    """The distributions of a prior's latent sites, from one run of it."""
    with torch.random.fork_rng(), poutine.block(), poutine.trace() as run:
        prior(space)
    return {
        name: site["fn"] for name, site in divergence.latent_sites(run.trace).items()
    }


def check_prior(prior: Prior, space: RankSpace) -> bool:
    """Run a prior with batches of 2, R and R + 1; raise where it breaks the contract.

    Returns:
        Whether the prior itself puts a site named ``gate`` into the trace.

    Raises:
        ValueError: With the contract and the offending site.
    """
    for batch in (2, space.size, space.size + 1):
        with torch.random.fork_rng(), poutine.block(), poutine.trace() as run:
            with PerExample(batch):
                try:
                    gate = prior(space)
                except (RuntimeError, ValueError, IndexError) as error:
                    raise _breach(f"it fails on a batch of {batch}: {error}") from error
        nodes: dict[str, Any] = run.trace.nodes
        for name, site in nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            if site["infer"].get("_deterministic"):
                continue
            if site["is_observed"]:
                raise _breach(f"site {name!r} is observed (or a pyro.factor)")
            if len(site["cond_indep_stack"]) != 1:
                raise _breach(f"site {name!r} stands in a plate")
            if site["fn"].event_dim != 1:
                raise _breach(
                    f"site {name!r} has {site['fn'].event_dim} event dimensions, not 1"
                )
        if gate.shape != (batch, space.size):
            raise _breach(
                f"the gate has shape {tuple(gate.shape)} on a batch of {batch}; "
                f"expected {(batch, space.size)}"
            )
        _check_rows(prior, space, gate, divergence.latent_sites(run.trace))
    return "gate" in run.trace.nodes


def _check_rows(prior: Prior, space: RankSpace, gate: Tensor, sites: Any) -> None:
    """Raise if an example's gate, or a density, depends on another example's draw."""
    for row in (0, 1):
        given = {name: site["value"][row] for name, site in sites.items()}
        with poutine.block(), poutine.trace() as run, poutine.condition(data=given):
            alone = prior(space)
        same = torch.allclose(alone, gate[row], equal_nan=True)
        for name, site in sites.items():
            fn: Any = run.trace.nodes[name]["fn"]
            density = site["fn"].log_prob(site["value"])[row]
            same &= torch.allclose(fn.log_prob(given[name]), density, equal_nan=True)
        if not same:
            raise _breach("an example's gate depends on the draws of other examples")


def _breach(problem: str) -> ValueError:
    return ValueError(f"the prior breaks its contract: {problem}\n{CONTRACT}")
