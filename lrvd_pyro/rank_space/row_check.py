"""Whether the rows that LoRA layers see belong to the examples, in order.

A draw per example gives each ``k`` consecutive rows of a layer's input to one example.
That is wrong in layers with the sequence on the first axis, for two texts of an example
stacked as ``cat([chosen, rejected])``, and for rows that all examples share.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lrvd_pyro.rank_space.drawn import row_count
from lrvd_pyro.rank_space.space import RankSpace
from lrvd_pyro.rank_space.undisturbed import undisturbed

__all__ = ["mixed_rows"]

_LEAK = 1e-6  # of a layer's largest gradient


def mixed_rows(
    space: RankSpace,
    predict: Callable[[], Tensor],
    examples: int,
    *,
    neighbors: bool = False,
) -> tuple[str, set[str]]:
    """Where one example's draw would reach another's predictions; empty if nowhere.

    The predictions of half of the examples must have no gradient in the rows of the
    other half, at the output of each LoRA layer. A and B stand before it, so that
    ``B = 0`` hides nothing. For each pair of examples, some halving tells the two
    apart: ``2 log2 B`` backward passes in all, of activations alone.

    The random state and the buffers of the network are restored.

    Args:
        space: The rank components.
        predict: Runs the network; returns its predictions, ``B x ...``.
        examples: The number of examples, B; two or more.
        neighbors: Tell apart every other example alone, by two backward passes: enough
            where rows could only have moved by one.

    Returns:
        The reason, which names the first such layer. And the LoRA modules about which
        this batch says something: those that move finite predictions.
    """
    grads = torch.enable_grad()
    with undisturbed(space.net), grads, _probed(space, examples) as probes:
        outputs = predict()
        if reason := _misfit(probes, outputs, examples):
            return reason, set()
        bits = 1 if neighbors else (examples - 1).bit_length()
        mixing = _leaks(outputs, probes, bits)
    if mixing:
        reason = (
            f"in the LoRA layer {mixing[0]!r} the draw of one example moves the "
            f"predictions for another: its rows are not those of the examples in "
            f"order, or examples see each other, as in batch normalization while "
            f"training"
        )
    return reason, {name for name, probe in probes.items() if probe.moved}


class _Probe:
    """Forward hook on one ``lora_B``: sees the gradient in the rows of each example.

    Args:
        examples: The number of examples, B.
        trailing: The axes behind the channels, those of a convolution's image.
        device: The device of the results.

    Attributes:
        shift: A zero that is added to the output: gradients are taken in it.
        sizes: The largest gradient in each example's rows, ``B``, of a backward pass.
        misfit: A number of rows that the examples do not divide; None without one.
        moved: Whether some prediction had a gradient in the layer.
    """

    def __init__(self, examples: int, trailing: int, device: torch.device) -> None:
        self.trailing = trailing
        self.shift = torch.zeros((), device=device, requires_grad=True)
        self.sizes = torch.zeros(examples, device=device)
        self.misfit: int | None = None
        self.moved = False

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        rows = row_count(output, self.trailing)
        if rows % len(self.sizes):
            self.misfit = rows
            return None
        output = output + self.shift.to(output)
        if output.requires_grad:
            output.register_hook(self._look)
        return output

    def _look(self, gradient: Tensor) -> None:
        # Rows that are all padding may have NaN where the loss ignores them.
        by_example = gradient.reshape(len(self.sizes), -1).nan_to_num()
        sizes = by_example.abs().amax(1).to(self.sizes)
        self.sizes = torch.maximum(self.sizes, sizes)


def _misfit(probes: dict[str, _Probe], outputs: Tensor, examples: int) -> str:
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


def _leaks(outputs: Tensor, probes: dict[str, _Probe], bits: int) -> list[str]:
    """The layers in which rows of an example move outputs of one with other bits."""
    if not outputs.requires_grad:
        return []
    shifts = [probe.shift for probe in probes.values()]
    leaks = torch.zeros(len(shifts), dtype=torch.bool, device=shifts[0].device)
    moved = torch.zeros_like(leaks)
    numbers = torch.arange(len(outputs), device=outputs.device)
    # Weights in general position: a layer norm at the end would hide a plain sum.
    weights = torch.arange(outputs[0].numel(), device=outputs.device).cos()
    weights = weights.to(outputs)
    # Absent choices have logits of -inf, through which no gradient is defined.
    finite = outputs.detach().isfinite()
    for bit in range(bits):
        for half in (0, 1):
            inside = (numbers >> bit) % 2 == half
            seed = (inside[:, None] * weights).view_as(outputs) * finite
            for probe in probes.values():
                probe.sizes = torch.zeros_like(probe.sizes)
            torch.autograd.grad(
                outputs, shifts, seed, retain_graph=True, allow_unused=True
            )
            sizes = torch.stack([probe.sizes for probe in probes.values()])
            others = sizes * ~inside.to(sizes.device)
            leaks |= others.amax(1) > _LEAK * sizes.amax(1)
            moved |= sizes.amax(1) > 0
    for probe, has in zip(probes.values(), moved.tolist()):
        probe.moved = has
    return [name for name, leak in zip(probes, leaks.tolist()) if leak]


@contextmanager
def _probed(space: RankSpace, examples: int) -> Iterator[dict[str, _Probe]]:
    """Put a probe on every layer within the block."""
    probes: dict[str, _Probe] = {}
    with ExitStack() as hooks:
        for name, layer in zip(space.modules, space.layers, strict=True):
            lora_B: nn.Module = layer.lora_B[space.adapter]
            trailing = len(getattr(lora_B, "kernel_size", ()))
            probes[name] = _Probe(examples, trailing, space.device)
            hooks.callback(lora_B.register_forward_hook(probes[name]).remove)
        yield probes
