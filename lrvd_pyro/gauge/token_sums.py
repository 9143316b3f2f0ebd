"""Sums over tokens of what passes through a module's rank components.

`tapped` hands over rank activations and their gradients in a backward pass, and `Sums`
adds them up. `gramians` does so in a pass of its own, `BalanceSchedule` in training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrvd_pyro.models.base import RankModel

__all__ = ["OVERFLOW", "Sums", "tapped"]

OVERFLOW = (
    "nothing was changed. Is a row all padding, or the network in float16? Run it in "
    "float32 or bfloat16"
)
_Receiver = Callable[[int, Tensor, Tensor], None]  # of a module's number, h and g


class Sums:
    """Running sums of ``h h^T``, ``g g^T`` and h over tokens whose gradient is not 0.

    Args:
        ranks: The rank of each module.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.activations = [torch.zeros(r, r, dtype=torch.float64) for r in ranks]
        self.gradients = [torch.zeros_like(gram) for gram in self.activations]
        self.totals = [gram.new_zeros(len(gram)) for gram in self.activations]
        self.tokens = [0.0] * len(ranks)

    def add(self, index: int, h: Tensor, g: Tensor) -> None:
        """Add the tokens of one module.

        Args:
            index: The number of the module.
            h: Rank activations, ``... x r``.
            g: Their gradients, ``... x r``.

        Raises:
            ValueError: If one of them is not finite.
        """
        h, g = (x.detach().flatten(0, -2).double() for x in (h, g))
        # Masks differ from model to model. Padding is told by its gradient: exactly 0,
        # since no label depends on it.
        live = (g != 0).any(-1, keepdim=True)
        h = h * live
        gram_h, gram_g = h.T @ h, g.T @ g
        if not (gram_h.isfinite().all() and gram_g.isfinite().all()):
            raise ValueError(
                f"rank activations or their gradients are not finite in LoRA module "
                f"number {index}; {OVERFLOW}"
            )
        self.activations[index] += gram_h.cpu()
        self.totals[index] += h.sum(0).cpu()
        self.gradients[index] += gram_g.cpu()
        self.tokens[index] += float(live.sum())

    def mean_activations(self) -> list[Tensor]:
        """The mean of ``h h^T`` over the tokens counted."""
        return self._averages(self.activations)

    def means(self) -> list[Tensor]:
        """The mean of h over the tokens counted."""
        return self._averages(self.totals)

    def _averages(self, sums: list[Tensor]) -> list[Tensor]:
        pairs = zip(sums, self.tokens, strict=True)
        return [each / max(tokens, 1) for each, tokens in pairs]


@contextmanager
def tapped(model: RankModel, receive: _Receiver) -> Iterator[None]:
    """Within the block, hand over each module's rank activations and their gradients.

    ``receive(index, h, g)`` is called in the backward pass, with h before the gate and
    g behind it, as ``... x r``.
    """
    handles = []
    for index, layer in enumerate(model.space.layers):
        lora_B: nn.Module = layer.lora_B[model.space.adapter]
        tap = _Tap(index, len(getattr(lora_B, "kernel_size", ())), receive)
        # The gate is a pre-hook too: one tap runs before it, one behind it.
        handles.append(lora_B.register_forward_pre_hook(tap.before, prepend=True))
        handles.append(lora_B.register_forward_pre_hook(tap.behind))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Tap:
    """Forward pre-hooks on one ``lora_B``, before its gate and behind it.

    Args:
        index: The number of the module.
        trailing: The axes behind the rank components, those of a convolution's image.
        receive: What to call with ``index``, h and g.
    """

    def __init__(self, index: int, trailing: int, receive: _Receiver) -> None:
        self.index, self.trailing, self.receive = index, trailing, receive

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.h = args[0].detach()

    def behind(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Bound here: a layer that runs twice has another h by the backward pass.
        h = self.h
        if args[0].requires_grad:
            args[0].register_hook(
                lambda g: self.receive(self.index, *map(self.last, (h, g)))
            )

    def last(self, x: Tensor) -> Tensor:
        """Rank components moved to the last axis, where linear layers have them."""
        return x.movedim(-1 - self.trailing, -1)
