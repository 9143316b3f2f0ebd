"""The contract of a likelihood, its optional capabilities, and the data plate.

Only the data plate, in this module, scales a batch of B examples to the data set of N.
"""

from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from torch import Tensor

__all__ = [
    "Contrasts",
    "Curvature",
    "Likelihood",
    "check_likelihood",
    "contrasts_of",
    "curvature_of",
    "data_plate",
    "precise",
    "samples_first",
]


@runtime_checkable
class Likelihood(Protocol):
    """The three methods that a model calls on its likelihood.

    `Curvature` and `Contrasts` are optional capabilities; a function that needs one
    refuses a likelihood without it by name. A likelihood with learned parameters is a
    PyroModule, as `Normal` is. Wrong when a likelihood does not open `data_plate`: its
    log-likelihood then counts B examples in place of N.

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
        """Observe the labels at the site ``labels``, or sample them there if None.

        Args:
            predictions: The network's output for a batch, ``B x ...``.
            labels: The labels, ``B`` or ``B x ...``. Several of one example belong to
                one event: ``fn.to_event(labels.dim() - 1)``.
            num_data: The number N of examples in the data set.
        """

    def summarize(self, predictions: Tensor, /) -> dict[str, Tensor]:
        """Reduce the predictions of one batch under S draws to named fields.

        Args:
            predictions: The network's outputs, ``S x B x ...``.

        Returns:
            Fields whose first dimension is the batch. The field ``samples``, ``B x S x
            ...``, is dropped unless the user asks for it.
        """

    def collect(self, fields: dict[str, Tensor], /) -> Any:
        """Make the prediction for all data.

        Args:
            fields: The fields of `summarize`, concatenated over batches.
        """


@runtime_checkable
class Curvature(Protocol):
    """A likelihood whose Fisher information has a closed form."""

    def fisher_roots(self, predictions: Tensor, /) -> Tensor:
        """K differentiable functions whose gradients are roots of the Fisher matrix.

        For each example, the outer products of the K gradients sum to its Fisher
        information.

        Args:
            predictions: The network's output, ``B x ...``.

        Returns:
            The values of the functions, ``B x K``.
        """


@runtime_checkable
class Contrasts(Protocol):
    """A likelihood that depends on a few linear functions of its predictions.

    Wrong when the likelihood also depends on the predictions in another way.
    """

    def contrasts(self, predictions: Tensor, /) -> Tensor:
        """The K linear functions of the predictions.

        The linearized predictive takes one backward pass for each.

        Args:
            predictions: The network's output, ``B x ...``.

        Returns:
            The contrasts, ``B x K``.
        """

    def from_contrasts(self, contrasts: Tensor, /) -> Tensor:
        """Predictions, ``S x B x ...``, that have the given contrasts.

        Args:
            contrasts: One set of contrasts per draw, ``S x B x K``.
        """


def check_likelihood(likelihood: object) -> None:
    """Check that an object has the three methods of a `Likelihood`.

    Raises:
        TypeError: If some are missing, which the message lists.
    """
    methods = ("__call__", "summarize", "collect")
    missing = [n for n in methods if not callable(getattr(likelihood, n, None))]
    # A class has the methods too, and __call__ from its metaclass.
    if missing or isinstance(likelihood, type):
        raise TypeError(
            f"likelihood is {likelihood!r}, "
            + (f"which lacks {missing}" if missing else "a class and not an object")
            + f"; expected an object with the methods {', '.join(methods)}: "
            f"likelihoods.Categorical(), likelihoods.Normal(), or one of your own"
        )


def curvature_of(likelihood: object, needed_by: str) -> Curvature:
    """The likelihood, checked to be a `Curvature`.

    Args:
        likelihood: A likelihood.
        needed_by: The call that needs the capability, for the message.

    Raises:
        TypeError: If ``fisher_roots`` is missing.
    """
    if not isinstance(likelihood, Curvature):
        raise _lacks(likelihood, "fisher_roots", needed_by)
    return likelihood


def contrasts_of(likelihood: object, needed_by: str) -> Contrasts:
    """The likelihood, checked to have `Contrasts`.

    Args:
        likelihood: A likelihood.
        needed_by: The call that needs the capability, for the message.

    Raises:
        TypeError: If ``contrasts`` or ``from_contrasts`` is missing.
    """
    if not isinstance(likelihood, Contrasts):
        raise _lacks(likelihood, "contrasts and from_contrasts", needed_by)
    return likelihood


def _lacks(likelihood: object, methods: str, needed_by: str) -> TypeError:
    return TypeError(
        f"{needed_by} needs a likelihood with {methods}, which "
        f"{type(likelihood).__name__} does not have; lrvd_pyro.likelihoods.Curvature "
        f"and Contrasts say what they return"
    )


def data_plate(size: int, labels: Tensor | None, num_data: int) -> pyro.plate:
    """The plate ``data``, which multiplies log-likelihoods by N/B.

    Without labels its scale is 1.

    Args:
        size: The number B of examples in the batch.
        labels: The observed labels, or None.
        num_data: The number N of examples in the data set.

    Raises:
        ValueError: If a labeled batch is larger than the data set.
    """
    # A batch to predict for may be larger than the data set, so it has no N.
    if labels is None:
        return pyro.plate("data", size)
    if size > num_data:
        raise ValueError(
            f"a labeled batch has {size} examples but num_data={num_data}; expected "
            f"the size of the training set: GateLoRA(..., num_data=len(train))"
        )
    # The plate needs the length of the subsample only. With subsample_size instead, it
    # would draw randperm(N) at each step: slow for large N, and it moves the seed.
    return pyro.plate("data", num_data, subsample=torch.empty(size))


def precise(predictions: Tensor) -> Tensor:
    """Half precision as float32; 16 bits cost hundredths of a nat per datum."""
    half = predictions.dtype in (torch.bfloat16, torch.float16)
    return predictions.float() if half else predictions


def samples_first(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fields with ``samples``, if present, as ``S x n x ...``; for `collect`."""
    # `summarize` puts the batch first, so that batches can be concatenated
    samples = fields.get("samples")
    if samples is None:
        return dict(fields)
    return fields | {"samples": samples.transpose(0, 1)}
