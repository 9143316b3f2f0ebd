"""The gradient of each example about the weights A and B, row by row.

Autograd sums the gradients of weights over a batch. Here what goes into a layer and
what comes out of it is kept, and the layer alone is differentiated per example.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrvd_pyro.rank_space.drawn import output_of
from lrvd_pyro.rank_space.rows import Side
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["WeightTaps"]

_Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class WeightTaps:
    """What went into and came out of each ``lora_A`` and ``lora_B`` within a block.

    Args:
        space: The rank space.
        sides: The weights to differentiate about.
    """

    def __init__(self, space: RankSpace, sides: Sequence[Side]) -> None:
        self.space, self.sides = space, tuple(sides)
        self._calls: list[tuple[int, Tensor, Tensor]] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep what passes through the layers within the block, and forget the rest."""
        self._calls = []
        hooks = [
            layer.register_forward_hook(self._tap(number))
            for number, layer in enumerate(self._layers())
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def gradients(
        self, score: Tensor, examples: int, others: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], Iterator[Tensor]]:
        """The gradients of a sum over the batch, one for each example.

        Args:
            score: A sum over examples, each of which sees its own rows alone.
            examples: The number of examples B.
            others: Tensors to differentiate about in the same backward pass.

        Returns:
            The gradients about ``others``; and, one after another, those about the
            weights, ``B x r x width``: the modules of the first side, then those of
            the second. Rows are laid out as `RankSpace.flatten` has them. They are 0
            for a layer that did not run, or whose output moves nothing.
        """
        outputs = [y for _, _, y in self._calls]
        found = torch.autograd.grad(
            score, [*others, *outputs], retain_graph=True, allow_unused=True
        )
        about, behind = found[: len(others)], found[len(others) :]
        zeros = zip(others, about)
        first = [torch.zeros_like(x) if g is None else g for x, g in zeros]
        return first, self._by_layer(behind, examples)

    def _by_layer(
        self, behind: Sequence[Tensor | None], examples: int
    ) -> Iterator[Tensor]:
        rows = [each for side in self.sides for each in self.space.rows(side)]
        for number, layer in enumerate(self._layers()):
            calls = zip(self._calls, behind)
            mine = [(x, g) for (n, x, _), g in calls if n == number and g is not None]
            # An expert may get no token of this batch.
            weight: Tensor = layer.weight  # type: ignore[assignment]
            total = weight.new_zeros(examples, *weight.shape)
            for x, g in mine:
                total = total + _per_example(layer, x, g, examples)
            flat = torch.vmap(rows[number].flatten)(total)
            yield flat.unflatten(1, (rows[number].rank, -1))

    def _layers(self) -> list[nn.Module]:
        adapter = self.space.adapter
        return [
            getattr(layer, side)[adapter]
            for side in self.sides
            for layer in self.space.layers
        ]

    def _tap(self, number: int) -> _Hook:
        def tap(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # nothing that can be differentiated
                return output
            # The first layer's A may be frozen, and so may its input.
            if not output.requires_grad:
                output.requires_grad_()
            self._calls.append((number, args[0].detach(), output))
            return output

        return tap


def _per_example(layer: nn.Module, x: Tensor, g: Tensor, examples: int) -> Tensor:
    """The gradient about a layer's weight of each example, ``B x`` its shape."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    with torch.enable_grad():
        copies = weight.detach().expand(examples, *weight.shape).requires_grad_()
        (gradient,) = torch.autograd.grad(output_of(layer, x, copies), copies, g)
    return gradient
