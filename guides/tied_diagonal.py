"""The rank-wise diagonal guide over weights: one variance per rank component."""

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro.guides.families import walled
from lrvd_pyro.guides.rank_diagonal import RankDiagonal
from lrvd_pyro.inference.param_store import UniqueModule
from lrvd_pyro.models import FactorLoRA
from lrvd_pyro.rank_space.removal import Cuts, slice_tensors


class TiedDiagonal(RankDiagonal):
    """`RankDiagonal` for `FactorLoRA`: one variance per rank component of the weights.

    The means are the network's own weights, parameters of the model; the guide has
    ``log_variance`` (R,) alone.
    """

    bounds = (-20.0, 2.0)
    owner: Tensor

    def __init__(
        self,
        model: FactorLoRA,
        *,
        learn_mean: bool = False,
        init_log_alpha: float = -4.0,
    ) -> None:
        UniqueModule.__init__(self)
        self.learn_mean, self.init_log_alpha = learn_mean, init_log_alpha
        self._held = {}
        if learn_mean:
            raise TypeError(
                "learn_mean=True with FactorLoRA: its means are the network's own "
                "weights, which train already; use RankDiagonal(model)"
            )
        self.space = model.space
        each = torch.arange(self.space.size)
        sides = [each.repeat_interleave(self.space.widths(s)) for s in self.space.sides]
        owner = torch.cat(sides).to(self.space.device)
        self.register_buffer("owner", owner, persistent=False)
        signal = self._log_signal(owner, self.mean())
        self.log_variance = nn.Parameter(init_log_alpha + signal)

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
        """A vector laid out as ``log_variance``: it has one entry per component."""
        return (vector,)

    def cuts(self, keep: Tensor) -> Cuts:
        """What `select` would slice, all checked and nothing done."""
        return {self.log_variance: (0, keep.nonzero().squeeze(-1))}

    def select(self, keep: Tensor) -> None:
        """Forget the rank components where ``keep`` (R,) is False, in place.

        To be called before `RankSpace.select`; `lrvd_pyro.selection.select` does both.
        """
        slice_tensors(self.cuts(keep))
        keep = keep.to(self.owner.device)
        self.owner = (keep.cumsum(0) - 1)[self.owner[keep[self.owner]]]

    def _log_signal(self, owner: Tensor, weights: Tensor) -> Tensor:
        """Log of the mean square of the weights of each rank component."""
        squares = torch.zeros(self.space.size, device=owner.device)
        elements = weights.detach().to(squares.dtype).square()
        log: Tensor = (squares.index_add(0, owner, elements) / owner.bincount()).log()
        return log
