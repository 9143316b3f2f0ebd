"""Likelihoods: from the network's predictions to the observed labels.

The data plate, and with it the factor N/B that scales a batch to the data set, stands
here and nowhere else.
"""

from typing import Any, Protocol

import pyro
import torch
from torch import Tensor


class Likelihood(Protocol):
    """What a model asks of its likelihood."""

    def __call__(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        """Observe ``labels`` (or sample them) at the site ``labels``."""

    def fisher_roots(self, predictions: Tensor) -> Tensor:
        """``B x K`` functions of ``B x ...`` predictions, differentiable.

        The outer products of their gradients sum to the Fisher information of each
        example.
        """

    def contrasts(self, predictions: Tensor) -> Tensor:
        """``B x K`` linear functions of ``B x ...`` predictions.

        The likelihood must depend on the predictions through them alone. The linearized
        predictive takes one backward pass for each.
        """

    def from_contrasts(self, contrasts: Tensor) -> Tensor:
        """``S x B x ...`` predictions that have the contrasts ``S x B x K``."""

    def summarize(self, predictions: Tensor) -> dict[str, Tensor]:
        """Reduce ``S x B x ...`` predictions to the fields of `collect`."""

    def collect(self, fields: dict[str, Tensor]) -> Any:
        """The prediction for all data from the concatenated fields."""


def data_plate(size: int, labels: Tensor | None, num_data: int) -> Any:
    """The plate ``data``, whose scale is N/B when labels are observed.

    Raises:
        ValueError: If a labeled batch is larger than the data set.
    """
    if labels is None:
        return pyro.plate("data", size)
    if size > num_data:
        raise ValueError(
            f"a labeled batch has {size} examples but num_data={num_data}; expected "
            f"the size of the training set: GateLoRA(..., num_data=len(train))"
        )
    return pyro.plate("data", num_data, subsample=torch.empty(size))


def precise(predictions: Tensor) -> Tensor:
    """Half precision as float32; 16 bits cost hundredths of a nat in a likelihood."""
    half = predictions.dtype in (torch.bfloat16, torch.float16)
    return predictions.float() if half else predictions


def samples_first(fields: dict[str, Tensor]) -> dict[str, Any]:
    samples = fields.get("samples")
    if samples is None:
        return dict(fields)
    return fields | {"samples": samples.transpose(0, 1)}
