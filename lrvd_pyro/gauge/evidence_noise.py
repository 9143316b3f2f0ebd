"""A trained pair, with the noise that the evidence allows."""

import copy
from collections.abc import Iterable
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
from lrvd_pyro.selection.removal import check_pair

__all__ = ["noise_by_evidence"]

_Noise = Literal["scaled", "fisher", "tied"]
_Scalable = RankDiagonal | WeightNoise


def noise_by_evidence(
    model: RankModel,
    guide: RankGuide,
    batches: Iterable[Batch],
    *,
    noise: _Noise = "scaled",
    sampled: bool | None = None,
    generator: torch.Generator | None = None,
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
    (`sample_scale`), and ``guide.linearized_scale`` is the ratio of the two.

    The cost is that of `evidence`, and 64 forward passes of 128 examples.

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
        batches: The training set, more than once readable; labels are not needed.
        noise: One of the three.
        sampled: See `evidence`.
        generator: The random state of the signs, if any.
        progress: Show a bar over the batches.

    Returns:
        The pair itself, its guide changed in place; for "tied" a `FactorLoRA` on the
        same network and a `RowDiagonal`.

    Raises:
        TypeError: If the likelihood lacks ``fisher_roots``, ``batches`` is one batch or
            can be read only once, or the guide is of another kind.
        ValueError: If there is no batch, the network takes no draw per example, or the
            evidence has no maximum; for "fisher", if a gate moves no prediction; for
            "tied", if gates have means other than 1. The pair is then as it was.

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
    found = evidence(
        model,
        guide,
        batches,
        sampled=sampled,
        generator=generator,
        progress=progress,
    )
    cost = found.gamma_loo  # raises where there is none
    noisy: Any = guide
    most = 1.0
    if noise == "tied":
        model, noisy = _tied(model, guide, found)
    mean, variance = _moments(noisy)
    if noise == "fisher":
        assert found.gate_fisher is not None
        _check_all_seen(model, found.gate_fisher)
        variance = cost / (len(mean) * found.gate_fisher)
    else:
        most = cost / float((variance * _information(found, noisy)).sum())
    scale = sample_scale(model, mean, variance, batches, most)
    _set_variance(noisy, scale * variance)
    noisy.linearized_scale = most / scale
    return model, noisy


def _check_guide(guide: RankGuide, noise: str) -> None:
    gates = isinstance(guide, RankDiagonal) and all(
        name == "gate" and isinstance(family, RealNoise)
        for name, family in guide.families.items()
    )
    weights = isinstance(guide, WeightNoise)
    if noise == "tied" or gates or (weights and noise == "scaled"):
        return
    raise TypeError(
        f"guide is a {type(guide).__name__} over "
        f"{sorted(getattr(guide, 'families', []))}; noise={noise!r} needs one variance "
        f"per gate: RankDiagonal on GateLoRA with a prior of one site, such as "
        f'LogUniform(); noise="tied" takes any guide'
    )


def _check_mean(model: RankModel, guide: RankGuide) -> None:
    """Refuse gates of another mean than 1, at which the network is not A and B's."""
    if model.binds == "gates" and not torch.allclose(guide.mean(), model.space.ones()):
        raise ValueError(
            "some gates have a mean other than 1, which A and B alone do not have; "
            "export_peft(folder, model, guide) folds the means into B: make the model "
            "again on that adapter"
        )


def _check_all_seen(model: RankModel, fisher: Tensor) -> None:
    """Refuse gates that move no prediction: nothing says how noisy they may be."""
    modules = model.space.coordinates["module"]
    if silent := sorted({modules[i] for i in (fisher == 0).nonzero().flatten()}):
        raise ValueError(
            f"gates of {silent} move no prediction of these batches; pass batches that "
            f'use them, remove the gates, prune(model, guide), or take noise="scaled"'
        )


def _tied(
    model: RankModel, guide: RankGuide, found: Evidence
) -> tuple[FactorLoRA, RowDiagonal]:
    """A rank-tied Laplace approximation on the same network."""
    # A likelihood with parameters belongs to one model.
    drawn = FactorLoRA(
        model.base_net,
        likelihood=copy.deepcopy(model.likelihood),
        num_data=model.num_data,
        sides=("lora_A", "lora_B"),
        adapter=model.space.adapter,
    )
    rows = RowDiagonal(drawn)
    _set_variance(rows, 1 / (_mean_curvature(found, rows) + found.precision))
    return drawn, rows


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


@torch.no_grad()
def _set_variance(guide: _Scalable, variance: Tensor) -> None:
    """Set the variances, within the guide's bounds; those of weights by their owner."""
    limits = RealNoise.limits
    if isinstance(guide, WeightNoise):
        limits = guide.bounds
        if len(variance) != len(guide.log_variance):  # by weight
            first = torch.zeros_like(guide.log_variance)
            variance = first.scatter(0, guide.owner, variance.to(first))
    guide.log_variance.copy_(variance.log().clamp(*limits))
