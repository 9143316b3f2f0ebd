"""Gates about the means of their rank activations: a mean needs no rank."""

import torch

from lrvd_pyro.gauge.balancing import check_fit
from lrvd_pyro.gauge.second_moments import Gramians
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.models.checks import check_gates
from lrvd_pyro.rank_space.center import center_at

__all__ = ["center"]


def center(model: RankModel, gramians: Gramians | None) -> None:
    """Let gates act about the means of their rank activations.

    A gate computes ``m + z (h - m)`` in place of ``z h``, with h = A x and m its mean.
    Nothing changes at gates of 1. At 0 a component is held at its mean. What `prune` or
    `select` removes therefore leaves the constant ``scaling * b_i m_i`` behind. It goes
    into the bias that PEFT calls ``lora_bias``, which every module has from now on,
    frozen. Only what a rank does beyond its mean is random, and selected.

    Balance by covariances afterwards: ``balance(net, gramians.centered())`` takes the
    center along. A and B may train on; the center stays where it is.

    Example::

        found = gramians(model, batches)
        center(model, found)
        balance(net, found.centered())
        worth = gramians(model, batches, gates="subsets").gate_fisher
        select(model, guide, keep=worth.argsort(descending=True).argsort() < 8)

    Args:
        model: A `GateLoRA`, or another model of gates.
        gramians: The second moments of that model, in its present gauge, with means;
            None lets gates act about 0.

    Raises:
        TypeError: If a layer is DoRA or a grouped convolution, or the model draws no
            gates.
        ValueError: If the Gramians belong to other modules or ranks, or have no means.

    The center belongs to the adapter, as A and B do. A later `GateLoRA` on the same
    network has it too, and `FactorLoRA` refuses it.

    Wrong for merging into layers without a bias of their own: what was removed about
    the center has no place there.

    Source: an intercept, as in reduced-rank regression (Izenman 1975); for LoRA,
    derived here.
    """
    check_gates(model, "a center", "take GateLoRA(net, num_data=len(train))")
    if gramians is None:
        center_at(model.space, None)
        return
    check_fit(model.space, gramians)
    means = gramians.require_means()
    center_at(model.space, torch.cat([means[name] for name in model.space.modules]))
