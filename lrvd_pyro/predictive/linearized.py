"""The network linearized in its adapter: a Gaussian over what a likelihood sees."""

from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, constraints

from lrvd_pyro.batches import Batch, batch_size, gate_rows
from lrvd_pyro.inference.kl import latent_sites
from lrvd_pyro.inference.per_example import PerExample
from lrvd_pyro.inference.programs import Guide
from lrvd_pyro.inference.threads import alone_in_pyro
from lrvd_pyro.likelihoods.base import contrasts_of
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.models.singles import separable
from lrvd_pyro.rank_space.weight_taps import WeightTaps

__all__ = [
    "GateGaussian",
    "Linearized",
    "check_linearizable",
    "gate_gaussian",
    "normal_nodes",
]

# Of gates, where a guide's covariance has no closed form: in all, and at once.
_DRAWS, _CHUNK = 4096, 256
_NODES = 1024  # points of the Gaussian over contrasts
_WAY_OUT = 'predict(..., method="sample") needs none'


@dataclass(frozen=True)
class GateGaussian:
    """Mean and covariance under a posterior, ``diag(d) + F^T F``.

    They are those of the gates, R of them, or of K drawn weights.

    Attributes:
        mean: The mean, ``R`` or ``K``.
        diagonal: d, ``R`` or ``K``.
        factors: F, ``M x R`` or ``M x K``.
    """

    mean: Tensor
    diagonal: Tensor
    factors: Tensor

    @classmethod
    def of_draws(cls, gates: Tensor) -> "GateGaussian":
        """The sample mean and covariance of draws of the gate, ``S x R``.

        Raises:
            ValueError: If there is only one draw.
        """
        if len(gates) < 2:
            raise ValueError(
                "got 1 draw of the posterior; expected at least two, whose covariance "
                "the linearized predictive needs"
            )
        mean, scale = gates.mean(0), (len(gates) - 1) ** -0.5
        # The factors S x R stand for a covariance of R x R, which is never formed.
        return cls(mean, torch.zeros_like(mean), (gates - mean).mul_(scale))

    def widened(self, scale: float) -> "GateGaussian":
        """The Gaussian whose covariance is ``scale`` times this one."""
        factors = self.factors * scale**0.5
        return GateGaussian(self.mean, self.diagonal * scale, factors)

    def project(self, jacobian: Tensor) -> Tensor:
        """``J Cov J^T`` of each example, ``B x K x K``, for J ``B x K x R``."""
        diagonal, factors = self.diagonal.to(jacobian), self.factors.to(jacobian)
        spread = jacobian @ factors.T
        return (jacobian * diagonal) @ jacobian.mT + spread @ spread.mT


