"""What the pictures of `lrvd_pyro.plots` share."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes_or_new(
    ax: "Axes | None", *, width: float = 5.5, height: float = 3.4
) -> "Axes":
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def with_legend(ax: "Axes", label: str | None) -> "Axes":
    if label is not None:
        ax.legend(frameon=False, fontsize=8)
    return ax


def short(name: str) -> str:
    """The module's name from its layer's number on; the last three parts of others."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] :] if numbers else parts[-3:])
