"""What a rank-wise guide is: what selection, history, storage and export ask of it."""

import math
from abc import abstractmethod
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro._compat.pyro import name_of
from lrvd_pyro._compat.torch import tree_map
from lrvd_pyro._numbers import check_number
from lrvd_pyro.inference.param_store import UniqueModule, check_registered
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.rank_space.cuts import named_cuts
from lrvd_pyro.rank_space.removal import Cuts, slice_tensors
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["ClosedFormNoise", "RankGuide"]


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
        """Cut a vector laid out as ``log_variance`` into latent sites."""


class RankGuide(UniqueModule):
    """A guide with a noise of its own for each rank component.

    A subclass gives `forward`, the Pyro statements; `mean` and `log_alpha`, what the
    posterior is. `prune`, `RankSchedule`, `RankHistory`, `save` and `export_peft` then
    work with it. They ask for this type, and not for methods of these names. A subclass
    whose state is not one parameter per rank component gives `cuts` and `select` too. A
    subclass with an attribute for each argument of its constructor can be saved and
    loaded. The example below, with its imports, is examples/recipes/add_guide.py.

    Wrong as a base for guides whose noise does not belong to single rank components: a
    covariance over all of them has no part that `select` could take away.

    Args:
        model: The model whose latent sites the guide draws.
        linearized_scale: The factor on variances where `predict` linearizes. Draws
            break at noise that the linearized predictive still bears, so that noise by
            evidence has two sizes: see `lrvd_pyro.gauge.noise_by_evidence`.

    Attributes:
        space: The model's rank space.

    Raises:
        TypeError: If a subclass lacks a method.
        ValueError: If the scale, here or set later, is not positive and finite.

    Example, for a `GateLoRA` whose prior has the one site ``gate``::

        class LaplaceGates(RankGuide):
            # gate ~ Laplace(1, b), one b for each rank component

            def __init__(self, model):
                super().__init__(model)
                self.log_b = nn.Parameter(self.space.ones() - 2.0)

            def forward(self, *args, **batch):
                gate = dist.Laplace(1.0, self.log_b.exp())
                return self.draw_independent({"gate": gate})

            def mean(self):
                return self.space.ones()

            @property
            def log_alpha(self):                 # Var[gate] is 2 b^2, and the mean is 1
                return (2 * self.log_b.detach().exp().square()).log()

        model = GateLoRA(net, prior=ARD(), num_data=len(train))
        guide = LaplaceGates(model)
        svi = SVI(model, guide, AdamW(), loss=RankELBO())
    """

    def __init__(self, model: RankModel, *, linearized_scale: float = 1.0) -> None:
        super().__init__()
        # The space, and not the model: as a child, the model's parameters would be the
        # guide's too.
        self.space = model.space
        self.linearized_scale = linearized_scale
        self._built_on = model.space.lineage[-1]

    @property
    def linearized_scale(self) -> float:
        """The factor on variances where `predict` linearizes."""
        return self._linearized_scale

    @linearized_scale.setter
    def linearized_scale(self, scale: float) -> None:
        check_number(
            "linearized_scale",
            scale,
            "a positive number: 1.0",
            lambda scale: 0 < scale < math.inf,
        )
        self._linearized_scale = float(scale)

    def get_extra_state(self) -> Tensor:
        """What state dicts hold beside parameters and buffers: the scale."""
        return torch.tensor(self.linearized_scale, dtype=torch.double, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the scale from a state dict."""
        self.linearized_scale = float(state)

    def paired_with(self, model: RankModel) -> "RankGuide":
        """This guide as it reads a model: the one it was built on, or a copy of that.

        Where both were copied apart, as by torch's AveragedModel, the guide's copy has
        a copy of the model that nobody trains or averages. What is returned shares the
        parameters of this guide and reads the given model.

        Wrong for a guide that reaches its model by a closure. Let it keep the model's
        ``space`` or a bound method, as an attribute or in a list, tuple or dict.

        Example::

            averages = AveragedModel(model), AveragedModel(guide)
            ...
            averages[1].module.paired_with(averages[0].module).log_alpha

        Args:
            model: The model.

        Returns:
            This very guide, if it reads that model.

        Raises:
            ValueError: If the guide was built on another model, or one of the two was
                pruned without the other.
        """
        if model.space is self.space:
            return self
        if self._built_on not in model.space.lineage:
            raise ValueError(
                f"the guide was built on another model; pass both as they were "
                f"trained, or copies of both, or build it on this one: "
                f"{type(self).__name__}(model)"
            )
        if self.space.origin != model.space.origin:
            raise ValueError(
                f"guide and model are copies with {self.space.size} and "
                f"{model.space.size} rank components, since one was pruned without the "
                f"other; copy both again: copy.deepcopy((model, guide))"
            )

        def relinked(leaf: object) -> object:
            if isinstance(leaf, MethodType):
                return MethodType(leaf.__func__, relinked(leaf.__self__))
            if isinstance(leaf, RankModel):
                return model
            return model.space if isinstance(leaf, RankSpace) else leaf

        guide = object.__new__(type(self))
        vars(guide).update(tree_map(relinked, vars(self)))
        return guide

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        # State dicts of version 0.1 have no scale: there it was 1.
        state_dict.setdefault(f"{prefix}_extra_state", torch.ones(()))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @abstractmethod
    def forward(self, *args: object, **batch: object) -> dict[str, Tensor]:
        """Draw the latent sites; returns their values by name."""

    @abstractmethod
    def mean(self) -> Tensor:
        """What the model binds at the posterior mean: gates (R,), weights (K,)."""

    @property
    @abstractmethod
    def log_alpha(self) -> Tensor:
        """Log noise-to-signal ratio ``Var / mean^2`` of each component, (R,)."""

    def cuts(self, keep: Tensor) -> Cuts:
        """What `select` would slice, without doing it.

        By default `lrvd_pyro.rank_space.named_cuts`.

        Args:
            keep: Which rank components stay, a bool mask (R,).

        Returns:
            For each tensor the dimension to slice, and the indices that stay.

        Raises:
            TypeError: If a tensor belongs to no components that can be told.
        """
        return named_cuts(self.space, keep, self)

    def select(self, keep: Tensor) -> None:
        """Drop the other rank components, in place.

        `lrvd_pyro.selection.select` calls this before the same method of the rank
        space.

        Args:
            keep: Which rank components stay, a bool mask (R,).
        """
        slice_tensors(self.cuts(keep))

    @property
    def effective_rank(self) -> Tensor:
        """``sum_i 1 / (1 + alpha_i)``, between 0 and R."""
        return torch.sigmoid(-self.log_alpha).sum()

    @property
    def effective_ranks(self) -> dict[str, float]:
        """The effective rank of each LoRA module, by name."""
        kept = torch.sigmoid(-self.log_alpha)
        return {name: float(k.sum()) for name, k in self.space.split(kept).items()}

    def draw_independent(
        self, posteriors: dict[str, dist.TorchDistribution]
    ) -> dict[str, Tensor]:
        """Draw latent sites from elementwise distributions; returns their values.

        Args:
            posteriors: For each latent site a distribution of its batch shape.
        """
        for name, parameter in self.named_parameters():
            check_registered(f"{name_of(self)}.{name}", parameter)
        return {
            name: pyro.sample(name, noise.to_event(1))
            for name, noise in posteriors.items()
        }
