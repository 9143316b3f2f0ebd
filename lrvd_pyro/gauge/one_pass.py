"""Any trained LoRA as a Bayesian one, from two passes over data."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lrvd_pyro.batches import batch_size, check_several
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


def bayesianize(
    net: PeftModel,
    batches: Iterable[Mapping[str, Any]],
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
    """A model and its guide around an adapter that is trained already.

    Moves A and B to the balanced gauge (the first pass), then sets each rank's noise
    to `optimal_alpha` of its exact Fisher information there (the second). The network's
    function at the posterior mean stays what it was; labels are not needed. The pair
    goes into `predict`, `prune`, `export_peft`, or further `SVI.step`.

    Args:
        net: A PEFT LoRA model, trained; from memory or from disk.
        batches: Its training set as dicts of tensors, to be gone through more than
            once: a list or a DataLoader, no generator.
        likelihood: Of labels given logits.
        num_data: The number of training examples; None counts those of ``batches``.
        adapter: The adapter's name; None takes the single active one.
        prior: LogUniform (None), Normal or ARD.
        balance: False leaves the gauge as training left it; unless ``centered``, one
            pass is enough then.
        centered: Let gates act about the mean of their rank's activations. What `prune`
            removes then leaves its mean behind, in a bias: see `gauge.center`. False
            takes away a center that the adapter had.
        generator: Of the sampled labels.
        progress: Show a bar for each pass.

    Raises:
        TypeError: If ``batches`` is one batch or can be gone through only once, or the
            prior is none of these; and as `GateLoRA` and `balance` raise it.
        ValueError: As `gramians` raises it.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted.
        The network's function is what it was in any case.

    Log alpha ends at 8, the guide's bound. Wrong where the quadratic expansion is: see
    `optimal_alpha`.
    """
    check_several(batches, "bayesianize(net, [batch], ...)")
    if isinstance(batches, Iterator):
        raise TypeError(
            "batches can be gone through only once, and the passes are two; give a "
            "DataLoader or a list: bayesianize(net, list(batches), ...)"
        )
    if num_data is None:
        with seeded_by(generator):
            num_data = sum(batch_size(dict(batch)) for batch in batches) or 1
    prior = prior or LogUniform()
    optimal_alpha(torch.ones(1), prior)  # refuses a prior before any change
    model = GateLoRA(
        net, prior=prior, likelihood=likelihood, num_data=num_data, adapter=adapter
    )
    options: dict[str, Any] = {"generator": generator, "progress": progress}
    ours = False
    try:
        found = gramians(model, batches, **options)
        center(model, found if centered else None)
        ours = centered
        if balance:
            moments = found.centered() if centered else found
            rebalance(model.space, moments, None, "kept")
        if balance or centered:
            found = gramians(model, batches, **options)
    except BaseException:
        if ours:
            center(model, None)
        model.space.close()
        model.release()
        raise
    guide = RankDiagonal(model)
    set_noise(model, guide, optimal_alpha(found.gate_fisher, prior))
    return model, guide


@torch.no_grad()
def set_noise(model: GateLoRA, guide: RankDiagonal, alpha: Tensor) -> None:
    """Give a guide of N(1, alpha), and its prior's own variances, these alphas."""
    log_alpha = alpha.to(guide.log_variance).log().clamp(max=8.0)
    guide.log_variance.copy_(log_alpha)
    if isinstance(model.prior, ARD):
        model.prior.log_gamma.copy_(log_alpha.exp().log1p())
