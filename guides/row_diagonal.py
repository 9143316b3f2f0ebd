"""The guide of a rank-tied Laplace: a variance per row of A and per column of B."""

from typing import final

import torch
from torch import Tensor

from lrvd_pyro.guides.weight_noise import WeightNoise

__all__ = ["RowDiagonal"]


@final
class RowDiagonal(WeightNoise):
    """Gaussian noise on `FactorLoRA`'s weights, one variance per row and per column.

    Every element of row i of A is Normal around its present value with one variance;
    so is every element of column i of B, with a variance of its own. That makes 2R
    numbers. `lrvd_pyro.gauge.noise_by_evidence` sets them as a Laplace approximation
    does. They can also be trained.

    Log alpha starts at -4, a noise of 14%. Log variances stay within [-20, 2].

    Wrong when weights are strongly dependent under the posterior: the guide then
    understates the uncertainty. Under another gauge of A and B it is another posterior.

    Example::

        model, guide = noise_by_evidence(model, guide, loader, noise="tied")
        predict(model, guide, batches, method="linearized")

    Args:
        model: A `FactorLoRA`, of both sides for a variance of each.
        init_log_alpha: Where log alpha starts, on either side.
        linearized_scale: See `RankGuide`.

    Attributes:
        log_variance: The log variances, (2R,): of the rows of A, then of the columns of
            B. The means are the network's own weights, parameters of the model.

    Raises:
        TypeError: If ``model`` is another one.
        ValueError: If a number is not finite, or the scale not positive.
    """

    apart = True

    @property
    def log_alpha(self) -> Tensor:
        """Log of the noise-to-signal ratios of row and column, summed, (R,)."""
        with torch.no_grad():
            return self.noise_ratio().log()
