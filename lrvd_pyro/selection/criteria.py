"""Rank selection: removing the rank components that the posterior calls noise.

Log alpha has units. Take the rank gate under the log-uniform prior of weight w (its KL
weight times multiplicity), with N examples. In the quadratic regime and for large
alpha,

    alpha_i = sqrt(w / N) / t_i,   so   log alpha_i > tau  iff  t_i < e^-tau sqrt(w / N)

Here ``t_i^2 = s^2 (b_i^T H b_i) (a_i^T S a_i)``. t_i is the component's size: how far
it moves the outputs, in the metric H of the loss, over inputs of second moments S. For
small alpha, ``alpha_i = w / (N t_i^2)``. The same tau is therefore another size at
another N or KL weight. It says nothing about accuracy.

For FactorLoRA, alpha is the noise of *single* weights. Over d inputs that go together,
the signal of a rank adds up and its noise averages out. A component with log alpha of 3
may therefore still carry signal. ``criterion="elbo_drop"`` shares this blindness, since
it takes the curvature for isotropic. Measure before you trust either.

The default threshold of 3 suits FactorLoRA, pruned in training
(``examples/rank_selection.py``). Balance the gates of a GateLoRA first
(`lrvd_pyro.gauge`).

Another criterion is a branch of `prune`: the worth of each component, and which stay.

Source: derived here; log alpha > 3, Molchanov, Ashukha and Vetrov (2017, arXiv
1701.05369).
"""

from typing import Literal

import torch
from pyro import poutine
from torch import Tensor

from lrvd_pyro._numbers import check_count, check_number
from lrvd_pyro.guides.base import ClosedFormNoise, RankGuide
from lrvd_pyro.inference.kl import divergence
from lrvd_pyro.inference.per_example import Multiplicities, PerExample
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.optim import Optimizer
from lrvd_pyro.selection.removal import check_pair, select

__all__ = [
    "best_of_modules",
    "check_threshold",
    "prune",
    "refuse_nothing_left",
    "removal_cost",
]

_Criterion = Literal["log_alpha", "elbo_drop"]


def prune(
    model: RankModel,
    guide: RankGuide,
    optimizer: Optimizer | None = None,
    *,
    log_alpha_threshold: float = 3.0,
    criterion: _Criterion = "log_alpha",
    min_rank: int = 0,
    max_drop: float = 0.01,
    kl_weight: float = 1.0,
) -> Tensor:
    """Remove the rank components that a criterion gives up, as `select` does.

    "log_alpha" gives up the components with ``guide.log_alpha`` above the threshold.
    The docstring of `lrvd_pyro.selection.criteria` says what that means. "elbo_drop"
    gives up those of least `removal_cost`, as long as their sum stays at most
    ``max_drop * num_data`` nats.

    Example::

        keep = prune(model, guide, svi.optim)     # and go on training

    Args:
        model: A `GateLoRA` or `FactorLoRA`, trained.
        guide: Its guide, a `RankGuide`.
        optimizer: What trains them: of this library, Pyro or torch. None if nothing
            trains them yet, or nothing will.
        log_alpha_threshold: The largest log alpha that stays.
        criterion: "log_alpha" or "elbo_drop".
        min_rank: The least number of components that every module keeps, its best
            ones. DoRA modules always keep one, since their magnitude does not belong
            to a rank.
        max_drop: For "elbo_drop", in nats per datum.
        kl_weight: For "elbo_drop", the one that the guide was trained with.

    Returns:
        Which components stayed, bool (R,), R as before.

    Raises:
        TypeError: If ``guide`` is not a `RankGuide`; and as `select` and `removal_cost`
            raise it.
        ValueError: If everything would go, with a diagnosis. If the guide's noise is
            NaN, a number is out of range, or ``criterion`` is neither of the two. And
            as `select` raises it.
        RuntimeError: As `select` raises it. Nothing has changed after an error.

    Wrong while the KL weight still rises: the noise then belongs to another posterior
    than the one in training.
    """
    check_pair(model, guide)
    check_threshold(log_alpha_threshold)
    check_number("max_drop", max_drop, "nats per datum, 0 or more: 0.01", _is_cost)
    if criterion == "log_alpha":
        worth = -guide.log_alpha
        spared = best_of_modules(model, worth, min_rank)
        keep = spared | (worth >= -log_alpha_threshold)
        rule = f"log_alpha_threshold={log_alpha_threshold}"
    elif criterion == "elbo_drop":
        worth = removal_cost(model, guide, kl_weight)
        spared = best_of_modules(model, worth, min_rank)
        # Spared components come last, and the sum is infinite from there on.
        order = worth.masked_fill(spared, torch.inf).argsort()
        spent = worth[order].masked_fill(spared[order], torch.inf).cumsum(0)
        keep = spared.clone()
        keep[order] |= spent > max_drop * model.num_data
        rule = f"max_drop={max_drop}"
    else:
        raise ValueError(
            f'criterion={criterion!r}; expected "log_alpha" or "elbo_drop"'
        )
    refuse_nothing_left(model, guide, keep, rule)
    select(model, guide, optimizer, keep=keep)
    return keep


