"""Batches: their type, their size, and the checks that every consumer shares."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lrvd_pyro._numbers import check_count

__all__ = [
    "Batch",
    "batch_size",
    "check_alike",
    "check_rereadable",
    "check_several",
    "gate_rows",
    "opened",
    "without_labels",
]

Batch = Mapping[str, Any]  # the network's keyword arguments, with or without labels


def check_several(batches: object, call: str) -> None:
    """Raise a TypeError that shows the right ``call`` unless there may be batches."""
    # A dict is iterable too: its keys would be taken for batches.
    if isinstance(batches, Mapping):
        raise TypeError(f"batches is one batch; expected several: {call}")
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        kind = type(batches).__name__
        raise TypeError(f"batches is a {kind}; expected several batches: {call}")


def check_rereadable(batches: object, call: str) -> None:
    """Raise a TypeError unless ``batches`` are several and can be read again.

    Args:
        batches: The batches.
        call: The call that reads them twice, up to their place in it.
    """
    check_several(batches, f"{call}[batch], ...)")
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches can be read only once, and there are two passes; pass a "
            f"DataLoader or a list: {call}list(batches), ...)"
        )


def check_alike(name: str, first: Tensor, later: Tensor) -> None:
    """Raise unless two batches give a datum the same shape, so that they can be joined.

    Args:
        name: What the tensors are, for the message.
        first: Of the first batch, ``B x ...``.
        later: Of a later one, ``B' x ...``.

    Raises:
        ValueError: If their shapes differ beyond the first axis.
    """
    if first.shape[1:] != later.shape[1:]:
        raise ValueError(
            f"{name} of one datum have the shape {tuple(first.shape[1:])} in the first "
            f"batch and {tuple(later.shape[1:])} in a later one; pad all batches to "
            f"one length, tokenizer(..., padding='max_length', max_length=...), or "
            f"give those of one length at a time"
        )


def opened(batches: Iterable[Batch], num_samples: int, call: str) -> Iterator[Batch]:
    """The batches as an iterator, checked to yield at least one.

    Args:
        batches: The batches; a generator is read once.
        num_samples: The number of draws that the caller will take.
        call: The right call, for messages.

    Raises:
        TypeError: If ``batches`` is one batch.
        ValueError: If there is no batch, or ``num_samples`` is below 1.
    """
    check_several(batches, call)
    stream = iter(batches)
    check_count("num_samples", num_samples, 1, call)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"got no batches; expected at least one: {call}")
    return chain([first], stream)


def without_labels(batch: Batch) -> dict[str, Any]:
    """The entries of a batch that the network itself takes.

    Raises:
        TypeError: If the batch is not a mapping.
    """
    _check_mapping(batch)
    return {name: value for name, value in batch.items() if name != "labels"}


def gate_rows(gate: Tensor, batch: Batch) -> Tensor:
    """A leaf tensor ``B x R`` that repeats one gate for every example of a batch.

    The gate row of an example changes the outputs of that example only. One backward
    pass of a sum over examples therefore gives the gradient of each example.

    Args:
        gate: The gate to repeat, ``R``.
        batch: The batch of ``B`` examples.
    """
    return gate.detach().expand(batch_size(batch), -1).clone().requires_grad_()


def batch_size(batch: Batch) -> int:
    """The number of examples in a batch: the length of its labels.

    Without labels it is the length of the first tensor in the batch.

    Raises:
        TypeError: If the batch is not a mapping, or holds no tensor.
        ValueError: If that tensor is empty.
    """
    _check_mapping(batch)
    for value in (batch.get("labels"), *batch.values()):
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            if len(value) == 0:
                raise ValueError("the batch has no examples; leave empty batches out")
            return len(value)
    raise TypeError(
        f"the batch {sorted(batch)} holds no tensor; pass the tokenizer's tensors as "
        f"keywords: svi.step(**tokenizer(texts, return_tensors='pt'), labels=labels)"
    )


def _check_mapping(batch: object) -> None:
    """Raise a TypeError that shows the way unless a batch is a mapping."""
    if isinstance(batch, Mapping):
        return
    make = "{'input_ids': ..., 'labels': ...}"
    if isinstance(batch, tuple | list):
        make = "dict(zip(('input_ids', 'labels'), batch))"
    raise TypeError(
        f"a batch is a {type(batch).__name__}; expected a mapping of the network's "
        f"keyword arguments, with or without labels: {make}"
    )
