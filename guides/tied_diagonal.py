"""The rank-wise diagonal guide over weights: one variance per rank component."""

from typing import final

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro._numbers import check_number
from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.guides.families import walled
from lrvd_pyro.models import FactorLoRA
from lrvd_pyro.rank_space.removal import Cuts, slice_tensors

__all__ = ["TiedDiagonal"]


@final
class TiedDiagonal(RankGuide):
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

    Attributes:
        log_variance: The log of ``sigma_i^2``, (R,): the guide's only parameter. The
            means are the network's own weights, parameters of the model: a copy of the
            guide alone reads old ones until `RankGuide.paired_with` gives it a model.

    Raises:
        TypeError: If ``model`` is another one.
        ValueError: If ``init_log_alpha`` is not finite.
    """

    bounds = (-20.0, 2.0)
    owner: Tensor

    def __init__(
        self,
        model: FactorLoRA,
        *,
        init_log_alpha: float = -4.0,
    ) -> None:
        if not isinstance(model, FactorLoRA):
            raise TypeError(
                f"model is a {type(model).__name__}; TiedDiagonal guides FactorLoRA, "
                f"whose weights have its means. GateLoRA takes "
                f"guides.RankDiagonal(model)"
            )
        check_number("init_log_alpha", init_log_alpha, "a finite number: -4.0")
        super().__init__(model)
        self.init_log_alpha = init_log_alpha
        each = torch.arange(self.space.size)
        sides = [each.repeat_interleave(self.space.widths(s)) for s in self.space.sides]
        # The rank component of each weight. It follows from the ranks, so is not saved.
        owner = torch.cat(sides).to(self.space.device)
        self.register_buffer("owner", owner, persistent=False)
        signal = self._log_signal(owner, self.mean())
        self.log_variance = nn.Parameter(init_log_alpha + signal)

    def forward(self, *args: object, **batch: object) -> dict[str, Tensor]:
        """Draw the weights, whatever the batch; returns them as ``factor``."""
        return self.draw_independent(self.distributions())

    def distributions(self) -> dict[str, dist.TorchDistribution]:
        """The posterior of each weight, (K,)."""
        scale = torch.exp(0.5 * walled(self.log_variance, *self.bounds))[self.owner]
        loc = self.mean().to(scale.dtype)
        return {"factor": dist.Normal(loc, scale, validate_args=False)}

    def mean(self) -> Tensor:
        """The network's own weights, as `RankSpace.flatten` lays them out, (K,)."""
        return self.space.flatten(*self.space.sides)

    @property
    def log_alpha(self) -> Tensor:
        """``log(sigma_i^2 d / ||a_i||^2)`` of each rank component, (R,)."""
        with torch.no_grad():
            signal = self._log_signal(self.owner, self.mean())
            return self.log_variance.clamp(*self.bounds) - signal

    def noise_ratio(self) -> Tensor:
        """``sigma_i^2 d / ||a_i||^2`` with its graph, (R,), summed over the sides."""
        weights = [self.space.flatten(side) for side in self.space.sides]
        owners = self.owner.split([len(w) for w in weights])
        log_variance = walled(self.log_variance, *self.bounds)
        signals = [self._log_signal(o, w) for o, w in zip(owners, weights)]
        return torch.stack([torch.exp(log_variance - s) for s in signals]).sum(0)

    def by_site(self, vector: Tensor) -> tuple[Tensor, ...]:
        """The vector itself: the one site has a variance per rank component."""
        return (vector,)

    def cuts(self, keep: Tensor) -> Cuts:
        """What `select` would slice, without doing it."""
        return {self.log_variance: (0, keep.nonzero().squeeze(-1))}

    def select(self, keep: Tensor) -> None:
        """Drop the rank components where ``keep`` (R,) is False, in place."""
        slice_tensors(self.cuts(keep))
        keep = keep.to(self.owner.device)
        # The components that stay are numbered without gaps.
        self.owner = (keep.cumsum(0) - 1)[self.owner[keep[self.owner]]]

    def _log_signal(self, owner: Tensor, weights: Tensor) -> Tensor:
        """Log of the mean square of the weights of each rank component."""
        squares = torch.zeros(self.space.size, device=owner.device)
        elements = weights.detach().to(squares.dtype).square()
        # bincount would wait for the device, to learn the length of its result
        count = squares.index_add(0, owner, torch.ones_like(elements))
        log: Tensor = (squares.index_add(0, owner, elements) / count).log()
        return log
