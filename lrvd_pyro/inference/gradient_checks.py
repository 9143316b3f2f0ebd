"""Which parameters a loss depends on."""

import warnings
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from lrvd_pyro.inference.kl import latent_sites

__all__ = [
    "NO_GRADIENT",
    "NO_NOISE",
    "hierarchy",
    "parameters",
    "warn_of_unreached",
]

NO_NOISE = (
    "the likelihood has no gradient for the guide's parameters {}: the noise is off, "
    "and the KL alone would train them"
)
NO_GRADIENT = (
    "the loss has no gradient for the model's parameters {}: they stay as they are in "
    "this step. If training drops layers (layerdrop) or routes tokens to experts, "
    "later steps reach them"
)


def warn_of_unreached(result: Tensor, trace: Trace, message: str) -> None:
    """Warn of the parameters in ``trace`` that ``result`` does not depend on.

    Args:
        result: A tensor with its graph.
        trace: A run of the program that reads the parameters.
        message: The warning, with ``{}`` where the names go.
    """
    reached = _leaves(result)
    unreached = [
        name
        for name, parameter in parameters(trace).items()
        if parameter.requires_grad and parameter not in reached
    ]
    if unreached:
        warnings.warn(message.format(unreached), stacklevel=2)


def hierarchy(trace: Trace) -> Tensor:
    """The sum of latent log densities at detached values, in nats.

    Its gradient reaches parents only: the draws that other draws' densities depend on.
    """
    # With its graph, each value would count as reached by its own density.
    densities = [
        site["fn"].log_prob(site["value"].detach()).sum()
        for site in latent_sites(trace).values()
    ]
    return torch.stack(densities).sum() if densities else torch.zeros(())


def parameters(*traces: Trace) -> dict[str, Tensor]:
    """The unconstrained parameters that programs read, by name."""
    unconstrained: dict[str, Any] = {}
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "param":
                value = site["value"]
                # A constrained value is computed from the leaf that is trained.
                get = getattr(value, "unconstrained", None)
                unconstrained[name] = value if get is None else get()
    return unconstrained


def _leaves(result: Tensor) -> set[Tensor]:
    """The leaf tensors that ``result`` was computed from."""
    # The graph is walked with a stack: a deep network exceeds the recursion limit.
    leaves, seen, stack = set(), set(), [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        stack += [parent for parent, _ in node.next_functions]
    return leaves
