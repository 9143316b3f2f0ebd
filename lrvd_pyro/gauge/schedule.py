"""Balancing while training goes on."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lrvd_pyro.batches import Batch, batch_size
from lrvd_pyro.gauge.balancing import Change, rebalance
from lrvd_pyro.gauge.second_moments import Gramians
from lrvd_pyro.gauge.token_sums import Sums, tapped
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.models.checks import check_gates
from lrvd_pyro.optim import Optimizer
from lrvd_pyro.rank_space.center import center_of
from lrvd_pyro.selection.optimizer_moments import torch_optimizers
from lrvd_pyro.selection.removal import check_pair

__all__ = ["BalanceSchedule"]


class BalanceSchedule:
    """Moves A and B to the balanced gauge every k steps of training.

    Call `step` after every optimization step. On every m-th step, the second moments of
    `gramians` are gathered from the training's own backward pass. They belong to the
    observed labels, are averaged over the guide's noise, and lack the likelihood's
    factor N/B. They are summed from one balancing to the next.

    Within each module the guide's variances are redistributed: the smallest goes to the
    component of largest t. The prior's own variances and Adam's moments go along. The
    KL stays what it was, and SVI learns the rest. Rows of A keep their length, and
    their moments are carried as `balance` says.

    Example::

        rebalance = BalanceSchedule(model, guide, svi.optim, every=200)
        for batch in loader:
            svi.step(**batch)
            rebalance.step()
        rebalance.close()

    Args:
        model: The `GateLoRA`, or another model of gates, in training.
        guide: Its `RankDiagonal`.
        optimizer: What trains both; of this library, Pyro or torch.
        every: Steps between balancings, k.
        gather_every: Steps from one gathering to the next, m.

    Attributes:
        steps: Optimization steps seen.

    Raises:
        TypeError: If the model draws no gates, or ``optimizer`` is not an
            optimizer. If the guide is not a `RankDiagonal` that holds the mean of its
            gates at 1.
        ValueError: If a count is out of range, or the guide belongs to another model.

    The loss must be in nats per data set, as `RankELBO` gives it. A factor on it, such
    as 1/k of k micro-batches, is a factor on every t and changes no direction.

    Rows that all examples share, as DeBERTa's position embeddings, count once a batch
    here; in `gramians`, once an example.

    Wrong together with a `RankSchedule` of ``checks`` above 1: it counts by place, and
    balancing redistributes the places.

    Source: derived here.
    """

    def __init__(
        self,
        model: RankModel,
        guide: RankDiagonal,
        optimizer: Optimizer,
        *,
        every: int = 200,
        gather_every: int = 4,
    ) -> None:
        check_gates(model, "the gauge", "take GateLoRA(net, num_data=len(train))")
        check_pair(model, guide)
        if not isinstance(guide, RankDiagonal) or guide.learn_mean:
            # Learned means belong to the old components, and nothing gives new ones.
            raise TypeError(
                f"guide is a {type(guide).__name__} with learn_mean="
                f"{getattr(guide, 'learn_mean', None)}; the gauge is free only for "
                f"gates whose mean is 1: take RankDiagonal(model, learn_mean=False)"
            )
        if not 1 <= gather_every <= every:
            raise ValueError(
                f"every={every}, gather_every={gather_every}; expected numbers of "
                f"steps: BalanceSchedule(..., every=200, gather_every=4)"
            )
        self.model, self.guide, self.optimizer = model, guide, optimizer
        self.every, self.gather_every = every, gather_every
        self.steps = 0
        torch_optimizers(optimizer)  # raises unless it is an optimizer
        self._taps, self._tapping, self._closed = ExitStack(), False, False
        self._forget()
        self._listen()

    def step(self) -> dict[str, Change] | None:
        """Count a step, and balance if it is time.

        Returns:
            The change of basis of each module that moved; None if it was not time.
        """
        self.steps += 1
        self._unhook()
        changes = None
        self._forget_if_pruned()
        if self.steps % self.every == 0 and self._examples:
            space, found = self.model.space, self.gramians()
            point = center_of(space)
            about = found.centered(point) if point else found
            changes = rebalance(space, about, self.optimizer, lengths="kept")
            self._deal_noise(changes)
            self._forget()
        self._listen()
        return changes

    def gramians(self) -> Gramians:
        """The second moments gathered since the last balancing, and the means."""
        modules = self.model.space.modules
        whole = self.model.num_data / max(self._examples, 1)
        gradients = [whole * gram for gram in self._sums.gradients]
        return Gramians(
            activations=dict(zip(modules, self._sums.mean_activations(), strict=True)),
            gradients=dict(zip(modules, gradients, strict=True)),
            means=dict(zip(modules, self._sums.means(), strict=True)),
        )

    def close(self) -> None:
        """Take the hooks off the network; no later step gathers."""
        self._closed = True
        self._unhook()

    def state_dict(self) -> dict[str, Any]:
        """The counters and sums as numbers and lists, for JSON."""
        sums = self._sums
        return {
            "steps": self.steps,
            "examples": self._examples,
            "ranks": list(sums.ranks),
            "tokens": sums.tokens,
            "activations": [gram.tolist() for gram in sums.activations],
            "totals": [total.tolist() for total in sums.totals],
            "gradients": [gram.tolist() for gram in sums.gradients],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, on a model pruned as that one was.

        Raises:
            ValueError: If the model has other ranks.
        """
        if tuple(state["ranks"]) != self.model.space.ranks:
            raise ValueError(
                f"the saved schedule knows modules of ranks {state['ranks']} and the "
                f"model has ranks {list(self.model.space.ranks)}; restore the model "
                f"first"
            )
        self._unhook()
        self._forget()
        self.steps, self._examples = state["steps"], state["examples"]
        self._sums.tokens = list(state["tokens"])
        for kind in ("activations", "totals", "gradients"):
            grams = [torch.tensor(g, dtype=torch.float64) for g in state[kind]]
            setattr(self._sums, kind, grams)
        self._listen()

    def _forget_if_pruned(self) -> None:
        """Start the sums again if the ranks that they belong to are gone."""
        if self._sums.ranks != self.model.space.ranks:
            self._forget()

    def _forget(self) -> None:
        self._sums, self._examples = Sums(self.model.space.ranks), 0

    def _listen(self) -> None:
        """Gather on the next step if it is an m-th one."""
        if self._closed or (self.steps + 1) % self.gather_every:
            return
        # A hook on the model sets the taps: only the pass itself shows whether it
        # trains or evaluates. The steps in between run without any hook.
        hook = self.model.register_forward_pre_hook(self._tap, with_kwargs=True)
        self._taps.callback(hook.remove)

    def _unhook(self) -> None:
        self._taps.close()
        self._tapping = False

    def _tap(self, model: nn.Module, args: tuple[object, ...], batch: Batch) -> None:
        if not torch.is_grad_enabled():  # an evaluation of the loss
            return
        self._forget_if_pruned()
        self._size = batch_size(batch)
        self._examples += self._size
        # Micro-batches of one step share their taps: a second tap would count twice.
        if not self._tapping:
            self._taps.enter_context(tapped(self.model, self._add))
            self._tapping = True

    def _add(self, index: int, h: Tensor, g: Tensor) -> None:
        # The loss scales the log likelihood of B examples by N/B.
        self._sums.add(index, h, g * (self._size / self.model.num_data))

    @torch.no_grad()
    def _deal_noise(self, changes: dict[str, Change]) -> None:
        """Give the smallest variance of each module to the component of largest t."""
        guide, space = self.guide, self.model.space
        for site in guide.held:
            which = list(guide.families).index(site)
            vectors = [guide.by_site(v)[which] for v in self._moved(guide.log_variance)]
            # Components stand by falling t now. ``deal`` is a permutation of all of
            # them, written through its views by module.
            deal = torch.arange(space.size, device=vectors[0].device)
            places = space.split(deal).items()
            for (module, place), log_variance in zip(
                places, space.split(vectors[0]).values()
            ):
                if module in changes:
                    place.copy_(place[log_variance.argsort()])
            # A prior may own a variance per rank, as ARD does: the KL of a component
            # depends on both, so they move together.
            if isinstance(self.model.prior, nn.Module):
                for parameter in self.model.prior.parameters():
                    if parameter.shape == deal.shape:
                        vectors += self._moved(parameter)
            for vector in vectors:
                vector.copy_(vector[deal])

    def _moved(self, parameter: Tensor) -> list[Tensor]:
        """A parameter's data, and the optimizer's moments of it."""
        moments = [
            moment
            for optim in torch_optimizers(self.optimizer)
            for moment in optim.state.get(parameter, {}).values()
            if isinstance(moment, Tensor) and moment.shape == parameter.shape
        ]
        return [parameter.data, *moments]
