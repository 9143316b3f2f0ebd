"""What rank selection, history, storage and export ask of a guide."""

from abc import abstractmethod
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro._compat.pyro import name_of
from lrvd_pyro.inference.param_store import UniqueModule, check_registered
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.rank_space.removal import Cuts


@runtime_checkable
class ClosedFormNoise(Protocol):
    """A guide whose noise-to-signal ratio is known with its graph.

    ``prune(criterion="elbo_drop")`` needs it.

    Attributes:
        log_variance: All log variances, laid out as `by_site` cuts them.
    """

    log_variance: nn.Parameter

    def noise_ratio(self) -> Tensor:
        """Alpha of each rank component, differentiable in ``log_variance``, (R,)."""

    def by_site(self, vector: Tensor) -> tuple[Tensor, ...]:
        """A vector laid out as ``log_variance``, cut into latent sites."""


class RankGuide(UniqueModule):
    """A guide with a noise of its own for each rank component.

    A subclass gives `forward`, the Pyro statements; `mean` and `log_alpha`; and `cuts`
    and `select`, by which components leave it. `prune`, `RankSchedule`, `RankHistory`,
    `save` and `export_peft` then work with it.

    Wrong as a base for guides whose noise does not belong to single rank components: a
    covariance over all of them has no part that `select` could take away.

    Args:
        model: The model whose latent sites it draws.

    Attributes:
        space: The model's rank space.

    Raises:
        TypeError: If a subclass lacks a method.
    """

    def __init__(self, model: RankModel) -> None:
        super().__init__()
        self.space = model.space

    @abstractmethod
    def forward(self, *args: Any, **batch: Any) -> dict[str, Tensor]:
        """Draw the latent sites; returns their values by name."""

    @abstractmethod
    def mean(self) -> Tensor:
        """What the model binds at the posterior mean: gates (R,), weights (K,)."""

    @property
    @abstractmethod
    def log_alpha(self) -> Tensor:
        """Log noise-to-signal ratio ``Var / mean^2`` of each component, (R,)."""

    @abstractmethod
    def cuts(self, keep: Tensor) -> Cuts:
        """What `select` would slice where ``keep`` (R,) is False; nothing is done.

        Returns:
            For each parameter the dimension to slice, and the indices that stay.
        """

    @abstractmethod
    def select(self, keep: Tensor) -> None:
        """Forget the rank components where ``keep`` (R,) is False, in place.

        `lrvd_pyro.selection.select` calls it before the same of the rank space.
        """

    @property
    def effective_rank(self) -> Tensor:
        """``sum_i 1 / (1 + alpha_i)``, between 0 and R."""
        return torch.sigmoid(-self.log_alpha).sum()

    @property
    def effective_ranks(self) -> dict[str, float]:
        """The effective rank of each LoRA module."""
        kept = torch.sigmoid(-self.log_alpha)
        return {name: float(k.sum()) for name, k in self.space.split(kept).items()}

    def draw_independent(
        self, posteriors: dict[str, dist.TorchDistribution]
    ) -> dict[str, Tensor]:
        """Draw latent sites from elementwise distributions; returns their values."""
        for name, parameter in self.named_parameters():
            check_registered(f"{name_of(self)}.{name}", parameter)
        return {
            name: pyro.sample(name, noise.to_event(1))
            for name, noise in posteriors.items()
        }
