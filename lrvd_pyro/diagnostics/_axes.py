"""What the pictures of `lrvd_pyro.plots` share: axes, legends and short names."""

from typing import TYPE_CHECKING

__all__ = ["axes_or_new", "short", "with_legend"]

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes_or_new(
    ax: "Axes | None", *, width: float = 5.5, height: float = 3.4
) -> "Axes":
    """The given axes, or new ones of a size in inches.

    Raises:
        ImportError: Without matplotlib.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def with_legend(ax: "Axes", label: str | None) -> "Axes":
    """The same axes, with a legend if there is a label."""
    if label is not None:
        ax.legend(frameon=False, fontsize=8)
    return ax


def short(name: str) -> str:
    """A module's name from its layer number on, or its last three parts without one."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] :] if numbers else parts[-3:])
