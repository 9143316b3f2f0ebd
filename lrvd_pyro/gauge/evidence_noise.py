"""A trained pair, with the noise that the evidence allows."""

import copy
import math
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lrvd_pyro.batches import Batch, check_rereadable
from lrvd_pyro.gauge.marginal_likelihood import Evidence
from lrvd_pyro.gauge.sample_scale import sample_scale
from lrvd_pyro.gauge.weight_curvature import evidence
from lrvd_pyro.guides import RankDiagonal, RankGuide, RowDiagonal
from lrvd_pyro.guides.families import RealNoise
from lrvd_pyro.guides.weight_noise import WeightNoise
from lrvd_pyro.models import FactorLoRA
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.rank_space.rows import Side
from lrvd_pyro.selection.removal import check_pair

__all__ = ["noise_by_evidence"]

_Noise = Literal["scaled", "fisher", "tied"]
_Scalable = RankDiagonal | WeightNoise
_SIDES: tuple[Side, ...] = ("lora_A", "lora_B")
_ROUNDING = 1e-10  # of the largest Fisher information: the square of float error


def noise_by_evidence(
    model: RankModel,
    guide: RankGuide,
    batches: Iterable[Batch],
    *,
    noise: _Noise = "scaled",
    progress: bool = False,
) -> tuple[RankModel, RankGuide]:
    """Give a trained pair the noise that the evidence about A and B allows.

    A gate's KL counts 1 where its rank has d_in + d_out weights, so that the noise that
    training finds is too small. The posterior over all weights that the evidence gives
    has a noise on examples that were not trained on, whose cost is gamma_loo (see
    `Evidence`). The noise here is set so that its own quadratic cost is gamma_loo:

    - "scaled" keeps what training found and multiplies every variance by ``m =
      gamma_loo / sum_i alpha_i F_i``, F the exact Fisher information of each gate;
    - "fisher" makes another noise, ``alpha_i = gamma_loo / (R F_i)``: the optimum under
      ``LogUniform(multiplicity=gamma_loo / R)``, to first order in alpha;
    - "tied" is noise on A and B, with one variance per row a_i, proportional to ``1 /
      (mean of h over a_i + delta)``, and one per column of B; h is the diagonal of H.

    This is noise for ``predict(method="linearized")``. Draws break at it, where the
    network is not linear. The guide's own noise, which draws take, is therefore smaller
    (`sample_scale`), and ``guide.linearized_scale`` is the ratio of the two. Where the
    guide's bounds cut off variances, the ratio still makes the cost gamma_loo.

    Call it after training. Steps of SVI change the guide's variances and leave the
    ratio as it is: set ``guide.linearized_scale = 1.0`` before them.

    The cost is that of `evidence`, and a few hundred forward passes of some 100
    examples.

    Example::

        model, guide = noise_by_evidence(model, guide, loader)
        predict(model, guide, batches, method="linearized")

    and, for plain LoRA without training it further::

        model = GateLoRA(net, num_data=len(train))
        pair = noise_by_evidence(model, RankDiagonal(model), loader, noise="fisher")

    Args:
        model: A trained model.
        guide: Its guide: a `RankDiagonal` of the one site ``gate``, a `TiedDiagonal` or
            a `RowDiagonal`. For "tied" any `RankGuide` whose mean is the adapter.
        batches: The whole training set, more than once readable; labels are not needed.
        noise: One of the three.
        progress: Show a bar over the batches.

    Returns:
        The pair itself, its guide changed in place; for "tied" a `FactorLoRA` on the
        same network (the model itself, if it is one of both sides) and a `RowDiagonal`.
        The old pair still works; ``old_model.space.close()`` takes its hooks off.

    Raises:
        TypeError: If the likelihood lacks ``fisher_roots``, ``batches`` is one batch or
            can be read only once, or the guide is of another kind.
        ValueError: If there is no batch, there are more examples than ``num_data``, the
            network takes no draw per example, the evidence has no maximum, or numbers
            are not finite; if draws break at any noise; for "fisher", if a gate moves
            no prediction; for "tied", if the guide's mean is not the adapter. The pair
            is then as it was.

    Warns:
        UserWarning: If the batches are a part of the training set: the noise is then
            too small. And where `Evidence.gamma_loo` warns.

    Derived are delta, gamma_loo, and that the noise should cost as much. Assumed is
    that A and B maximize the likelihood, as training without weight decay has it, and
    that a network linear in them has the right uncertainty. The noise is then spread
    over R gates, or 2R rows and columns, which have nearly the same on examples of
    training and on others. Wrong after few steps: a network that is not yet sure of its
    training set gets noise that it does not need.

    Source: MacKay (1992); the count of examples left out and the scales, derived here.
    """
    if noise not in get_args(_Noise):
        raise ValueError(f'noise={noise!r}; expected "scaled", "fisher" or "tied"')
    check_rereadable(batches, "noise_by_evidence(model, guide, ")
    check_pair(model, guide)
    _check_guide(guide, noise)
    if noise == "tied":
        _check_mean(model, guide)
    found = evidence(model, guide, batches, progress=progress)
    cost = found.gamma_loo  # raises where there is none
    _warn_of_a_part(model, found)
    noisy: Any = guide
    if noise != "tied":
        _set_noise(model, noisy, found, cost, batches, noise)
        return model, noisy
    drawn = _weights_drawn(model)
    new = drawn is not model
    with drawn.space.binding.closed_on_failure() if new else nullcontext():
        noisy = RowDiagonal(drawn)
        _set_noise(drawn, noisy, found, cost, batches, noise)
    return drawn, noisy


