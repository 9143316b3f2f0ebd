"""Rank selection: removing the rank components that the posterior calls noise.

Log alpha has units. For the rank gate under the log-uniform prior of weight w (its KL
weight times multiplicity) and N examples, in the quadratic regime and for large alpha,

    alpha_i = sqrt(w / N) / t_i,   so   log alpha_i > tau  iff  t_i < e^-tau sqrt(w / N)

with ``t_i^2 = s^2 (b_i^T H b_i) (a_i^T S a_i)`` the component's size: what it moves the
outputs in the metric H of the loss over inputs of second moment S (for small alpha,
``alpha_i = w / (N t_i^2)``). The same tau is thus another size at another N or KL
weight, and says nothing of accuracy.

For FactorLoRA alpha is the noise of *single* weights. Over d inputs that go together
the signal of a rank adds up and its noise averages out, so that a component with
log alpha of 3 may still carry signal; ``criterion="elbo_drop"`` shares this blindness,
as it takes the curvature for isotropic. Measure before you trust either.

The default of 3 suits FactorLoRA, pruned in training (``examples/rank_selection.py``);
balance the gates of a GateLoRA first (`lrvd_pyro.gauge`).

Source: derived here; log alpha > 3, Molchanov, Ashukha and Vetrov (2017, arXiv
1701.05369).
"""

from typing import Literal

import torch
from pyro import poutine
from torch import Tensor

from lrvd_pyro.guides.base import ClosedFormNoise, RankGuide
from lrvd_pyro.inference.kl import divergence
from lrvd_pyro.inference.per_example import Multiplicities, PerExample
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.optim import Optimizer
from lrvd_pyro.selection.removal import check_pair, select

Criterion = Literal["log_alpha", "elbo_drop"]


