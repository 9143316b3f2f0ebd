"""A record of log alpha over training."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrvd_pyro.guides.base import RankGuide

if TYPE_CHECKING:
    import pandas

__all__ = ["RankHistory"]


class RankHistory:
    """Log alpha of every rank component over training, NaN for pruned ones.

    A record costs one reading of ``guide.log_alpha`` and R numbers. Components keep the
    numbers that they had in the full model, before any pruning.

    Example::

        history = RankHistory(guide)
        for step, batch in enumerate(loader):
            svi.step(**batch)
            if step % 50 == 0:
                history.record(step)
        history.frame().groupby(["step", "layer"]).log_alpha.median()

    Args:
        guide: A `RankGuide`. Make the history before components are removed: it
            starts with those that are there.

    Attributes:
        steps: The recorded steps, T of them.
        coordinates: Module, type, layer and rank index of each component, as in
            `RankSpace.coordinates`.
    """

    def __init__(self, guide: RankGuide) -> None:
        self.guide = guide
        self.coordinates = guide.space.coordinates
        self.steps: list[int] = []
        self._columns = list(guide.space.origin)
        self._records: list[Tensor] = []

    def record(self, step: int) -> None:
        """Record log alpha as it is now, after this step."""
        # ``origin`` numbers components as in the full model: pruning shifts the others.
        present = self.guide.space.origin
        record = torch.full((len(self._columns),), torch.nan, dtype=torch.float32)
        column = {origin: i for i, origin in enumerate(self._columns)}
        now = self.guide.log_alpha.to("cpu", torch.float32)
        record[[column[origin] for origin in present]] = now
        self.steps.append(step)
        self._records.append(record)

    @property
    def log_alpha(self) -> Tensor:
        """``T x R`` in float32, R of the full model; NaN once a component is gone."""
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
        members: dict[str, list[int]] = {}
        for i, name in enumerate(self.coordinates["module"]):
            members.setdefault(str(name), []).append(i)
        return {name: share[:, ranks].sum(-1) for name, ranks in members.items()}

    def frame(self) -> "pandas.DataFrame":
        """A table with one row per step and component, in long form.

        Its columns are ``step``, the coordinates of the component, and ``log_alpha``.
        """
        import pandas

        times, size = len(self.steps), len(self._columns)
        columns = {name: [*values] * times for name, values in self.coordinates.items()}
        steps = [step for step in self.steps for _ in range(size)]
        values = self.log_alpha.flatten().numpy()
        return pandas.DataFrame({"step": steps, **columns, "log_alpha": values})

    def state_dict(self) -> dict[str, Any]:
        """The records as numbers, strings and one tensor, ``log_alpha``."""
        return {
            "steps": [*self.steps],
            "columns": [*self._columns],
            "coordinates": self.coordinates,
            "log_alpha": self.log_alpha,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the history that `state_dict` was taken from.

        Raises:
            ValueError: If the guide has rank components that the saved history lacks,
                or its records have other numbers of steps and components, or NaN where
                a rank is present.
        """
        steps, columns, places = (state[n] for n in ("steps", "columns", "coordinates"))
        sizes = {len(columns), *map(len, places.values())}
        if len(sizes) > 1 or state["log_alpha"].shape != (len(steps), len(columns)):
            raise ValueError(
                f"the saved history has {len(steps)} steps, {sorted(sizes)} components "
                f"and log alpha of {tuple(state['log_alpha'].shape)}; expected steps x "
                f"components: take the state_dict of a RankHistory"
            )
        if foreign := set(self.guide.space.origin) - set(state["columns"]):
            raise ValueError(
                f"the saved history lacks the rank components {sorted(foreign)} of "
                f"this guide. It belongs to another model; load it into the history of "
                f"the guide that it was made with"
            )
        present = torch.isin(
            torch.tensor(columns), torch.tensor(self.guide.space.origin)
        )
        gone = state["log_alpha"][:, present].isnan().any()
        if gone or not all(type(step) is int for step in steps):
            raise ValueError(
                f"the saved history has the steps {steps[:3]}... and NaN where ranks "
                f"are present: {bool(gone)}; expected whole numbers, and NaN of ranks "
                f"that are gone: take the state_dict of a RankHistory"
            )
        self.steps, self._columns = [*state["steps"]], [*state["columns"]]
        self.coordinates = state["coordinates"]
        self._records = list(state["log_alpha"])
