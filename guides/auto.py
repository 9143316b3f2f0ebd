"""Pyro's AutoGuides, started where the network is the trained LoRA: at gate 1.

Pyro's own start is near gate 0, where B gets next to no gradient.
"""

from functools import partial
from typing import Any, Literal

import torch
from pyro.distributions import transforms as T
from pyro.distributions.torch_transform import ComposeTransformModule, TransformModule
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormalizingFlow,
    init_to_value,
)
from torch import Tensor, nn
from torch.distributions import biject_to

from lrvd_pyro._numbers import check_count, check_number
from lrvd_pyro.guides.fisher_laplace import FisherLaplace
from lrvd_pyro.guides.limits import refuse_large
from lrvd_pyro.inference.param_store import give_own_name
from lrvd_pyro.models.base import RankModel

__all__ = [
    "delta",
    "iaf",
    "laplace",
    "low_rank_multivariate_normal",
    "multivariate_normal",
]


def delta(model: RankModel) -> AutoDelta:
    """A point estimate of all latent sites (MAP), for priors with a mode.

    Wrong under a log-uniform prior and under a learned or latent scale: the objective
    has no minimum, and `RankELBO` refuses the pair.

    Example::

        svi = SVI(model, delta(model), AdamW(), loss=RankELBO())

    Args:
        model: The model.
    """
    return give_own_name(AutoDelta(model, init_loc_fn=_start(model)))


def multivariate_normal(
    model: RankModel, *, init_scale: float = 0.1
) -> AutoMultivariateNormal:
    """A Gaussian with full covariance over the L unconstrained latents.

    ``u ~ Normal(loc, Sigma)``, with about L^2 parameters. The KL is estimated by Monte
    Carlo.

    Example::

        svi = SVI(model, multivariate_normal(model), AdamW(), loss=RankELBO())

    Args:
        model: The model.
        init_scale: The standard deviation that each component starts at.

    Raises:
        ValueError: If there are more than 4,096 latent components.
    """
    refuse_large(_size(model), "a full covariance")
    return give_own_name(
        AutoMultivariateNormal(model, init_loc_fn=_start(model), init_scale=init_scale)
    )


def low_rank_multivariate_normal(
    model: RankModel, *, rank: int = 8, init_scale: float = 0.1
) -> AutoLowRankMultivariateNormal:
    """A Gaussian over the L unconstrained latents with covariance ``D + W W^T``.

    D is diagonal and W is ``L x rank``. The KL is estimated by Monte Carlo.

    Example::

        guide = low_rank_multivariate_normal(model, rank=16)
        svi = SVI(model, guide, AdamW(), loss=RankELBO())

    Args:
        model: The model.
        rank: The number of columns of W.
        init_scale: The standard deviation that each component starts at.
    """
    guide = AutoLowRankMultivariateNormal(
        model, init_loc_fn=_start(model), init_scale=init_scale, rank=rank
    )
    return give_own_name(guide)


def iaf(
    model: RankModel, *, hidden_dim: int | None = None, init_scale: float = 0.1
) -> AutoNormalizingFlow:
    """One inverse autoregressive flow over the L unconstrained latents.

    Its network has one hidden layer, and with it O(L^2) parameters. The KL is estimated
    by Monte Carlo.

    Example::

        svi = SVI(model, iaf(model), AdamW(), loss=RankELBO())

    Args:
        model: The model.
        hidden_dim: The units of the hidden layer, L at least; None takes L.
        init_scale: The scale of the flow's draws at its start.

    Raises:
        ValueError: If there are more than 4,096 latent components, ``hidden_dim`` is
            below L, or ``init_scale`` is not positive.

    Source: Kingma, Salimans, Jozefowicz et al. (2016, arXiv 1606.04934).
    """
    size = _size(model)
    refuse_large(size, "an autoregressive network")
    if hidden_dim is not None:
        check_count("hidden_dim", hidden_dim, size, "iaf(model, hidden_dim=None)")
    deviation = "a positive number: iaf(model, init_scale=0.1)"
    check_number("init_scale", init_scale, deviation, lambda sd: 0 < sd < torch.inf)
    start = {
        name: biject_to(site.support).inv(model.start()[name]).reshape(-1)
        for name, site in model.latent_sites().items()
    }
    loc = torch.cat(list(start.values()))
    # A partial and not a closure, so that the guide can be pickled.
    flow = partial(_flow, loc, init_scale, hidden_dim)
    return give_own_name(AutoNormalizingFlow(model, flow))


def laplace(
    model: RankModel, *, curvature: Literal["fisher", "hessian"] = "fisher"
) -> AutoLaplaceApproximation:
    """A point estimate that ``laplace_approximation`` turns into a Gaussian.

    Wrong where the posterior is skewed or has several modes.

    Example::

        guide = laplace(model)
        svi = SVI(model, guide, AdamW(), loss=RankELBO())
        svi.step(**batch)                        # and so on, to the mode
        gaussian = guide.laplace_approximation(batches)

    Args:
        model: The model.
        curvature: "fisher" for `FisherLaplace`. "hessian" for Pyro's own method, which
            takes one batch as keywords, and second derivatives of the whole network:
            load that with ``attn_implementation="eager"``.

    Raises:
        ValueError: If ``curvature`` is neither, or there are more than 4,096 latent
            components.
    """
    refuse_large(_size(model), "Laplace's covariance")
    if curvature not in ("fisher", "hessian"):
        raise ValueError(f'curvature={curvature!r}; expected "fisher" or "hessian"')
    family: Any = FisherLaplace if curvature == "fisher" else AutoLaplaceApproximation
    guide: AutoLaplaceApproximation = family(model, init_loc_fn=_start(model))
    return give_own_name(guide)


def _flow(loc: Tensor, scale: float, hidden_dim: int | None, size: int) -> Any:
    nets: Any = T.affine_autoregressive
    autoregressive = nets(size, hidden_dims=[hidden_dim or size])
    return ComposeTransformModule([autoregressive.to(loc), _Affine(loc, scale)])


class _Affine(TransformModule, T.AffineTransform):
    """An affine transform that moves with its guide."""

    def __init__(self, loc: Tensor, scale: float) -> None:
        # The cache lets the density come from the draw: a flow's inverse is not exact.
        start = nn.Buffer(loc, persistent=False)  # it follows from the model
        super().__init__(start, scale, cache_size=1)  # type: ignore[no-untyped-call]


def _size(model: RankModel) -> int:
    """The number of latent components."""
    return sum(value.numel() for value in model.start().values())


def _start(model: RankModel) -> Any:
    return init_to_value(values=model.start())
