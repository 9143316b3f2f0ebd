"""Whether the rows that LoRA layers see belong to the examples, in order.

A draw per example gives each ``k`` consecutive rows of a layer's input to one example.
That is wrong in layers with the sequence on the first axis, for two texts of an example
stacked as ``cat([chosen, rejected])``, and for rows that all examples share.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lrvd_pyro._compat.torch import is_compiled
from lrvd_pyro.rank_space.drawn import row_count, spread
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["mixed_rows"]

_LEAK = 1e-6  # of a layer's largest gradient


def mixed_rows(
    space: RankSpace, predict: Callable[[], Tensor], examples: int
) -> tuple[str, set[str]]:
    """Where one example's draw would reach another's predictions; empty if nowhere.

    Each layer's output is given a derivative in B numbers, one per example, along the
    rows that a draw would take. The derivative does not pass through A and B, so that
    ``B = 0`` hides nothing, and the output stays what it was. The predictions of half
    of the examples must not depend on the numbers of the other half. For each pair of
    examples, some halving tells the two apart: ``2 log2 B`` backward passes in all.

    The random state and the buffers of the network are restored.

    Args:
        space: The rank components.
        predict: Runs the network; returns its predictions, ``B x ...``.
        examples: The number of examples, B; two or more.

    Returns:
        The reason, which names the first such layer. And the LoRA modules about which
        this batch says something: those that ran, if the predictions are finite.
    """
    shape = len(space.modules), examples
    shifts = torch.zeros(shape, device=space.device, requires_grad=True)
    with torch.enable_grad(), _undisturbed(space), _probed(space, shifts) as probes:
        outputs = predict()
        reason = _misfit(probes, outputs, examples)
        if reason or not outputs.isfinite().all():
            return reason, set()
        mixing = _leaks(outputs, shifts)
    if mixing.any():
        name = space.modules[int(mixing.nonzero()[0])]
        reason = (
            f"in the LoRA layer {name!r} the draw of one example moves the predictions "
            f"for another: its rows are not those of the examples in order, or "
            f"examples see each other, as in batch normalization while training"
        )
    return reason, {name for name, probe in probes.items() if probe.ran}


def _misfit(probes: dict[str, "_Probe"], outputs: Tensor, examples: int) -> str:
    """Why numbers of rows alone show that they are not those of the examples."""
    for name, probe in probes.items():
        if probe.misfit is not None:
            rows = f"{probe.misfit} rows for {examples} examples"
            return f"the LoRA layer {name!r} sees {rows}"
    if len(outputs) != examples:
        return (
            f"the network returns {len(outputs)} rows of predictions for {examples} "
            f"examples"
        )
    return ""


def _leaks(outputs: Tensor, shifts: Tensor) -> Tensor:
    """The layers in which some example's shift moves another's outputs, bool."""
    leaks = torch.zeros(len(shifts), dtype=torch.bool, device=shifts.device)
    if not outputs.requires_grad:
        return leaks
    # A sum over the outputs of an example would be blind to what a last layer centers.
    scores = (outputs * _waves(outputs)).flatten(1).sum(1)
    numbers = torch.arange(len(scores), device=scores.device)
    for bit in range((len(scores) - 1).bit_length()):
        for half in (0, 1):
            inside = (numbers >> bit) % 2 == half
            (gradient,) = torch.autograd.grad(
                scores[inside].sum(), shifts, retain_graph=True, allow_unused=True
            )
            if gradient is not None:
                # A row that is all padding may give NaN where the loss ignores it.
                size = gradient.nan_to_num().abs()
                others = (size * ~inside.to(size.device)).amax(1)
                leaks |= others > _LEAK * size.amax(1)
    return leaks


class _Probe:
    """Forward hook on one ``lora_B``: adds 0, with a derivative in each example's rows.

    Args:
        shifts: Zeros, one for each example.
        trailing: The axes behind the channels, those of a convolution's image.

    Attributes:
        misfit: A number of rows that is no multiple of the examples; None without one.
        ran: Whether the layer ran, with gradients.
    """

    def __init__(self, shifts: Tensor, trailing: int) -> None:
        self.shifts, self.trailing = shifts, trailing
        self.misfit: int | None = None
        self.ran = False

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        self.ran |= torch.is_grad_enabled()
        rows = row_count(output, self.trailing)
        if rows % len(self.shifts):
            self.misfit = rows
            return None
        shifts = self.shifts[:, None].to(output)
        return output + spread(shifts, output, self.trailing) * _waves(output)


def _waves(tensor: Tensor) -> Tensor:
    """Numbers of a tensor's shape, in general position: no layer sends them to 0."""
    # A constant would vanish in a layer norm, and one vector per example in a softmax.
    return torch.arange(tensor.numel(), device=tensor.device).cos().view_as(tensor)


@contextmanager
def _probed(space: RankSpace, shifts: Tensor) -> Iterator[dict[str, _Probe]]:
    """Put a probe on every layer within the block."""
    probes: dict[str, _Probe] = {}
    with ExitStack() as hooks:
        for name, layer, each in zip(space.modules, space.layers, shifts):
            lora_B: nn.Module = layer.lora_B[space.adapter]
            probes[name] = _Probe(each, len(getattr(lora_B, "kernel_size", ())))
            hooks.callback(lora_B.register_forward_hook(probes[name]).remove)
        # Compiled code would ignore the probes, or keep them.
        if is_compiled(space.net):
            hooks.enter_context(torch.compiler.set_stance("force_eager"))
        yield probes


@contextmanager
def _undisturbed(space: RankSpace) -> Iterator[None]:
    """Restore the random state, and buffers such as running means, after the block."""
    on_gpu = space.device.type == "cuda"
    buffers = [(buffer, buffer.clone()) for buffer in space.net.buffers()]
    try:
        with torch.random.fork_rng([space.device] if on_gpu else []):
            yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
