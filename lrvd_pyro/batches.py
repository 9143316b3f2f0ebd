"""What everything that goes through batches asks of them."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor


Batch = Mapping[str, Any]  # what the network takes as keywords, with labels or without


def check_several(batches: object, call: str) -> None:
    """Raise a TypeError that shows the right ``call`` if ``batches`` is one batch."""
    if isinstance(batches, Mapping):
        raise TypeError(f"batches is one batch; expected several: {call}")


def opened(
    batches: Iterable[Mapping[str, Any]], num_samples: int, call: str
) -> Iterator[Mapping[str, Any]]:
    """The batches, of which there is at least one, for at least one draw.

    Raises:
        TypeError: If ``batches`` is one batch.
        ValueError: If there is no batch, or ``num_samples`` is below 1.
    """
    check_several(batches, call)
    stream = iter(batches)
    first = next(stream, None)
    if first is None or num_samples < 1:
        raise ValueError(
            f"got {0 if first is None else 'some'} batches and "
            f"num_samples={num_samples}; expected at least one of each: {call}"
        )
    return chain([first], stream)


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the network itself takes."""
    return {name: value for name, value in batch.items() if name != "labels"}


def gate_rows(gate: Tensor, batch: dict[str, Any]) -> Tensor:
    """A leaf with this gate (R,) for each example of a batch, ``B x R``.

    An example's gates move no other example, so that one backward pass of a sum over
    examples gives the derivatives of each.
    """
    return gate.detach().expand(batch_size(batch), -1).clone().requires_grad_()


def batch_size(batch: dict[str, Any]) -> int:
    """The number of examples in a batch: that of its labels, else of its first tensor.

    Raises:
        TypeError: If the batch holds no tensor.
        ValueError: If its first tensor is empty.
    """
    for value in (batch.get("labels"), *batch.values()):
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            if len(value) == 0:
                raise ValueError("the batch has no examples; leave empty batches out")
            return len(value)
    raise TypeError(
        f"the batch {sorted(batch)} holds no tensor; pass the tokenizer's tensors as "
        f"keywords: svi.step(**tokenizer(texts, return_tensors='pt'), labels=labels)"
    )
