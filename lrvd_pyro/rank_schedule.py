"""Rank selection while training goes on, and a record of the ranks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrvd_pyro.elbo import RankELBO
from lrvd_pyro.guides.rank_diagonal import RankDiagonal
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.pruning import (
    best_of_modules,
    check_pair,
    refuse_nothing_left,
    select,
)

if TYPE_CHECKING:
    import pandas


class RankSchedule:
    """Prunes during training: call `step` after every optimisation step.

    From step ``start`` on it looks every ``every`` steps, and removes the components
    whose log alpha was above the threshold at ``checks`` looks in a row. While the KL
    weight of ``elbo`` still rises it does not look: log alpha then belongs to another
    posterior than the one in training, and what was removed never returns.

    Example::

        schedule = RankSchedule(
            model, guide, svi.optim, start=500, every=100, checks=3, elbo=elbo
        )
        for batch in loader:
            svi.step(**batch)
            schedule.step()

    Args:
        model: The model in training.
        guide: Its `RankDiagonal`.
        optimizer: What trains both, as in `prune`.
        start: The first step to look at, counted from 1.
        every: Steps between looks.
        log_alpha_threshold: As in `prune`; `lrvd_pyro.pruning` has its units.
        checks: Looks in a row above the threshold before a component goes.
        min_rank: What every module keeps at least.
        elbo: The loss, to know when its KL has warmed up.

    Attributes:
        steps: Optimisation steps seen.
        above: For each rank component, looks in a row above the threshold, (R,).

    Raises:
        TypeError: If the guide is no `RankDiagonal`.
        ValueError: If a count is out of range; from `step`, if nothing would be left:
            with a diagnosis, all as it was.
    """

    def __init__(
        self,
        model: RankModel,
        guide: RankDiagonal,
        optimizer: Any,
        *,
        start: int,
        every: int,
        log_alpha_threshold: float = 3.0,
        checks: int = 1,
        min_rank: int = 0,
        elbo: RankELBO | None = None,
    ) -> None:
        check_pair(model, guide)
        if start < 0 or every < 1 or checks < 1:
            raise ValueError(
                f"start={start}, every={every}, checks={checks}; expected numbers of "
                f"steps and looks: RankSchedule(..., start=500, every=100, checks=3)"
            )
        self.model, self.guide, self.optimizer = model, guide, optimizer
        self.start, self.every, self.checks = start, every, checks
        self.log_alpha_threshold = log_alpha_threshold
        self.min_rank, self.elbo = min_rank, elbo
        self.steps = 0
        self.above = torch.zeros(model.space.size, dtype=torch.long)

    def step(self) -> Tensor | None:
        """Count a step; returns which components stayed, bool (R,), if some went."""
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
        select(self.model, self.guide, keep, self.optimizer)
        self.above = counts[keep]
        return None if keep.all() else keep

    def state_dict(self) -> dict[str, Any]:
        """The counters, as JSON has them."""
        return {"steps": self.steps, "above": self.above.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, on a model pruned as that one was.

        Raises:
            ValueError: If the model has another number of rank components.
        """
        above = torch.tensor(state["above"], dtype=torch.long)
        if len(above) != self.model.space.size:
            raise ValueError(
                f"the saved schedule counts {len(above)} rank components and the model "
                f"has {self.model.space.size}; restore the model first, with "
                f"lrvd_pyro.pruning.select"
            )
        self.steps, self.above = int(state["steps"]), above

    def _is_warming_up(self) -> bool:
        weight = getattr(self.elbo, "kl_weight", None)
        if self.elbo is None or not callable(weight):
            return False
        step = self.elbo.step
        return any(weight(step + i) > weight(step) for i in (1, self.every))


class RankHistory:
    """Log alpha of every rank component over training, pruned ones as NaN.

    Costs one reading of ``guide.log_alpha`` and R numbers per record; components keep
    the numbers that they had in the full model, before any pruning.

    Example::

        history = RankHistory(guide)
        for step, batch in enumerate(loader):
            svi.step(**batch)
            if step % 50 == 0:
                history.record(step)
        history.frame().groupby(["step", "layer"]).log_alpha.median()

    Args:
        guide: A `RankDiagonal`. Make the history before components are removed.

    Attributes:
        steps: The steps recorded, T of them.
        coordinates: Module, type, layer and rank index of each component, as
            `RankSpace.coordinates`.
    """

    def __init__(self, guide: RankDiagonal) -> None:
        self.guide = guide
        self.coordinates = guide.space.coordinates
        self.steps: list[int] = []
        self._columns = list(guide.space.origin)
        self._records: list[Tensor] = []

    def record(self, step: int) -> None:
        """Note log alpha as it is now, after this step."""
        present = self.guide.space.origin
        record = torch.full((len(self._columns),), torch.nan, dtype=torch.float32)
        column = {origin: i for i, origin in enumerate(self._columns)}
        now = self.guide.log_alpha.to("cpu", torch.float32)
        record[[column[origin] for origin in present]] = now
        self.steps.append(step)
        self._records.append(record)

    @property
    def log_alpha(self) -> Tensor:
        """``T x R`` in float32, R of the full model; NaN where a component is gone."""
        empty = torch.empty(0, len(self._columns), dtype=torch.float32)
        return torch.stack(self._records) if self._records else empty

    @property
    def effective_rank(self) -> Tensor:
        """``sum_i 1 / (1 + alpha_i)`` over the components present, (T,)."""
        return torch.sigmoid(-self.log_alpha).nansum(-1)

    @property
    def effective_ranks(self) -> dict[str, Tensor]:
        """The effective rank of each module of the full model, (T,) each."""
        share = torch.sigmoid(-self.log_alpha).nan_to_num(0.0)
        modules = [str(name) for name in self.coordinates["module"]]
        return {
            name: share[:, [i for i, m in enumerate(modules) if m == name]].sum(-1)
            for name in dict.fromkeys(modules)
        }

    def frame(self) -> "pandas.DataFrame":
        """One row per step and component: step, its coordinates, log_alpha."""
        import pandas

        times, size = len(self.steps), len(self._columns)
        columns = {name: [*values] * times for name, values in self.coordinates.items()}
        steps = [step for step in self.steps for _ in range(size)]
        values = self.log_alpha.flatten().numpy()
        return pandas.DataFrame({"step": steps, **columns, "log_alpha": values})

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and one tensor, ``log_alpha``."""
        return {
            "steps": [*self.steps],
            "columns": [*self._columns],
            "coordinates": self.coordinates,
            "log_alpha": self.log_alpha,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: If the guide has rank components that the saved history lacks.
        """
        if foreign := set(self.guide.space.origin) - set(state["columns"]):
            raise ValueError(
                f"the saved history lacks the rank components {sorted(foreign)} of "
                f"this guide; it belongs to another model"
            )
        self.steps, self._columns = [*state["steps"]], [*state["columns"]]
        self.coordinates = state["coordinates"]
        self._records = list(state["log_alpha"])
