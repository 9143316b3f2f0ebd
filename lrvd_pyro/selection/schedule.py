"""Rank selection while training goes on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrvd_pyro._numbers import check_count
from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.inference.elbo import RankELBO
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.optim import Optimizer
from lrvd_pyro.selection.criteria import (
    best_of_modules,
    check_threshold,
    refuse_nothing_left,
)
from lrvd_pyro.selection.removal import check_pair, select

__all__ = ["RankSchedule"]


class RankSchedule:
    """Prunes during training: call `step` after every optimization step.

    From step ``start`` on, the schedule looks every ``every`` steps. It removes the
    components whose log alpha was above the threshold at ``checks`` looks in a row. It
    does not look while the KL weight of ``elbo`` still rises: log alpha then belongs to
    another posterior than the one in training. A removed component never returns.

    Example::

        schedule = RankSchedule(
            model, guide, svi.optim, start=500, every=100, checks=3, elbo=elbo
        )
        for batch in loader:
            svi.step(**batch)
            schedule.step()

    Args:
        model: The `GateLoRA` or `FactorLoRA` in training.
        guide: Its guide, a `RankGuide`.
        optimizer: What trains both, as in `prune`.
        start: The first step to look after, counted from 1.
        every: Steps between looks.
        log_alpha_threshold: As in `prune`. The docstring of
            `lrvd_pyro.selection.criteria` gives its units.
        checks: Looks in a row above the threshold before a component goes.
        min_rank: The least number of components that every module keeps.
        elbo: The loss, whose KL weight tells when the warm-up is over.

    Attributes:
        steps: Optimization steps seen.
        above: For each rank component, looks in a row above the threshold, (R,).

    Raises:
        TypeError: If the guide is not a `RankGuide`.
        ValueError: If a count is out of range, or the guide belongs to another model.
            From `step`, with a diagnosis, if nothing would be left; nothing has changed
            then.

    Wrong without ``elbo`` while the KL weight rises: let ``start`` be after the warm-up
    then.
    """

    def __init__(
        self,
        model: RankModel,
        guide: RankGuide,
        optimizer: Optimizer,
        *,
        start: int,
        every: int,
        log_alpha_threshold: float = 3.0,
        checks: int = 1,
        min_rank: int = 0,
        elbo: RankELBO | None = None,
    ) -> None:
        check_pair(model, guide)
        counts = {"start": (start, 0), "every": (every, 1), "checks": (checks, 1)}
        counts["min_rank"] = min_rank, 0
        example = "RankSchedule(..., start=500, every=100, checks=3)"
        for name, (number, least) in counts.items():
            check_count(name, number, least, example)
        check_threshold(log_alpha_threshold)
        self.model, self.guide, self.optimizer = model, guide, optimizer
        self.start, self.every, self.checks = start, every, checks
        self.log_alpha_threshold = log_alpha_threshold
        self.min_rank, self.elbo = min_rank, elbo
        self.steps = 0
        self.above = torch.zeros(model.space.size, dtype=torch.long)

    def step(self) -> Tensor | None:
        """Count a step, and prune if it is time.

        Returns:
            Which components stayed, bool (R,), R as before; None if all stayed.
        """
        self.steps += 1
        since = self.steps - self.start
        if since < 0 or since % self.every or self._is_warming_up():
            return None
        log_alpha = self.guide.log_alpha
        spared = best_of_modules(self.model, -log_alpha, self.min_rank).cpu()
        above = (log_alpha > self.log_alpha_threshold).cpu()
        counts = torch.where(above, self.above + 1, 0)
        keep = spared | (counts < self.checks)
        rule = f"log_alpha_threshold={self.log_alpha_threshold} at step {self.steps}"
        refuse_nothing_left(self.model, self.guide, keep, rule)
        select(self.model, self.guide, self.optimizer, keep=keep)
        # Only now: an error before leaves the counts as they were.
        self.above = counts[keep]
        return None if keep.all() else keep

    def state_dict(self) -> dict[str, Any]:
        """The counters, as JSON has them."""
        return {"steps": self.steps, "above": self.above.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, on a model pruned as that one was.

        Raises:
            ValueError: If the model has another number of rank components.
        """
        above = torch.tensor(state["above"], dtype=torch.long)
        if len(above) != self.model.space.size:
            raise ValueError(
                f"the saved schedule counts {len(above)} rank components and the model "
                f"has {self.model.space.size}; restore the model first, with "
                f"lrvd_pyro.selection.select"
            )
        self.steps, self.above = int(state["steps"]), above

    def _is_warming_up(self) -> bool:
        weight = getattr(self.elbo, "kl_weight", None)
        if self.elbo is None or not callable(weight):
            return False
        step = self.elbo.step
        # A staircase may stand still for a step: also compare with the next look.
        return any(weight(step + i) > weight(step) for i in (1, self.every))