def prune(
    model: RankModel,
    guide: RankGuide,
    optimizer: Optimizer | None = None,
    *,
    log_alpha_threshold: float = 3.0,
    criterion: Criterion = "log_alpha",
    min_rank: int = 0,
    max_drop: float = 0.01,
    kl_weight: float = 1.0,
) -> Tensor:
    """Remove the rank components that a criterion gives up, as `select` does.

    "log_alpha" gives up those with ``guide.log_alpha`` above the threshold; the head of
    this file says what that means. "elbo_drop" gives up those of least `removal_cost`,
    as long as their sum stays under ``max_drop * num_data`` nats.

    Example::

        keep = prune(model, guide, svi.optim)     # and go on training

    Args:
        model: A `GateLoRA` or `FactorLoRA`, trained.
        guide: Its guide, a `RankGuide`.
        optimizer: What trains them: of this library, Pyro or torch. None if nothing
            does yet, or any more.
        log_alpha_threshold: The largest log alpha that stays.
        criterion: "log_alpha" or "elbo_drop".
        min_rank: What every module keeps at least, its best ones. DoRA modules keep
            one in any case, since their magnitude is no part of a rank.
        max_drop: For "elbo_drop", in nats per datum.
        kl_weight: For "elbo_drop", the one that the guide was trained with.

    Returns:
        Which components stayed, bool (R,), R as before.

    Raises:
        TypeError: If ``guide`` is not a `RankGuide`; and as `select` and `removal_cost`
            raise it.
        ValueError: If everything would go, with a diagnosis; if log alpha is NaN; or as
            `select` raises it. Nothing has changed then.
    """
    check_pair(model, guide)
    if criterion == "log_alpha":
        worth = -guide.log_alpha
        spared = best_of_modules(model, worth, min_rank)
        keep = spared | (worth >= -log_alpha_threshold)
        rule = f"log_alpha_threshold={log_alpha_threshold}"
    elif criterion == "elbo_drop":
        worth = removal_cost(model, guide, kl_weight)
        spared = best_of_modules(model, worth, min_rank)
        order = worth.masked_fill(spared, torch.inf).argsort()
        spent = worth[order].masked_fill(spared[order], torch.inf).cumsum(0)
        keep = torch.zeros_like(spared)
        keep[order] = spent > max_drop * model.num_data
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

    Nats per data set; no data are needed. Let the log-likelihood be quadratic in each
    gate, with curvature F, and the gate have mean 1 and variance alpha. Where the
    objective is stationary in the noise,

        F alpha / 2 = g_i = -kl_weight dKL / d log v_i

    (with ``d alpha_i / d log v_i`` for alpha where v is no multiple of it), and where
    it is stationary in the size of B (or of A, or the mean), on which no KL depends,
    the likelihood is largest at a gate of 1 + alpha. So going from q to 0 costs

        F (1 + alpha_i) / 2 = g_i (1 / alpha_i + 1).

    For the tied noise of FactorLoRA the same holds with an isotropic curvature; with
    both sides random, alpha is the sum of those of the two.

    Wrong before convergence, far from the quadratic regime, about a center, which B
    scales too, under another ``kl_weight`` than that of training, or with a
    ``weight_prior`` or weight decay that matters; of several components together, where
    their effects correlate; for FactorLoRA, too low where inputs align.

    Raises:
        TypeError: If the gate is no product of latent sites, one of them with R
            components, under this prior.
    """
    check_pair(model, guide)
    if not isinstance(guide, ClosedFormNoise):
        raise TypeError(
            f"guide is a {type(guide).__name__}, of whose noise no closed form is "
            f'known; use criterion="log_alpha", or RankDiagonal(model)'
        )
    ratio = guide.noise_ratio()
    (pull,) = torch.autograd.grad(_kl(model, guide), guide.log_variance)
    (slope,) = torch.autograd.grad(ratio.sum(), guide.log_variance)
    for part, rise in zip(guide.by_site(pull), guide.by_site(slope)):
        if rise.shape == ratio.shape and bool((rise != 0).any()):
            half_curvature = (-kl_weight * part).clamp(min=0) / rise
            cost: Tensor = half_curvature * (1 + ratio.detach())
            return cost.nan_to_num(nan=torch.inf, posinf=torch.inf)
    raise TypeError(
        "no latent site has one component per rank component, so that none can be "
        'removed alone; use criterion="log_alpha"'
    )


def best_of_modules(model: RankModel, worth: Tensor, min_rank: int) -> Tensor:
    """The ``min_rank`` components of greatest ``worth`` of each module, bool (R,)."""
    if min_rank < 0:
        raise ValueError(f"min_rank={min_rank}; expected 0 or more")
    if worth.isnan().any():
        raise ValueError(
            f"log alpha is NaN for {int(worth.isnan().sum())} rank components: the "
            f"training diverged; lower the learning rate, or clip_norm"
        )
    space = model.space
    best = torch.zeros_like(worth, dtype=torch.bool)
    spares, dora = space.split(best), space.dora
    for name, own in space.split(worth).items():
        floor = max(min_rank, int(name in dora))
        spares[name][own.topk(min(floor, len(own))).indices] = True
    return best


def refuse_nothing_left(
    model: RankModel, guide: RankGuide, keep: Tensor, rule: str
) -> None:
    """Raise if no component would stay, and say where that comes from."""
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
    """KL(guide || prior), scales that others depend on averaged over ``draws``."""
    draws = draws if model.binds == "gates" else 1  # weights have no scales above them
    prior, posterior = PerExample(draws), PerExample(draws)
    multiplicities = Multiplicities()
    with torch.random.fork_rng(), poutine.block(), torch.enable_grad():
        torch.manual_seed(0)
        ours = poutine.trace(posterior(guide)).get_trace()
        program = poutine.replay(multiplicities(prior(model.draw)), trace=ours)
        theirs = poutine.trace(program).get_trace()
        once = prior.unexpanded, posterior.unexpanded
        kl, _ = divergence(theirs, ours, once, draws, multiplicities.found)
    return torch.stack(list(kl.values())).sum()
