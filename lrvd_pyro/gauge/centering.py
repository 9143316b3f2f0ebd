"""Gates about the means of rank activations, which need no rank."""

import torch

from lrvd_pyro.gauge.balancing import check_fit
from lrvd_pyro.gauge.second_moments import Gramians
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.rank_space.center import center_at


def center(model: GateLoRA, gramians: Gramians | None) -> None:
    """Let gates act about the means of their rank activations.

    ``m + z (h - m)`` in place of ``z h``, with h = A x and m its mean. Nothing changes
    at gates of 1. At 0 a component is held at its mean, so that what `prune` or
    `pruning.select` removes leaves the constant ``scaling * b_i m_i`` behind: in the
    bias that PEFT calls ``lora_bias``, which every module has from now on, frozen. Only
    what a rank does beyond its mean is random, and selected.

    Balance by covariances then: ``balance(net, gramians.centered())``, which takes the
    center along. A and B may train on; the point stays.

    Example::

        found = gramians(model, batches)
        center(model, found)
        balance(net, found.centered())
        worth = gramians(model, batches, gates="subsets").gate_fisher
        select(model, guide, worth.argsort(descending=True).argsort() < 8)

    Args:
        model: The network as a `GateLoRA`.
        gramians: Of that model, in its present gauge; None lets gates act about 0.

    Raises:
        ValueError: If the moments belong to other modules or ranks, or have no means.
        TypeError: If a layer is DoRA or a grouped convolution, or the model no
            `GateLoRA`.

    The center belongs to the adapter, as A and B do: a later `GateLoRA` on the same
    network has it too, and `FactorLoRA` refuses it. What is removed with it cannot be
    merged into layers without a bias of their own.

    Source: an intercept, as in reduced-rank regression (Izenman 1975); for LoRA,
    derived here.
    """
    if not isinstance(model, GateLoRA):
        raise TypeError(
            f"model is a {type(model).__name__}; gates are what acts about a center: "
            f"GateLoRA(net, num_data=len(train))"
        )
    if gramians is None:
        center_at(model.space, None)
        return
    check_fit(model.space, gramians)
    means = gramians.require_means()
    center_at(model.space, torch.cat([means[name] for name in model.space.modules]))
