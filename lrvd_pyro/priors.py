"""Priors over the rank components: small Pyro programs.

A prior is any callable from a `RankSpace` to the gate, a tensor of event shape (R,).
Every latent site in it has exactly one event dimension (`.to_event(1)`, a global scale
has shape (1,)), stands in no plate, and indexes by ``[..., index]``, so that the
program can be drawn once per batch or once per example::

    def centred(space):
        scale = pyro.sample("scale", dist.HalfCauchy(space.ones(1)).to_event(1))
        z = pyro.sample("z", dist.Normal(space.ones(), 1).to_event(1))
        return scale * z

Parameters to learn belong in a PyroModule, as in `ARD`. A dict ``start`` says where a
guide should start a site; elsewhere that is 1.

A scale of the gates means something only if A and B have one too: without
``GateLoRA(..., weight_prior=Normal(0, 1))`` the map b -> b s undoes it.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro import distributions
from lrvd_pyro.groups import Level
from lrvd_pyro.naming import FreezableModule
from lrvd_pyro.rank_space import RankSpace

Prior = Callable[[RankSpace], Tensor]


class LogUniform:
    """Scale-invariant gates, ``p(z) = 1 / |z|`` independently for each rank component.

    Improper, without scale: it goes with Gaussian guides, whose KL then depends on the
    noise-to-signal ratio alone, and has neither draws nor a posterior for MCMC. Site:
    ``gate``, event shape (R,).

    Args:
        multiplicity: Count each gate as this many tied copies: `RankELBO` multiplies
            the site's log densities in model and guide, so its KL. The number of
            elements of A and B that a gate scales gives the strength of the published
            code's prior.

    Raises:
        ValueError: If ``multiplicity`` is not positive; or where the prior itself
            would be sampled, by MCMC or by `pyro.infer.Predictive` without guide.

    Source: Kingma, Salimans and Welling (2015, arXiv 1506.02557); Molchanov, Ashukha
    and Vetrov (2017, arXiv 1701.05369).
    """

    def __init__(self, multiplicity: float = 1.0) -> None:
        self.multiplicity = _positive("multiplicity", multiplicity)

    def __call__(self, space: RankSpace) -> Tensor:
        return self.sample("gate", space.size)

    def sample(self, site: str, size: int) -> Tensor:
        """Draw ``size`` components as one site."""
        prior = distributions.LogUniform().expand([size])
        independent: dist.TorchDistribution = prior.to_event(1)  # type: ignore[no-untyped-call]
        infer: Any = {"multiplicity": self.multiplicity}
        value: Tensor = pyro.sample(site, independent, infer=infer)
        return value


class TruncatedLogUniform:
    """Log-uniform gates on ``[exp(low), exp(high)]``, positive and proper.

    Scale-invariant within its bounds. Site: ``gate``, event shape (R,).

    Args:
        low: The lower bound of log z.
        high: The upper bound of log z.

    Raises:
        ValueError: If the interval does not hold log z = 0, where guides start.

    Source: Neklyudov, Molchanov, Ashukha and Vetrov (2017, arXiv 1705.07283).
    """

    def __init__(self, low: float = -20.0, high: float = 2.0) -> None:
        if not -math.inf < low < 0 < high < math.inf:
            raise ValueError(
                f"low={low}, high={high}; expected bounds of log z around 0, where "
                f"guides start: TruncatedLogUniform(-20.0, 2.0)"
            )
        self.low, self.high = low, high

    def __call__(self, space: RankSpace) -> Tensor:
        each = space.ones()
        prior = distributions.TruncatedLogUniform(self.low * each, self.high * each)
        return _sample("gate", prior)


class Normal:
    """Gates ~ Normal(0, scale): a Gaussian weight on each rank component.

    Proper; ``scale`` is in units of the gate, whose posterior mean `RankDiagonal` holds
    at 1. Were that mean learned, without ``weight_prior``, the minimum over it would be
    `ARD`. Site: ``gate``, event shape (R,).

    Raises:
        ValueError: If ``scale`` is not positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = _positive("scale", scale)

    def __call__(self, space: RankSpace) -> Tensor:
        return _sample("gate", dist.Normal(0 * space.ones(), self.scale))


class ARD(FreezableModule):
    """Gates ~ Normal(0, sqrt(gamma_i)), with gamma learned as part of the model.

    Automatic relevance determination. Proper given gamma. At the best gamma,
    ``1 + alpha``, the KL from N(1, alpha) is ``log(1 + 1/alpha) / 2`` nats: invariant
    to scale, and falling to 0 as 1/alpha. Site: ``gate``, event shape (R,); parameter
    ``log_gamma`` (R,), made when the prior first sees its rank space.

    Wrong as a density of anything: gamma is fitted to the data, so the objective is an
    evidence bound only for gamma fixed beforehand.

    Source: MacKay (1994); Tipping (2001).
    """

    def forward(self, space: RankSpace) -> Tensor:
        """Draw the site ``gate``."""
        if not hasattr(self, "log_gamma"):
            self.log_gamma = nn.Parameter(0 * space.ones())
        scale = torch.exp(0.5 * self.log_gamma)
        return _sample("gate", dist.Normal(torch.zeros_like(scale), scale))


