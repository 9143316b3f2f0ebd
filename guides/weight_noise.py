"""What guides over weights share: Gaussian noise, its variances shared within rows."""

from typing import ClassVar

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro._numbers import check_number
from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.guides.families import walled
from lrvd_pyro.models import FactorLoRA
from lrvd_pyro.rank_space.removal import Cuts, slice_tensors

__all__ = ["WeightNoise"]


class WeightNoise(RankGuide):
    """Gaussian noise on the weights of `FactorLoRA`, about the weights themselves.

    Args:
        model: A `FactorLoRA`.
        init_log_alpha: Where log alpha starts.
        linearized_scale: See `RankGuide`.

    Attributes:
        log_variance: The log variances: the guide's only parameter. The means are the
            network's own weights, parameters of the model.

    Raises:
        TypeError: If ``model`` is another one.
        ValueError: If a number is not finite, or the scale not positive.
    """

    apart: ClassVar[bool]  # whether rows of A and columns of B have their own variances
    bounds = (-20.0, 2.0)
    owner: Tensor

    def __init__(
        self,
        model: FactorLoRA,
        *,
        init_log_alpha: float = -4.0,
        linearized_scale: float = 1.0,
    ) -> None:
        if not isinstance(model, FactorLoRA):
            raise TypeError(
                f"model is a {type(model).__name__}; {type(self).__name__} guides "
                f"FactorLoRA, whose weights have its means. GateLoRA takes "
                f"guides.RankDiagonal(model)"
            )
        check_number("init_log_alpha", init_log_alpha, "a finite number: -4.0")
        super().__init__(model, linearized_scale=linearized_scale)
        self.init_log_alpha = init_log_alpha
        self.blocks = len(self.space.sides) if self.apart else 1
        # The variance of each weight. It follows from the ranks, so is not saved.
        step = self.space.size * self.apart
        sides = enumerate(self._components())
        owner = torch.cat([each + number * step for number, each in sides])
        self.register_buffer("owner", owner, persistent=False)
        signal = _log_mean_squares(owner, self.mean(), self.blocks * self.space.size)
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

    def noise_ratio(self) -> Tensor:
        """``sigma_i^2 d / ||a_i||^2`` with its graph, (R,), summed over the sides."""
        log_variance = walled(self.log_variance, *self.bounds).view(self.blocks, -1)
        weights = [self.space.flatten(side) for side in self.space.sides]
        size, pairs = self.space.size, zip(self._components(), weights)
        signals = torch.stack([_log_mean_squares(*pair, size) for pair in pairs])
        return torch.exp(log_variance - signals).sum(0)

    def by_site(self, vector: Tensor) -> tuple[Tensor, ...]:
        """The vector itself: there is one site."""
        return (vector,)

    def cuts(self, keep: Tensor) -> Cuts:
        """What `select` would slice, without doing it."""
        kept = keep.repeat(self.blocks)
        return {self.log_variance: (0, kept.nonzero().squeeze(-1))}

    def select(self, keep: Tensor) -> None:
        """Drop the rank components where ``keep`` (R,) is False, in place."""
        slice_tensors(self.cuts(keep))
        kept = keep.to(self.owner.device).repeat(self.blocks)
        # The variances that stay are numbered without gaps.
        self.owner = (kept.cumsum(0) - 1)[self.owner[kept[self.owner]]]

    def log_signal(self) -> Tensor:
        """Log of the mean square of the weights that share each variance."""
        return _log_mean_squares(self.owner, self.mean(), len(self.log_variance))

    def _components(self) -> list[Tensor]:
        """The rank component of each weight, side by side."""
        space = self.space
        each = torch.arange(space.size)
        owners = [each.repeat_interleave(space.widths(side)) for side in space.sides]
        return [owner.to(space.device) for owner in owners]


def _log_mean_squares(owner: Tensor, weights: Tensor, size: int) -> Tensor:
    """Log of the mean square of the weights of each owner, ``size`` of them."""
    squares = torch.zeros(size, device=owner.device)
    elements = weights.detach().to(squares.dtype).square()
    # bincount would wait for the device, to learn the length of its result
    count = squares.index_add(0, owner, torch.ones_like(elements))
    log: Tensor = (squares.index_add(0, owner, elements) / count).log()
    return log
