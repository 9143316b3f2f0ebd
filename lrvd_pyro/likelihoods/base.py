"""Likelihoods: from the network's predictions to the observed labels.

The data plate, and with it the factor N/B that scales a batch to the data set, stands
here and nowhere else.
"""

from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from torch import Tensor


@runtime_checkable
class Likelihood(Protocol):
    """What a model asks of its likelihood: three methods.

    A likelihood may offer two capabilities more, `Curvature` and `Contrasts`. What
    needs one says so by name where it is missing. Parameters to learn belong in a
    PyroModule, as in `Normal`.

    Example::

        class Poisson:
            def __call__(self, predictions, labels, num_data):
                rate = predictions.squeeze(1).exp()
                with data_plate(len(rate), labels, num_data):
                    pyro.sample("labels", dist.Poisson(rate), obs=labels)

            def summarize(self, predictions):
                rates = predictions.squeeze(2).exp()
                return {"rate": rates.mean(0), "samples": rates.T}

            def collect(self, fields):
                return SimpleNamespace(**samples_first(fields))
    """

    def __call__(
        self, predictions: Tensor, labels: Tensor | None, num_data: int, /
    ) -> None:
        """Observe ``labels`` (or sample them) at the site ``labels``."""

    def summarize(self, predictions: Tensor, /) -> dict[str, Tensor]:
        """Reduce ``S x B x ...`` predictions to the fields of `collect`.

        Every field has the batch first. ``samples`` is kept if the user asks for it.
        """

    def collect(self, fields: dict[str, Tensor], /) -> Any:
        """The prediction for all data from the concatenated fields."""


@runtime_checkable
class Curvature(Protocol):
    """A likelihood whose Fisher information is known in closed form."""

    def fisher_roots(self, predictions: Tensor, /) -> Tensor:
        """``B x K`` functions of ``B x ...`` predictions, differentiable.

        The outer products of their gradients sum to the Fisher information of each
        example.
        """


@runtime_checkable
class Contrasts(Protocol):
    """A likelihood that depends on a few linear functions of its predictions."""

    def contrasts(self, predictions: Tensor, /) -> Tensor:
        """``B x K`` linear functions of ``B x ...`` predictions.

        The likelihood must depend on the predictions through them alone. The linearized
        predictive takes one backward pass for each.
        """

    def from_contrasts(self, contrasts: Tensor, /) -> Tensor:
        """``S x B x ...`` predictions that have the contrasts ``S x B x K``."""


def check_likelihood(likelihood: object) -> None:
    """Raise unless an object has the three methods of a `Likelihood`.

    Raises:
        TypeError: With those that are missing.
    """
    named = ("__call__", "summarize", "collect")
    missing = [name for name in named if not hasattr(likelihood, name)]
    if missing or isinstance(likelihood, type):
        raise TypeError(
            f"likelihood is {likelihood!r}, "
            + (f"which lacks {missing}" if missing else "a class and not an object")
            + f"; expected an object with the methods {', '.join(named)}: "
            f"likelihoods.Categorical(), likelihoods.Normal(), or one of your own"
        )


def curvature_of(likelihood: object, needed_by: str) -> Curvature:
    """The likelihood, if it has a `Curvature`.

    Raises:
        TypeError: With what needs it.
    """
    if not isinstance(likelihood, Curvature):
        raise _lacks(likelihood, "fisher_roots", needed_by)
    return likelihood


def contrasts_of(likelihood: object, needed_by: str) -> Contrasts:
    """The likelihood, if it has `Contrasts`.

    Raises:
        TypeError: With what needs them.
    """
    if not isinstance(likelihood, Contrasts):
        raise _lacks(likelihood, "contrasts and from_contrasts", needed_by)
    return likelihood


def _lacks(likelihood: object, methods: str, needed_by: str) -> TypeError:
    return TypeError(
        f"{needed_by} needs a likelihood with {methods}, which "
        f"{type(likelihood).__name__} does not have; lrvd_pyro.likelihoods.Likelihood "
        f"says what they return"
    )


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
