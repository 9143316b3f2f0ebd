"""The rank-wise diagonal guide over weights: one variance per rank component."""

from typing import final

import torch
from torch import Tensor

from lrvd_pyro.guides.weight_noise import WeightNoise

__all__ = ["TiedDiagonal"]


@final
class TiedDiagonal(WeightNoise):
    """Gaussian noise on the weights of `FactorLoRA`, one variance per rank component.

    Every element of row i of A (and of column i of B) is Normal around its present
    value, with the one variance ``sigma_i^2``. The noise-to-signal ratio is ``alpha_i =
    sigma_i^2 d / ||a_i||^2``, with d the length of the row (and column).

    Log alpha starts at -4, a noise of 14%. Log variances stay within [-20, 2].

    Wrong when weights are strongly dependent under the posterior: the guide then
    understates the uncertainty. Under another gauge of A and B it is another posterior.

    Example::

        model = FactorLoRA(net, num_data=len(train))
        svi = SVI(model, TiedDiagonal(model), AdamW(), loss=RankELBO(kl_weight=0.1))

    Args:
        model: A `FactorLoRA`; `RankDiagonal` guides `GateLoRA`.
        init_log_alpha: Where log alpha starts.
        linearized_scale: See `RankGuide`.

    Attributes:
        log_variance: The log of ``sigma_i^2``, (R,): the guide's only parameter. The
            means are the network's own weights, parameters of the model: a copy of the
            guide alone reads old ones until `RankGuide.paired_with` gives it a model.

    Raises:
        TypeError: If ``model`` is another one.
        ValueError: If ``init_log_alpha`` is not finite.
    """

    apart = False

    @property
    def log_alpha(self) -> Tensor:
        """``log(sigma_i^2 d / ||a_i||^2)`` of each rank component, (R,)."""
        with torch.no_grad():
            return self.log_variance.clamp(*self.bounds) - self.log_signal()