def removal_cost(model: RankModel, guide: RankGuide, kl_weight: float = 1.0) -> Tensor:
    """What removing each component would cost in expected log-likelihood, (R,) nats.

    No data are needed. Let the log-likelihood be quadratic in each gate, with curvature
    F, and let the gate have mean 1 and variance alpha. Where the objective is
    stationary in the noise,

        F alpha / 2 = g_i = -kl_weight dKL / d log v_i

    If v is not a multiple of alpha, ``d alpha_i / d log v_i`` takes the place of alpha.
    The objective is stationary too in the size of B (or of A, or the mean), on which no
    KL depends. The likelihood is then largest at a gate of 1 + alpha. Going from q to 0
    therefore costs

        F (1 + alpha_i) / 2 = g_i (1 / alpha_i + 1).

    For the tied noise of FactorLoRA the same holds with an isotropic curvature. With
    both sides random, alpha is the sum of the alphas of the two.

    Example::

        cheapest_first = removal_cost(model, guide).argsort()

    Args:
        model: A `GateLoRA` or `FactorLoRA`, trained.
        guide: Its guide, a `RankGuide` with `ClosedFormNoise`.
        kl_weight: The one that the guide was trained with.

    Returns:
        The cost of each component, (R,), in nats per data set.

    Raises:
        TypeError: If the guide's noise has no closed form. If the gate is not a product
            of latent sites under this prior, or no site has R components.
        ValueError: If the guide belongs to another model, its noise is NaN, or
            ``kl_weight`` is not positive and finite.

    Wrong before convergence, and far from the quadratic regime. Wrong about a center,
    which B scales too. Wrong under another ``kl_weight`` than that of training, or with
    a ``weight_prior`` or weight decay that matters. Wrong for several components
    together, where their effects correlate. For FactorLoRA the cost is too low where
    inputs align.

    Source: derived here.
    """
    check_pair(model, guide)
    weight = "the positive weight of training: kl_weight=1.0"
    check_number("kl_weight", kl_weight, weight, lambda w: 0 < w < torch.inf)
    if not isinstance(guide, ClosedFormNoise):
        raise TypeError(
            f"guide is a {type(guide).__name__}, whose noise has no closed form; use "
            f'criterion="log_alpha", or RankDiagonal(model)'
        )
    ratio = guide.noise_ratio()
    (pull,) = torch.autograd.grad(_kl(model, guide), guide.log_variance)
    (slope,) = torch.autograd.grad(ratio.sum(), guide.log_variance)
    _refuse_nan("the noise", guide.log_alpha)
    _refuse_nan("the gradient of the KL", pull)
    # Only a site with an entry per rank tells the curvature of each gate. A scale that
    # several ranks share has one entry for their sum.
    for part, rise in zip(guide.by_site(pull), guide.by_site(slope)):
        if rise.shape == ratio.shape and bool((rise != 0).any()):
            # Before convergence the pull may have either sign; a curvature has one.
            half_curvature = (-kl_weight * part).clamp(min=0) / rise
            cost: Tensor = half_curvature * (1 + ratio.detach())
            # Noise that cannot change alpha tells nothing: such a component stays.
            return cost.nan_to_num(nan=torch.inf, posinf=torch.inf)
    raise TypeError(
        "no latent site has one component per rank component, so that none can be "
        'removed alone; use criterion="log_alpha"'
    )