class Horseshoe:
    """Products of half-Cauchy scales, one per level: the hierarchical gate prior.

    ``gate_i = global_scale * module_scale[m(i)] * rank_scale_i``, each half-Cauchy;
    heavy tails at 0 and at infinity, so that most ranks vanish and some stay as they
    are. With a ``slab`` c, ``gate = g / sqrt(1 + (g/c)^2)``, g being that product: no
    gate exceeds c.

    Proper; scales in units of the gate. Sites: ``global_scale`` (1,), ``module_scale``
    (M,), ``rank_scale`` (R,), as chosen; ``gate`` (R,) is deterministic.

    Args:
        scale: Of the highest level's half-Cauchy; those below have 1.
        levels: Which of "global", "module" and "rank" there are, from the top.
        slab: The bound c; None for no bound.

    Raises:
        ValueError: If ``scale`` or ``slab`` is not positive, or a level is unknown,
            missing or out of order.

    Source: Carvalho, Polson and Scott (2009); as group prior of layers, Louizos,
    Ullrich and Welling (2017, arXiv 1705.08665); the slab, here without a prior of its
    own, Piironen and Vehtari (2017, arXiv 1707.01694).
    """

    def __init__(
        self,
        scale: float = 1.0,
        *,
        levels: Sequence[Literal["global", "module", "rank"]] = (
            "global",
            "module",
            "rank",
        ),
        slab: float | None = None,
    ) -> None:
        known = ("global", "module", "rank")
        if not levels or tuple(levels) != tuple(x for x in known if x in levels):
            raise ValueError(
                f"levels={levels!r}; expected some of {known}, in this order"
            )
        self.scale = _positive("scale", scale)
        self.levels = tuple(levels)
        self.slab = None if slab is None else _positive("slab", slab)
        self.start: dict[str, float] = {}
        if self.slab is not None and self.slab > 1:  # where the gate is 1
            lowest = f"{self.levels[-1]}_scale"
            self.start[lowest] = 1 / math.sqrt(1 - self.slab**-2)

    def __call__(self, space: RankSpace) -> Tensor:
        gate = space.ones()
        scale = self.scale
        for level in self.levels:
            index = space.group(level)
            each = scale * space.ones(space.count(level))
            gate = gate * _sample(f"{level}_scale", dist.HalfCauchy(each))[..., index]
            scale = 1.0
        if self.slab is None:
            return gate
        gate = gate.clamp(max=1e9 * self.slab)  # no product overflows, none changes
        return gate / torch.hypot(torch.ones_like(gate), gate / self.slab)


class Hierarchical:
    """Gates of one family, with one scale per module, layer or module type.

    ``scale_g ~ HalfCauchy(1)``, ``gate_i ~ family(scale_g(i))``. Proper where the
    family is. Sites: ``<over>_scale`` (G,) and ``gate`` (R,).

    Args:
        family: From scales, ``... x R``, to a distribution of that batch shape:
            ``HalfCauchy``, ``HalfNormal``, ``partial(Normal, 0.0)``.
        over: What shares a scale: "module", "layer" or "type", as in
            `RankSpace.coordinates`.

    Raises:
        TypeError: If ``family`` is not callable.
        ValueError: If ``over`` is none of the three.
    """

    def __init__(
        self,
        family: Callable[[Tensor], dist.TorchDistribution] = dist.HalfCauchy,
        over: Level = "module",
    ) -> None:
        if not callable(family):
            raise TypeError(
                f"family={family!r}; expected a function from scales to a "
                f"distribution: Hierarchical(pyro.distributions.HalfNormal)"
            )
        if over not in ("module", "layer", "type"):
            raise ValueError(f'over={over!r}; expected "module", "layer" or "type"')
        self.family, self.over = family, over

    def __call__(self, space: RankSpace) -> Tensor:
        index = space.group(self.over)
        each = dist.HalfCauchy(space.ones(space.count(self.over)))
        scale = _sample(f"{self.over}_scale", each)
        return _sample("gate", self.family(scale[..., index]))


class SpikeSlab:
    """Gates in [0, 1] with exact zeros and ones: the hard concrete distribution.

    ``gate = clamp(1.2 sigmoid(gate_logit) - 0.1, 0, 1)``, ``gate_logit`` logistic with
    scale ``1 / temperature`` and the location at which a gate is not 0 with
    probability ``inclusion``. A relaxation of independent Bernoulli gates, whose
    posterior it approaches at low temperature only.

    Proper; a density of ``gate_logit``, so any guide will do. Sites: ``gate_logit``
    (R,); ``gate`` (R,) is deterministic.

    Raises:
        ValueError: If ``inclusion`` is not between 0 and 1, or ``temperature`` is not
            positive.

    Source: Louizos, Welling and Kingma (2018, arXiv 1712.01312).
    """

    start = {"gate_logit": math.log(11)}  # the least logit whose gate is 1

    def __init__(self, inclusion: float = 0.5, temperature: float = 0.5) -> None:
        if not 0 < inclusion < 1:
            raise ValueError(
                f"inclusion={inclusion}; expected the probability that a gate is not "
                f"0, between 0 and 1: SpikeSlab(0.5)"
            )
        self.temperature = _positive("temperature", temperature)
        self.inclusion = inclusion

    def __call__(self, space: RankSpace) -> Tensor:
        odds = math.log(self.inclusion / (1 - self.inclusion))
        loc = odds / self.temperature - math.log(11)
        prior = dist.Logistic(loc * space.ones(), 1 / self.temperature)
        logit = _sample("gate_logit", prior)
        return torch.clamp(1.2 * logit.sigmoid() - 0.1, 0.0, 1.0)


def _sample(site: str, prior: dist.TorchDistribution) -> Tensor:
    value: Tensor = pyro.sample(site, prior.to_event(1))
    return value


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, Real) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r}; expected a positive number")
    return float(value)
