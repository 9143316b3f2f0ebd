"""Temperature scaling: one number, fitted to labels that were not trained on."""

import math
import warnings

import torch
from torch import Tensor

from lrvd_pyro.diagnostics.scores import per_datum

__all__ = ["fit_temperature"]

_RANGE = math.log(1e-2), math.log(1e2)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T of least NLL on held-out data.

    ``p(y | x) = softmax(logits / T)``; of several draws, the mean of it over the draws.

    Example::

        T = fit_temperature(dev_logits, dev_labels)
        probs = (test_logits / T).softmax(-1)

    and for a posterior, whose log probabilities are logits::

        drawn = predict(model, guide, dev, return_samples=True).samples.log()
        T = fit_temperature(drawn, dev_labels)

    Args:
        logits: Logits or log probabilities, ``n x C``, or ``S x n x C`` of S draws.
        labels: Class indices, ``n``.

    Returns:
        T, between 0.01 and 100.

    Raises:
        TypeError: If labels are not integers.
        ValueError: If there are no data, shapes do not fit, or a label is outside ``0
            .. C - 1``. If a logit is NaN or infinity, or all draws exclude the label.

    Warns:
        UserWarning: If T is at an end of its range.

    Wrong on the data of training, where a network is surer than elsewhere; and where
    the data shift, since one number is fitted to those it saw.

    Source: Guo, Pleiss, Sun and Weinberger (2017, arXiv 1706.04599).

    >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    >>> round(fit_temperature(logits, torch.tensor([0, 0, 1])), 2)
    5.77
    """
    draws = logits.detach().double()
    draws = draws if draws.dim() == 3 else draws[None]
    _check(draws, logits.shape, labels)

    def nll(log_temperature: float) -> float:
        probs = (draws / math.exp(log_temperature)).softmax(-1).mean(0)
        return float(per_datum(probs, labels)["nll"].mean())

    # A grid, since the NLL of a mixture of draws may have several minima; then its
    # neighborhood in thirds.
    low, high = _RANGE
    grid = torch.linspace(low, high, 93).tolist()
    best = min(range(len(grid)), key=lambda i: nll(grid[i]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    for _ in range(40):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if nll(left) < nll(right) else (left, high)
    found = math.exp((low + high) / 2)
    if best in (0, len(grid) - 1):
        warnings.warn(
            f"T = {found:.3g} lies where its range ends, as of logits that are all "
            f"right, or have nothing to do with the labels; take more held-out data",
            stacklevel=2,
        )
    return found


def _check(draws: Tensor, shape: torch.Size, labels: Tensor) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels have dtype {labels.dtype}; expected class indices: labels.long()"
        )
    nan = bool(draws.isnan().any())
    if draws.dim() != 3 or draws.shape[1:2] != labels.shape or nan:
        raise ValueError(
            f"logits have shape {tuple(shape)} and labels {tuple(labels.shape)}; "
            f"expected n x C or S x n x C without NaN, and one class index per datum"
        )
    if draws.numel() == 0:
        raise ValueError(
            f"logits have shape {tuple(shape)}; expected data that were not trained on"
        )
    low, high, classes = int(labels.min()), int(labels.max()), draws.shape[2]
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels lie in {low} .. {high} and the logits have {classes} classes; "
            f"expected 0 .. {classes - 1}: leave out data without a label"
        )
    if (draws == math.inf).any():
        raise ValueError(
            "a logit is infinite; expected finite logits, or log probabilities: "
            "probs.log()"
        )
    own = draws.gather(2, labels.expand(len(draws), -1)[..., None].to(draws.device))
    if none := int((own == -math.inf).all(0).sum()):
        raise ValueError(
            f"{none} of {len(labels)} labels have probability 0, at any temperature; "
            f"expected logits, or log probabilities that did not underflow: "
            f"probs.clamp(min=1e-30).log()"
        )
