"""Pictures of ranks: over training, by threshold, by gate, and by energy."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lrvd_pyro.diagnostics._axes import axes_or_new, short, with_legend
from lrvd_pyro.selection.history import RankHistory

__all__ = [
    "effective_rank",
    "energy_curves",
    "gate_forest",
    "rank_heatmap",
    "threshold_sweep",
]

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {"accuracy": "accuracy", "nll": "NLL (nats per datum)", "ece": "ECE"}


def rank_heatmap(
    history: RankHistory,
    *,
    by: Literal["layer", "type", "module"] = "layer",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the effective rank over training, a row per layer, module type or module.

    A row has ``sum_i 1 / (1 + alpha_i)`` over its components that are not pruned,
    divided by the number of its modules.

    Args:
        history: The record of a run.
        by: What a row stands for.
        ax: Where to draw; None makes new axes.

    Returns:
        The axes.

    Raises:
        ValueError: If the history has fewer than two records.
    """
    _require_records([history])
    share = torch.sigmoid(-history.log_alpha).nan_to_num(0.0)
    places = history.coordinates
    groups = list(dict.fromkeys(places[by]))
    if by == "layer":
        groups = sorted(groups, key=lambda layer: int(str(layer)))
    rows = []
    for group in groups:
        members = [i for i, name in enumerate(places[by]) if name == group]
        modules = {places["module"][i] for i in members}
        rows.append(share[:, members].sum(1) / len(modules))
    ax = axes_or_new(ax, height=max(2.4, 1.2 + 0.3 * len(groups)))
    picture = torch.stack(rows).numpy()
    mesh = ax.pcolormesh(
        history.steps, range(len(groups)), picture, vmin=0.0, shading="nearest"
    )
    colors = ax.figure.colorbar(mesh, ax=ax)
    colors.set_label("effective rank per module")
    ax.set_yticks(range(len(groups)), [short(str(group)) for group in groups])
    ax.invert_yaxis()
    ax.set(xlabel="optimization step", ylabel="" if by == "type" else by)
    ax.set_title(f"Effective rank over training, by {'module ' * (by == 'type')}{by}")
    return ax