def _set_noise(
    model: RankModel,
    guide: _Scalable,
    found: Evidence,
    cost: float,
    batches: Iterable[Batch],
    noise: _Noise,
) -> None:
    """Give the guide the noise of a cost, and the part of it that draws bear."""
    mean, variance = _moments(guide)
    information = _information(found, guide)
    if noise == "fisher":
        _check_all_seen(model, information)
        variance = 1 / information
    elif noise == "tied":
        assert isinstance(guide, WeightNoise)
        h = _mean_curvature(found, guide)
        variance = (1 / (h + found.precision))[guide.owner]
    most = cost / _cost(variance, information)
    scale = sample_scale(model, mean, variance, batches, most)
    log_variance = _log_variance(guide, scale * variance)
    # What the guide's bounds leave of it decides, so that the cost stays exact.
    held = log_variance[guide.owner] if isinstance(guide, WeightNoise) else log_variance
    ratio = cost / _cost(held.exp(), information)
    with torch.no_grad():
        guide.log_variance.copy_(log_variance)
    # Rounding of the logarithms should not tell two noises apart.
    guide.linearized_scale = 1.0 if math.isclose(ratio, 1, rel_tol=1e-5) else ratio


def _cost(variance: Tensor, information: Tensor) -> float:
    """The quadratic cost of a noise, in nats, twice."""
    cost = float((variance.double() * information.double()).sum())
    if not 0 < cost < math.inf:
        raise ValueError(
            f"the guide's noise costs {cost:.3g} nats on these batches; expected a "
            f"positive number: look for NaN in the guide, and pass batches that its "
            f"ranks move"
        )
    return cost


def _check_guide(guide: RankGuide, noise: str) -> None:
    gates = isinstance(guide, RankDiagonal) and all(
        name == "gate" and isinstance(family, RealNoise)
        for name, family in guide.families.items()
    )
    weights = isinstance(guide, WeightNoise)
    if noise == "tied" or gates or (weights and noise == "scaled"):
        return
    sites = sorted(getattr(guide, "families", []))
    over = f" over {sites}" if sites else ""
    raise TypeError(
        f"guide is a {type(guide).__name__}{over}; noise={noise!r} needs one variance "
        f"per gate: RankDiagonal on GateLoRA with a prior of one site, such as "
        f'LogUniform(); noise="tied" takes any guide'
    )


def _check_mean(model: RankModel, guide: RankGuide) -> None:
    """Refuse a mean at which the network is not that of A and B."""
    with torch.no_grad():
        mean = guide.mean()
        gates = model.binds == "gates"
        own = model.space.ones() if gates else model.space.flatten(*model.sides)
    if mean.shape == own.shape and torch.allclose(mean.to(own), own):
        return
    reason = (
        "some gates have a mean other than 1, which A and B alone do not have"
        if gates
        else f"the {type(guide).__name__} has another mean than A and B"
    )
    raise ValueError(
        f"{reason}; export_peft(folder, model, guide) folds the means into the "
        f"weights: make the model again on that adapter"
    )


def _warn_of_a_part(model: RankModel, found: Evidence) -> None:
    if found.scale > 1:
        warnings.warn(
            f"the batches have {round(model.num_data / found.scale)} examples of "
            f"num_data={model.num_data}. Each stands for {found.scale:.3g}, and its "
            f"copies are not left out with it, so that the noise is too small; pass "
            f"the whole training set",
            stacklevel=3,
        )


def _check_all_seen(model: RankModel, fisher: Tensor) -> None:
    """Refuse gates that move no prediction: nothing says how noisy they may be."""
    modules = model.space.coordinates["module"]
    unseen = ~(fisher > _ROUNDING * fisher.max())
    if silent := sorted({modules[i] for i in unseen.nonzero().flatten()}):
        raise ValueError(
            f"gates of {silent} move no prediction of these batches; pass batches that "
            f'use them, remove the gates, prune(model, guide), or take noise="scaled"'
        )


def _weights_drawn(model: RankModel) -> FactorLoRA:
    """The model itself if it draws A and B, else a `FactorLoRA` on the same network."""
    if isinstance(model, FactorLoRA) and model.sides == _SIDES:
        return model  # a second one would leave more hooks on the network
    return FactorLoRA(
        model.base_net,
        # A likelihood with parameters belongs to one model.
        likelihood=copy.deepcopy(model.likelihood),
        num_data=model.num_data,
        sides=_SIDES,
        adapter=model.space.adapter,
    )


def _moments(guide: _Scalable) -> tuple[Tensor, Tensor]:
    """Mean and variance of what the model binds, (R,) or (K,)."""
    with torch.no_grad():
        (law,) = guide.distributions().values()
        return law.mean, law.variance


def _information(found: Evidence, guide: RankGuide) -> Tensor:
    """The curvature about each number that the guide draws."""
    if isinstance(guide, WeightNoise):
        return found.curvature[: len(guide.owner)]  # A comes first
    assert found.gate_fisher is not None
    return found.gate_fisher


def _mean_curvature(found: Evidence, guide: WeightNoise) -> Tensor:
    """The mean of h over the weights that share a variance."""
    total = torch.zeros_like(guide.log_variance)
    total.index_add_(0, guide.owner, _information(found, guide).to(total))
    return total / guide.owner.bincount()


def _log_variance(guide: _Scalable, variance: Tensor) -> Tensor:
    """The parameter that has these variances, within the guide's bounds.

    Raises:
        ValueError: If one is not positive and finite.
    """
    if not (variance.isfinite() & (variance > 0)).all():
        raise ValueError(
            "a variance by evidence is 0 or not finite; look for NaN in the guide and "
            "in the adapter"
        )
    if not isinstance(guide, WeightNoise):
        return variance.log().clamp(*RealNoise.limits)
    first = torch.zeros_like(guide.log_variance)  # of those of each owner, all equal
    return first.scatter(0, guide.owner, variance.to(first)).log().clamp(*guide.bounds)
