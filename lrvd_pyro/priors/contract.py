"""What every prior must keep to, so that it can be drawn once per example."""

from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from lrvd_pyro.inference.kl import latent_sites
from lrvd_pyro.inference.per_example import PerExample
from lrvd_pyro.inference.programs import Site
from lrvd_pyro.priors.base import Prior
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["check_prior"]

_STRAIGHT_THROUGH = (
    dist.RelaxedBernoulliStraightThrough,
    dist.RelaxedOneHotCategoricalStraightThrough,
)
_CONTRACT = """A prior maps a RankSpace to the gate, of event shape (R,):
  - every latent site has one event dimension: .to_event(1), a global scale shape (1,)
  - indexing is by [..., index], and nothing stands in a plate
  - no pyro.factor; parameters stand in a PyroModule, not in pyro.param
for example
  def prior(space):
      scale = pyro.sample("scale", dist.HalfCauchy(space.ones(1)).to_event(1))
      z = pyro.sample("z", dist.Normal(space.ones(), 1).to_event(1))
      return scale * z"""


def check_prior(prior: Prior, space: RankSpace) -> bool:
    """Run a prior on small batches, and check its contract.

    The memory is linear in the number of rank components.

    Args:
        prior: The prior.
        space: The rank space of R components that the prior is for.

    Returns:
        Whether the prior itself puts a site named ``gate`` into the trace.

    Raises:
        ValueError: If the contract is broken, with the contract and the site.
    """
    # Where the batch is as large as a site, a scalar or a plain index broadcasts along
    # the wrong axis without an error. A size of its own tells the axes apart. Two such
    # sizes, since one may be a number that stands in the prior's own code.
    batch, told_apart, names_gate = 1, 0, False
    while told_apart < 2:
        batch += 1
        sites, names_gate = _check_on(prior, space, batch)
        sizes = {space.size, *(site["fn"].event_shape[0] for site in sites.values())}
        told_apart += batch not in sizes
    return names_gate


def _check_on(
    prior: Prior, space: RankSpace, batch: int
) -> tuple[dict[str, Site], bool]:
    """Check a prior on one size of batch.

    Returns:
        Its latent sites, and whether there is a site named ``gate``.
    """
    # A trial run: the random state and Pyro's store stay as they are.
    with (
        torch.random.fork_rng(),
        pyro.get_param_store().scope(),
        poutine.block(),
        poutine.trace() as run,
    ):
        with PerExample(batch):
            try:
                gate = prior(space)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise _breach(f"it fails on a batch of {batch}: {error}") from error
    _check_sites(prior, run.trace)
    if not isinstance(gate, Tensor):
        raise _breach(f"it returns {gate!r}; expected the gate, a tensor")
    if gate.shape != (batch, space.size):
        raise _breach(
            f"the gate has shape {tuple(gate.shape)} on a batch of {batch}; "
            f"expected {(batch, space.size)}"
        )
    if gate.isnan().any():
        raise _breach("the gate is NaN")
    nodes: dict[str, Any] = run.trace.nodes
    if "gate" in nodes and not torch.equal(nodes["gate"]["value"], gate):
        raise _breach("the site 'gate' is not what it returns; rename the site")
    sites = latent_sites(run.trace)
    _check_rows(prior, space, gate, sites)
    return sites, "gate" in nodes


def _check_sites(prior: Prior, trace: poutine.Trace) -> None:
    """Raise if a site of the trace breaks the contract."""
    registered = set(prior.parameters()) if isinstance(prior, nn.Module) else set()
    nodes: dict[str, Any] = trace.nodes
    for name, site in nodes.items():
        if site["type"] == "param" and _unconstrained(site["value"]) not in registered:
            raise _breach(f"{name!r} is a pyro.param; make the prior a PyroModule")
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if site["infer"].get("_deterministic"):
            continue
        if site["is_observed"]:
            raise _breach(f"site {name!r} is observed (or a pyro.factor)")
        # The one frame is that of PerExample.
        if len(site["cond_indep_stack"]) != 1:
            raise _breach(f"site {name!r} stands in a plate")
        if isinstance(getattr(site["fn"], "base_dist", site["fn"]), _STRAIGHT_THROUGH):
            raise _breach(
                f"site {name!r} is a straight-through draw, whose density is known for "
                f"the very tensor that was drawn and for no copy of it; take "
                f"pyro.distributions.RelaxedBernoulli, or priors.SpikeSlab() for exact "
                f"zeros"
            )
        if site["fn"].event_dim != 1:
            raise _breach(
                f"site {name!r} has {site['fn'].event_dim} event dimensions, not 1"
            )


def _unconstrained(value: object) -> object:
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _check_rows(
    prior: Prior, space: RankSpace, gate: Tensor, sites: dict[str, Site]
) -> None:
    """Raise if an example's gate, or a density, depends on another example's draw."""
    # An example alone, at the same draws, must give what it gave among others.
    for row in (0, 1):
        draws = {name: site["value"][row] for name, site in sites.items()}
        with poutine.block(), poutine.trace() as run, poutine.condition(data=draws):
            alone = prior(space)
        same = torch.allclose(alone, gate[row], equal_nan=True)
        for name, site in sites.items():
            fn: Any = run.trace.nodes[name]["fn"]
            density = site["fn"].log_prob(site["value"])[row]
            same &= torch.allclose(fn.log_prob(draws[name]), density, equal_nan=True)
        if not same:
            raise _breach("an example's gate depends on the draws of other examples")


def _breach(problem: str) -> ValueError:
    return ValueError(f"the prior breaks its contract: {problem}\n{_CONTRACT}")
