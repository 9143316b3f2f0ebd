"""Gradients that 16 bits can hold, and the check that they are finite."""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lrvd_pyro._compat.torch import add_each, multiply_each
from lrvd_pyro.autocast import autocast_dtype
from lrvd_pyro.rank_space.space import RankSpace

__all__ = [
    "Gradients",
    "data_scale",
    "infinite_gradients",
    "largest_square",
    "refusal",
    "uses_float16",
    "weakly",
]

_LARGEST = torch.finfo(torch.float16).max
_float16: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def data_scale(trace: Trace) -> float:
    """The power of two next to the scale N/B of a likelihood; 1 or more.

    The gradients of ``loss / data_scale`` within the network are those of a sum over
    the batch, whatever N is. Division by a power of two is exact.

    Args:
        trace: A run of the model.
    """
    nodes: dict[str, Any] = trace.nodes
    scales = [
        float(site["scale"])
        for site in nodes.values()
        if site["type"] == "sample"
        and site["is_observed"]
        # A tensor would have to be read from the device.
        and isinstance(site["scale"], Real)
    ]
    largest = max(scales, default=1.0)
    usable = math.isfinite(largest) and largest > 1.0
    return 2.0 ** round(math.log2(largest)) if usable else 1.0


def uses_float16(program: object) -> bool:
    """Whether a program computes in float16, as seen in its last forward pass.

    Wrong where autocast begins behind the LoRA layers: an infinite gradient is then
    refused.

    Other precisions have the range of float32, so that their gradients stay as they are
    for whoever listens to them in the backward pass.
    """
    if any(autocast_dtype(device) is torch.float16 for device in ("cpu", "cuda")):
        return True
    if not isinstance(program, nn.Module):
        return False
    # Accelerate enters autocast within the network's forward pass.
    space = getattr(program, "space", None)
    if isinstance(space, RankSpace) and space.binding.in_float16:
        return True
    if program not in _float16:
        found = any(p.dtype is torch.float16 for p in program.parameters())
        _float16[program] = found
    return _float16[program]


class Gradients:
    """The gradients of one call, apart from those that earlier calls have left.

    The gradient of a float16 parameter is held in float32. In nats per data set it
    would exceed float16's 65,504.

    Attributes:
        parameters: The parameters whose gradients are collected, by name.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, Tensor] = {}
        self._earlier: dict[str, Tensor | None] = {}

    def collect(self, parameters: Mapping[str, Tensor]) -> None:
        """Set the earlier gradients of some parameters aside, and start from none."""
        for name in parameters.keys() - self.parameters.keys():
            parameter = parameters[name]
            if parameter.requires_grad and parameter.is_leaf:
                earlier, parameter.grad = parameter.grad, None
                if parameter.dtype is torch.float16:
                    parameter.grad_dtype = torch.float32
                    earlier = None if earlier is None else earlier.float()
                self.parameters[name], self._earlier[name] = parameter, earlier

    def finish(self, factor: float) -> None:
        """Multiply the gradients of this call, and add the earlier ones."""
        # Without float16 the factor is 1, and no step pays for a pass over gradients.
        if factor != 1 and (grads := _grads(self.parameters.values())):
            multiply_each(grads, factor)
        pairs = []
        for name, parameter in self.parameters.items():
            earlier = self._earlier[name]
            if parameter.grad is None:
                parameter.grad = earlier
            elif earlier is not None:
                pairs.append((parameter.grad, earlier))
        if pairs:
            add_each(*map(list, zip(*pairs, strict=True)))

    def fit(self, largest: float) -> None:
        """Hold the gradients of float16 parameters in float16 again, if they fit.

        Optimizers but this library's expect a gradient of the parameter's precision.

        Args:
            largest: The largest gradient in absolute value.
        """
        for parameter in self.parameters.values():
            half, gradient = parameter.dtype is torch.float16, parameter.grad
            if half and gradient is not None and largest <= _LARGEST:
                parameter.grad, parameter.grad_dtype = None, None
                parameter.grad = gradient.half()

    def drop(self) -> None:
        """Leave the earlier gradients, and nothing of this call."""
        for name, parameter in self.parameters.items():
            parameter.grad = self._earlier[name]


def largest_square(parameters: Iterable[Tensor]) -> Tensor:
    """The square of the largest gradient in absolute value, a scalar.

    It is not finite if a gradient is not. Nor is it where the square of a gradient,
    which Adam averages, would be infinite.
    """
    grads = [grad for grad in _grads(parameters) if grad.numel()]
    return _square(get_total_norm(grads, math.inf)) if grads else torch.zeros(())


def infinite_gradients(parameters: Mapping[str, Tensor]) -> str:
    """What is wrong with the gradients, or nothing; one reading if nothing is."""
    if bool(largest_square(parameters.values()).isfinite()):
        return ""
    names = _not_finite({name: p.grad for name, p in parameters.items()})
    return f"the loss is finite, but not the squared gradients of {names}"


def refusal(
    wrong: str, step: int, note: str, parameters: Mapping[str, Tensor]
) -> ValueError:
    """The error for a loss that cannot be stepped on.

    Args:
        wrong: What is not finite.
        step: The step of that loss.
        note: What the error leaves as it was.
        parameters: The parameters by name, some of which may be lost already.
    """
    way_out = (
        "Look at this batch, lower the learning rate, or take net.bfloat16() in place "
        "of float16, whose largest number is 65504; under a torch optimizer, "
        "(loss(**batch) / num_data).backward()"
    )
    if lost := _not_finite(parameters):
        way_out = (
            f"These were not finite before it: {lost}; go on from the last checkpoint: "
            f"lrvd_pyro.resume(...)"
        )
    return ValueError(f"{wrong} at step {step}. {note}{way_out}")


def weakly(
    parameters: Mapping[str, Tensor], *programs: object
) -> Callable[[], dict[str, Tensor]]:
    """A function that gives the trained parameters again, as long as they live.

    Args:
        parameters: The parameters that a run has read through Pyro, by name.
        programs: Model and guide. In Pyro's local mode their parameters are not read
            through Pyro.
    """
    refs = {name: weakref.ref(parameter) for name, parameter in parameters.items()}
    local = pyro.settings.get("module_local_params")
    modules = [weakref.ref(p) for p in programs if local and isinstance(p, nn.Module)]

    def trained() -> dict[str, Tensor]:
        alive = {name: parameter() for name, parameter in refs.items()}
        for ref in modules:
            if (module := ref()) is not None:
                alive |= dict(module.named_parameters())
        return {n: p for n, p in alive.items() if p is not None and p.is_leaf}

    return trained


def _not_finite(tensors: Mapping[str, Tensor | None]) -> str:
    """The first names of the tensors with an element whose square is not finite."""
    names = [
        name
        for name, tensor in sorted(tensors.items())
        if tensor is not None and not bool(_square(tensor.detach()).isfinite().all())
    ]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _square(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.dtype.itemsize == 2 else tensor).square()


def _grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
