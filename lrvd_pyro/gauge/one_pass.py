"""A Bayesian model from any trained LoRA, by two passes over its data."""

from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lrvd_pyro.batches import Batch, batch_size, check_rereadable
from lrvd_pyro.gauge.balancing import rebalance
from lrvd_pyro.gauge.centering import center
from lrvd_pyro.gauge.closed_form_noise import optimal_alpha
from lrvd_pyro.gauge.second_moments import gramians, seeded_by
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.base import Likelihood
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.priors.base import Prior
from lrvd_pyro.priors.gaussian import ARD
from lrvd_pyro.priors.log_uniform import LogUniform

__all__ = ["bayesianize"]


def bayesianize(
    net: PeftModel,
    batches: Iterable[Batch],
    *,
    likelihood: Likelihood,
    num_data: int | None = None,
    adapter: str | None = None,
    prior: Prior | None = None,
    balance: bool = True,
    centered: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> tuple[GateLoRA, RankDiagonal]:
    """A model and its guide around an adapter that is already trained.

    A first pass over the data moves A and B to the balanced gauge. A second pass sets
    the noise of each rank to `optimal_alpha` of its exact Fisher information there. The
    network's function at the posterior mean stays what it was. Labels are not needed.
    The pair works with `predict`, `prune`, `export_peft`, and further `SVI.step`.

    Example::

        model, guide = bayesianize(net, loader, likelihood=Categorical())
        prediction = predict(model, guide, test_loader)

    Args:
        net: A PEFT LoRA model, trained; from memory or from disk.
        batches: Its training set as dicts of tensors. It is read more than once: pass a
            list or a DataLoader, not a generator.
        likelihood: The likelihood of labels given logits.
        num_data: The number of training examples; None counts those of ``batches``.
        adapter: The adapter's name; None takes the single active one.
        prior: LogUniform (None), Normal or ARD.
        balance: False leaves the gauge as training left it. One pass is enough then,
            unless ``centered``.
        centered: Let gates act about the mean of their rank's activations. What `prune`
            removes then leaves its mean behind, in a bias: see `gauge.center`. False
            takes away a center that the adapter had.
        generator: The random state of the sampled labels; None uses torch's global one.
        progress: Show a bar for each pass.

    Returns:
        The model, and its guide. Log alpha ends at 8, the guide's bound.

    Raises:
        TypeError: If ``batches`` is one batch or can be read only once. If the prior is
            not one of the three. And as `GateLoRA` and `balance` raise it.
        ValueError: As `gramians` raises it.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted. After any
            error, the network's function is what it was.

    Wrong where the quadratic expansion is: see `optimal_alpha`.

    Source: derived here.
    """
    check_rereadable(batches, "bayesianize(net, ")
    if num_data is None:
        with seeded_by(generator):
            # No batch at all is refused below, by `gramians`.
            num_data = sum(batch_size(batch) for batch in batches) or 1
    prior = LogUniform() if prior is None else prior
    optimal_alpha(torch.ones(1), prior)  # refuses a prior before any change
    model = GateLoRA(
        net, prior=prior, likelihood=likelihood, num_data=num_data, adapter=adapter
    )
    options: dict[str, Any] = {"generator": generator, "progress": progress}
    center_is_new = False
    try:
        found = gramians(model, batches, **options)
        center(model, found if centered else None)
        center_is_new = centered
        if balance:
            about = found.centered() if centered else found
            # "kept", since A and B may train on at the learning rates they had.
            rebalance(model.space, about, None, "kept")
        # The Fisher information of a gate belongs to a gauge and a center.
        if balance or centered:
            found = gramians(model, batches, **options)
    except BaseException:  # an interrupt too must not leave hooks or a center behind
        if center_is_new:
            center(model, None)
        model.space.close()
        model.release()
        raise
    guide = RankDiagonal(model)
    _set_noise(model, guide, optimal_alpha(found.gate_fisher, prior))
    return model, guide


@torch.no_grad()
def _set_noise(model: GateLoRA, guide: RankDiagonal, alpha: Tensor) -> None:
    """Set alpha of a guide N(1, alpha), and the variances that its prior may own."""
    log_alpha = alpha.to(guide.log_variance).log().clamp(max=8.0)
    guide.log_variance.copy_(log_alpha)
    if isinstance(model.prior, ARD):
        # ARD's gamma is at its best value, 1 + alpha, for the alpha that was clamped.
        model.prior.log_gamma.copy_(log_alpha.exp().log1p())