def effective_rank(
    histories: RankHistory | Sequence[RankHistory],
    *,
    label: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the effective rank of all modules over training, mean ± sd over the runs.

    Args:
        histories: The record of one run, or those of several at the same steps.
        label: The curve's name in the legend.
        ax: Where to draw; None makes new axes.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no history, one has fewer than two records, or they
            were recorded at different steps.
    """
    runs = [histories] if isinstance(histories, RankHistory) else list(histories)
    _require_records(runs)
    steps = runs[0].steps
    if any(run.steps != steps for run in runs):
        raise ValueError(
            f"the histories were recorded at different steps, {steps[:3]} ... and "
            f"others; a mean over runs needs history.record(step) at the same ones"
        )
    ranks = torch.stack([run.effective_rank for run in runs])
    mean = ranks.mean(0).numpy()
    # Without the correction, the sd of a single run is 0 and not NaN.
    sd = ranks.std(0, correction=min(1, len(runs) - 1)).numpy()
    name = f"{label}, mean ± sd of {len(runs)} runs" if len(runs) > 1 else label
    ax = axes_or_new(ax)
    (line,) = ax.plot(steps, mean, label=name if label else None)
    if len(runs) > 1:
        color = line.get_color()
        ax.fill_between(steps, mean - sd, mean + sd, color=color, alpha=0.25, lw=0)
    ax.set(xlabel="optimization step", ylabel="effective rank", ylim=(0, None))
    ax.set_title("Effective rank over training")
    return with_legend(ax, label)


def threshold_sweep(
    rows: Iterable[Mapping[str, Any]],
    *,
    score: Literal["accuracy", "nll", "ece"] = "accuracy",
    label: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a score against the ranks kept, a point for each pruning threshold.

    Rows of one threshold, as from several seeds, make one point at their means, with
    their standard deviations. The threshold of log alpha stands at a point, unless the
    point keeps about as many ranks as the last marked one.

    Args:
        rows: Mappings with "threshold", "rank" and the score.
        score: Which column to draw.
        label: The curve's name in the legend.
        ax: Where to draw; None makes new axes.

    Returns:
        The axes.

    Raises:
        ValueError: If there are no rows, or a column is missing.
    """
    rows, columns = list(rows), ("threshold", "rank", score)
    if not rows or any(name not in row for row in rows for name in columns):
        raise ValueError(
            f"got {len(rows)} rows with the columns "
            f"{sorted({str(name) for row in rows for name in row})}; expected "
            f"{columns} in each"
        )
    points = []
    for threshold in sorted({float(row["threshold"]) for row in rows}):
        seeds = [row for row in rows if float(row["threshold"]) == threshold]
        values = torch.tensor([[float(r["rank"]), float(r[score])] for r in seeds])
        sd = values.std(0, correction=min(1, len(seeds) - 1))
        points.append([threshold, *values.mean(0).tolist(), *sd.tolist()])
    thresholds, x, y, x_sd, y_sd = zip(*points)
    ax = axes_or_new(ax)
    ax.errorbar(x, y, y_sd, x_sd, fmt="o-", ms=4, lw=1, capsize=2, label=label)
    marked = -torch.inf
    for threshold, at in zip(thresholds, zip(x, y)):
        if at[0] - marked > 0.04 * max(x):
            marked, mark = at[0], f"{threshold:g}"
            ax.annotate(mark, at, xytext=(4, 5), textcoords="offset points", size=8)
    ax.set(xlabel="rank components kept", ylabel=_NAMES[score], ylim=_zoomed(ax))
    title = _NAMES[score].split(" (")[0]
    ax.set_title(f"{title[0].upper()}{title[1:]} by log alpha threshold")
    return with_legend(ax, label)


def gate_forest(
    data: Mapping[str, Any],
    *,
    prob: float = 0.9,
    sort: bool = True,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the median and a central interval of every gate, module by module.

    Args:
        data: What `lrvd_pyro.to_arviz` returned for a `GateLoRA`.
        prob: The probability in the interval.
        sort: Order the gates of a module by their medians.
        ax: Where to draw; None makes new axes.

    Returns:
        The axes.

    Raises:
        ValueError: If ``prob`` is not between 0 and 1, or the data have no gates.
    """
    posterior = data["posterior"]
    if not 0 < prob < 1 or "gate" not in posterior:
        raise ValueError(
            f"prob={prob} and variables {sorted(posterior)}; expected a probability "
            f"between 0 and 1 and the gates of to_arviz(GateLoRA(...), ...)"
        )
    gates = torch.as_tensor(posterior["gate"].values).flatten(0, 1).double()
    tails = torch.tensor([(1 - prob) / 2, 0.5, (1 + prob) / 2], dtype=torch.double)
    low, median, high = gates.quantile(tails, 0).numpy()
    modules = [str(name) for name in posterior["module"].values]
    ax = axes_or_new(ax, height=1.0 + 0.06 * len(modules))
    ticks, start = [], 0
    for i, name in enumerate(dict.fromkeys(modules)):
        members = [j for j, module in enumerate(modules) if module == name]
        members = sorted(members, key=lambda j: median[j]) if sort else members
        y, color = range(start, start + len(members)), f"C{i % 2}"
        ax.hlines(y, low[members], high[members], color, lw=1.2)
        ax.plot(median[members], y, "o", color=color, ms=2.5)
        ticks.append(start + (len(members) - 1) / 2)
        start += len(members) + 1
    ax.set_yticks(ticks, [short(name) for name in dict.fromkeys(modules)], fontsize=8)
    ax.set_ylim(start, -2)
    ax.set(xlabel=f"gate, median and {prob:.0%} interval", title="Posterior of gates")
    return ax


def energy_curves(values: Mapping[str, Tensor], *, ax: "Axes | None" = None) -> "Axes":
    """Draw the share of each module's energy in its first k balanced components.

    A module's line is ``sum_{i <= k} t_i^2 / sum_i t_i^2`` against k, with t from
    `lrvd_pyro.gauge.hankel_values`. It is the same for all gauges of one adapter.

    Args:
        values: The values t of each module, ``r``, by its name.
        ax: Where to draw; None makes new axes.

    Returns:
        The axes.

    Raises:
        ValueError: If there are no modules, or one has no energy.
    """
    empty = [name for name, t in values.items() if not float(t.square().sum()) > 0]
    if empty or not values:
        raise ValueError(
            f"of {len(values)} modules {empty} have no energy; expected the values of "
            f"a trained adapter: hankel_values(gramians(model, batches))"
        )
    ax = axes_or_new(ax)
    from matplotlib import colormaps

    shades = colormaps["viridis"](torch.linspace(0, 1, len(values)).numpy())
    for (name, t), color in zip(values.items(), shades):
        energy = t.square().cumsum(0) / t.square().sum()
        whole = torch.cat([energy.new_zeros(1), energy]).cpu().numpy()
        ax.plot(range(len(whole)), whole, color=color, label=short(name), lw=1.2)
    ax.set(xlabel="components kept", ylabel="share of energy", ylim=(0, 1.02))
    ax.set_title("Energy of each module, balanced")
    ax.legend(frameon=False, fontsize=7, ncols=2, loc="lower right")
    return ax


def _zoomed(ax: "Axes") -> tuple[float, float]:
    """The limits of y, with room for the labels at the points."""
    low, high = ax.dataLim.intervaly
    room = 0.12 * (high - low) or 0.05
    return low - room, high + room


def _require_records(runs: Sequence[RankHistory]) -> None:
    counts = [len(run.steps) for run in runs]
    if not counts or min(counts) < 2:
        raise ValueError(
            f"got histories with {counts} records; expected at least one history and "
            f"two records in each: history.record(step) while training"
        )