@torch.no_grad()
def gate_gaussian(model: RankModel, guide: Guide, batch: Batch) -> GateGaussian:
    """Mean and covariance of gates or weights under a guide.

    The closed form serves `RankDiagonal` where the gate is its only site, and the
    guides over weights. It also serves Pyro's Gaussian AutoGuides where gate or weights
    are the only site and real. All other guides of gates are drawn from 4,096 times.
    That costs no forward pass of the network and leaves an error of about 2% in a
    variance. A guide's ``linearized_scale`` multiplies the covariance.

    Args:
        model: The model.
        guide: Its guide, with parameters.
        batch: What the guide is called with.
    """
    known = _closed_form(model, guide)
    if known:
        return known.widened(getattr(guide, "linearized_scale", 1.0))
    if model.binds == "weights":
        raise TypeError(
            f"guide is a {type(guide).__name__}; the linearized predictive of weights "
            f"takes RowDiagonal(model), TiedDiagonal(model), or a Gaussian AutoGuide"
        )
    # Site by site, all draws together would take several times the gates' memory.
    chunks = range(_DRAWS // _CHUNK)
    draws = torch.cat([_gate_draws(model, guide, batch, _CHUNK) for _ in chunks])
    drawn = GateGaussian.of_draws(draws)
    return drawn.widened(getattr(guide, "linearized_scale", 1.0))


class Linearized:
    """Points of the network's linearized predictive, as draws, ``S x B x ...``.

    Let c(z) be the contrasts of the likelihood: logit differences, or a mean. J is
    their Jacobian at the posterior mean m of gates or weights, and V the covariance of
    these. The contrasts then follow ``Normal(c(m), J V J^T)``.

    The S = 1,024 points (2 K for K > 512 contrasts) are not random. They are a
    scrambled Sobol sequence through the Gaussian quantiles, with mean and covariance
    made exact.

    Where a layer mixes the rows of examples, they run one at a time (`separable`).

    The result is exact where the network is linear in what is drawn. Wrong when the
    posterior is wide enough to see the network's curvature.

    Args:
        model: The model; `check_linearizable` says whether it can be linearized.
        gaussian: Mean and covariance of its gates or weights.

    Raises:
        ValueError: From the call, if the examples of a batch see each other.

    Source: MacKay (1992), "The evidence framework applied to classification networks";
    Immer, Korzepa and Bauer (2021, arXiv 2008.08216).
    """

    def __init__(self, model: RankModel, gaussian: GateGaussian) -> None:
        self.model, self.gaussian = model, gaussian
        self._likelihood = contrasts_of(model.likelihood, type(self).__name__)

    def __call__(self, batch: Batch) -> Tensor:
        """The predictions for one batch, ``S x B x ...``."""
        mean, covariance = self.contrasts(batch)
        size = mean.shape[1]
        # More points than contrasts, else their covariance cannot be made exact.
        nodes = normal_nodes(max(_NODES, 2 * size), size).to(mean)
        draws = mean + torch.einsum("bjk,sk->sbj", _symmetric_root(covariance), nodes)
        return self._likelihood.from_contrasts(draws)

    def contrasts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean ``B x K`` and covariance ``B x K x K`` of the contrasts of a batch."""
        parts = [self._contrasts(part) for part in separable(self.model, [batch])]
        means, covariances = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(covariances)

    def _contrasts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.model.binds == "weights":
            return self._contrasts_of_weights(batch)
        parameter = self.model.space.weights("lora_A")[0]
        gates = gate_rows(self.gaussian.mean.to(parameter), batch)
        with torch.enable_grad(), self.model.bind(gates):
            mean = self._likelihood.contrasts(self.model.predictions(**batch))
            # Each example has a gate row of its own. So one backward pass of a sum over
            # the batch gives the gradient of that contrast for every example.
            rows = [_gradient(contrast, gates) for contrast in mean.sum(0)]
        return mean.detach(), self.gaussian.project(torch.stack(rows, 1).to(mean))

    def _contrasts_of_weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        space, size = self.model.space, batch_size(batch)
        taps = WeightTaps(space, space.sides)
        rows = []
        with torch.enable_grad(), taps.open(), self.model.bind(self.gaussian.mean):
            mean = self._likelihood.contrasts(self.model.predictions(**batch))
            for contrast in mean.sum(0):
                _, gradients = taps.gradients(contrast, size)
                rows.append(torch.cat([g.flatten(1) for g in gradients], 1))
        return mean.detach(), self.gaussian.project(torch.stack(rows, 1).to(mean))


def check_linearizable(model: RankModel) -> None:
    """Raise unless the model can be linearized in what it draws.

    Raises:
        TypeError: If the model draws neither gates nor weights, a layer is a DoRA
            layer, or the likelihood has no contrasts.
    """
    space = model.space
    if model.binds not in ("gates", "weights"):
        raise TypeError(
            f"the linearized predictive needs gates or weights, and "
            f"{type(model).__name__} draws {model.binds}; {_WAY_OUT}"
        )
    contrasts_of(model.likelihood, 'predict(..., method="linearized")')
    if space.dora:
        raise TypeError(
            f"the linearized predictive needs a gate per example, which the DoRA "
            f"layer {space.dora[0]!r} does not take; {_WAY_OUT}"
        )


def normal_nodes(count: int, size: int) -> Tensor:
    """Points of equal weight for a standard Gaussian, ``count x size``.

    Their mean is 0 and their covariance 1 to float error, if ``count > size``.
    """
    sobol: Any = torch.quasirandom.SobolEngine(size, scramble=True, seed=0)
    # A Sobol point may be 0 exactly, whose Gaussian quantile is infinite.
    uniform = sobol.draw(count, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    points = torch.special.ndtri(uniform)
    points = points - points.mean(0)
    # Whitening makes the covariance exact, so that a linear network gets its mean and
    # variance without quadrature error.
    whitener = torch.linalg.inv(_symmetric_root(points.T @ points / count))
    nodes: Tensor = points @ whitener
    return nodes


def _symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of positive semidefinite matrices, ``... x K x K``."""
    # A Cholesky factor would fail where contrasts outnumber ranks: J V J^T is singular.
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    return root


def _gradient(value: Tensor, gates: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value, gates, retain_graph=True)
    return gradient


def _closed_form(model: RankModel, guide: Guide) -> GateGaussian | None:
    """The Gaussian where the gate is the only latent site and its law is known."""
    sites = model.latent_sites()
    if set(sites) not in ({"gate"}, {"factor"}):
        return None
    if hasattr(guide, "distributions"):
        (law,) = guide.distributions().values()
        return _independent(law)
    # AutoGuides are Gaussian in unconstrained space: it is the gate's own only where
    # the gate is real.
    support: Any = next(iter(sites.values())).support
    is_real = getattr(support, "base_constraint", support) is constraints.real
    if not is_real or not hasattr(guide, "get_posterior"):
        return None
    posterior = guide.get_posterior()
    if isinstance(posterior, dist.LowRankMultivariateNormal):
        factors = posterior.cov_factor.T
        return GateGaussian(posterior.mean, posterior.cov_diag, factors)
    if isinstance(posterior, dist.MultivariateNormal):
        nothing = torch.zeros_like(posterior.mean)
        return GateGaussian(posterior.mean, nothing, posterior.scale_tril.T)
    is_normal = isinstance(getattr(posterior, "base_dist", posterior), dist.Normal)
    return _independent(posterior) if is_normal else None


def _independent(posterior: Distribution) -> GateGaussian:
    mean = posterior.mean
    return GateGaussian(mean, posterior.variance, mean.new_zeros(0, len(mean)))


@alone_in_pyro()
def _gate_draws(model: RankModel, guide: Guide, batch: Batch, count: int) -> Tensor:
    """Draws of the gate, ``count x R``, from one call of the guide."""
    # As if the batch had `count` examples with a draw each: one trace, all levels of a
    # hierarchy drawn together.
    trace = poutine.trace(PerExample(count)(guide)).get_trace(**batch)
    sites = latent_sites(trace)
    return model.value_at({name: site["value"] for name, site in sites.items()})
