"""Temperature scaling: one number, fitted to labels that were not trained on."""

import math

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
        ValueError: If shapes do not fit, or a logit is NaN.

    Wrong on the data of training, where a network is surer than elsewhere; and where
    the data shift, since one number is fitted to those it saw.

    Source: Guo, Pleiss, Sun and Weinberger (2017, arXiv 1706.04599).

    >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    >>> round(fit_temperature(logits, torch.tensor([0, 0, 1])), 2)
    5.77
    """
    draws = logits.detach().double()
    draws = draws if draws.dim() == 3 else draws[None]
    if draws.dim() != 3 or draws.shape[1:2] != labels.shape or draws.isnan().any():
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels "
            f"{tuple(labels.shape)}; expected n x C or S x n x C without NaN, and one "
            f"class index per datum"
        )

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
    return math.exp((low + high) / 2)
