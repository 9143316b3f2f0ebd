"""What a layer would compute with another weight: one for the batch, or one an example.

``torch.func.functional_call`` takes one weight per batch only.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

__all__ = ["output_of", "row_count", "spread"]


def output_of(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The output of a linear layer or a convolution for ``x``, by a drawn weight.

    Args:
        module: The layer; its bias and its other settings are used.
        x: The layer's input. Each ``k`` consecutive rows share an example.
        weight: As the layer's own, or ``B x ...``, one weight per example.

    Raises:
        ValueError: If the rows are not ``k B``.
    """
    space = module.weight.dim() - 2
    if weight.dim() > module.weight.dim():
        bias = module.bias
        y = _by_example(module, x, weight)
        return y if bias is None else y + bias.view(-1, *[1] * space)
    if not space:
        return F.linear(x, weight, module.bias)
    return _convolve(module, x, weight, module.bias, module.groups)


def row_count(x: Tensor, trailing: int) -> int:
    """The rows of a layer's input: its first axis; 1 for an example without a batch.

    Args:
        x: The input, ``rows x ... x channels``, and an image's axes behind them.
        trailing: The number of the image's axes; 0 for a linear layer.
    """
    return len(x) if x.dim() > 1 + trailing else 1


def spread(values: Tensor, x: Tensor, trailing: int) -> Tensor:
    """Values of each example, shaped to multiply a layer's input.

    Args:
        values: ``B x channels``.
        x: The input, as `row_count` takes it. Each ``k`` rows share an example.
        trailing: The number of the image's axes.

    Raises:
        ValueError: If the rows are not ``k B``.
    """
    rows = row_count(x, trailing)
    _check_rows(len(values), rows)
    copies = rows // len(values)
    values = values if copies == 1 else values.repeat_interleave(copies, 0)
    middle = x.dim() - 2 - trailing
    if middle < 0:
        return values.view(-1, *[1] * trailing)
    return values.view(rows, *[1] * middle, -1, *[1] * trailing)


def _check_rows(examples: int, rows: int) -> None:
    """Raise a ValueError unless ``rows`` is ``k`` times the number of examples."""
    if rows % examples:
        raise ValueError(
            f"the batch has {examples} examples, but a LoRA layer sees {rows} rows, "
            f"which is not a multiple; one draw for the whole batch fits any rows: in "
            f'training RankELBO(noise="batch")'
        )


def _by_example(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The output without the bias, by a weight ``B x out x in x ...``."""
    examples, space = len(weight), weight.dim() - 3
    y: Tensor
    _check_rows(examples, row_count(x, space))
    if not space:
        y = x.reshape(examples, -1, x.shape[-1]) @ weight.mT
        return y.reshape(*x.shape[:-1], weight.shape[1])
    # an image without a batch axis is one row
    rows = x.reshape(-1, *x.shape[-1 - space :])
    rows = rows.unflatten(0, (examples, -1))
    if _is_pointwise(module):
        # a third of the time of a convolution in groups
        y = weight.flatten(2)[:, None] @ rows.flatten(3)
        y = y.unflatten(3, x.shape[-space:])
    else:
        # One convolution in groups: the examples side by side as channels, the rows of
        # an example below each other.
        channels = rows.transpose(0, 1).flatten(1, 2)
        groups = examples * module.groups
        y = _convolve(module, channels, weight.flatten(0, 1), None, groups)
        y = y.unflatten(1, (examples, -1)).transpose(0, 1)
    return y.reshape(*x.shape[: -1 - space], *y.shape[2:])


def _convolve(
    module: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> Tensor:
    convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    settings = module.stride, module.padding, module.dilation, groups
    y: Tensor = convolution(x, weight, bias, *settings)
    return y


def _is_pointwise(module: Any) -> bool:
    """Whether a convolution is one matrix, applied at every point."""
    steps = {*module.kernel_size, *module.stride, module.groups}
    none = "same", "valid", (0,) * len(module.kernel_size)
    return steps == {1} and module.padding in none