def best_of_modules(model: RankModel, worth: Tensor, min_rank: int) -> Tensor:
    """The ``min_rank`` components of greatest ``worth`` of each module, bool (R,).

    Raises:
        ValueError: If ``min_rank`` is negative, or ``worth`` has NaN.
    """
    check_count("min_rank", min_rank, 0, "prune(model, guide, min_rank=1)")
    _refuse_nan("log alpha", worth)
    space = model.space
    best = torch.zeros_like(worth, dtype=torch.bool)
    spares, dora = space.split(best), space.dora
    for name, worths in space.split(worth).items():
        floor = max(min_rank, int(name in dora))
        # The parts are views of ``best``.
        spares[name][worths.topk(min(floor, len(worths))).indices] = True
    return best


def check_threshold(log_alpha_threshold: float) -> None:
    """Raise a ValueError unless a threshold of log alpha is a number."""
    # Infinite ones mean something: all stay, or all but ``min_rank`` go.
    number = "a number: log_alpha_threshold=3.0"
    name = "log_alpha_threshold"
    check_number(name, log_alpha_threshold, number, lambda _: True)


def _is_cost(number: float) -> bool:
    return number >= 0


def _refuse_nan(what: str, values: Tensor) -> None:
    if count := int(values.isnan().sum()):
        raise ValueError(
            f"{what} is NaN for {count} of {len(values)} components: the training "
            f"diverged; train again, at a lower learning rate or with clip_norm: "
            f"lrvd_pyro.optim.AdamW(lr=1e-4, clip_norm=num_data)"
        )


def refuse_nothing_left(
    model: RankModel, guide: RankGuide, keep: Tensor, rule: str
) -> None:
    """Raise a ValueError with a diagnosis if no component would stay."""
    if keep.any():
        return
    log_alpha = guide.log_alpha
    counted = sum(fn.event_shape[0] for fn in model.latent_sites().values())
    raise ValueError(
        f"all {len(keep)} rank components would go: their log alpha lies between "
        f"{float(log_alpha.min()):.2f} and {float(log_alpha.max()):.2f}, {rule}. "
        f"Nothing was changed. The KL of {counted} latent components outweighs what "
        f"num_data={model.num_data} examples say. Is that the whole training set? Did "
        f"the KL warm up, RankELBO(kl_weight=linear_warmup(steps))? Temper it, "
        f"RankELBO(kl_weight=0.05), as FactorLoRA needs; or keep min_rank=1"
    )


def _kl(model: RankModel, guide: RankGuide, draws: int = 256) -> Tensor:
    """KL(guide || prior); a scale that other sites depend on is averaged over draws."""
    draws = draws if model.binds == "gates" else 1  # weights have no scales above them
    prior, posterior = PerExample(draws), PerExample(draws)
    multiplicities = Multiplicities()
    with torch.random.fork_rng(), poutine.block(), torch.enable_grad():
        torch.manual_seed(0)  # two calls give the same cost
        guide_trace = poutine.trace(posterior(guide)).get_trace()
        program = poutine.replay(multiplicities(prior(model.draw)), trace=guide_trace)
        prior_trace = poutine.trace(program).get_trace()
        once = prior.unexpanded, posterior.unexpanded
        kl, _ = divergence(
            prior_trace, guide_trace, once, draws, multiplicities.by_site
        )
    return torch.stack(list(kl.values())).sum()
