"""How a draw enters the forward pass of a PEFT LoRA layer.

A layer computes ``W0 x + scaling * lora_B(lora_A(x))``. A pre-hook on ``lora_B``
multiplies the rank activations by a gate; forward hooks on ``lora_A`` and
``lora_B`` replace their output by that of a drawn weight. The hooks only read a
`Bank`; they are plain objects, so that the network can be pickled and copied.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer, dora
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import noop_context_fn

Kind = Literal["gate", "lora_A", "lora_B"]
Parts = dict[Kind, Sequence[Tensor]]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

REENTRANT = (
    "reentrant activation checkpointing would recompute the network without its draw; "
    "call net.gradient_checkpointing_enable("
    'gradient_checkpointing_kwargs={"use_reentrant": False})'
)
RECOMPUTED = (
    "an activation checkpoint recomputes a LoRA layer after its draw was released; use "
    "the network's own gradient_checkpointing_enable(), or give "
    "torch.utils.checkpoint.checkpoint context_fn=space.checkpoint_context"
)


class Bank:
    """What is bound at present: for each kind of draw, one tensor per LoRA module."""

    def __init__(self) -> None:
        self.parts: Parts | None = None
        self.drawn = False  # whether the last forward pass used a draw
        self.replaying = False  # whether a checkpoint of ours recomputes

    @contextmanager
    def holding(self, parts: Parts) -> Iterator[None]:
        """Bind ``parts`` for the duration of the block."""
        before, self.parts = self.parts, parts
        try:
            yield
        finally:
            self.parts = before

    def read(self, kind: Kind, index: int) -> Tensor | None:
        """The tensor that module ``index`` is to use now; None if nothing is bound.

        Raises:
            RuntimeError: In a backward pass that recomputes a forward pass whose draw
                no `checkpoint_context` has kept.
        """
        if not torch.compiler.is_compiling() and in_backward() and not self.replaying:
            if self.drawn:
                raise RuntimeError(RECOMPUTED)
            return None
        self.drawn = self.parts is not None
        return self.parts[kind][index] if self.parts and kind in self.parts else None

    def checkpoint_context(
        self, inner: Callable[[], Contexts] = noop_context_fn
    ) -> Contexts:
        """A checkpoint's ``context_fn``: the recomputation sees the draw bound now."""
        forward, recompute = inner()
        return forward, Replay(self, self.parts, recompute)


class Replay:
    """Binds what a checkpointed forward pass used while that pass is recomputed.

    It can be entered again: a retained graph is recomputed by every backward pass.
    """

    def __init__(
        self, bank: Bank, parts: Parts | None, inner: AbstractContextManager[Any]
    ) -> None:
        self.bank, self.parts, self.inner = bank, parts, inner

    def __enter__(self) -> None:
        self.inner.__enter__()
        self.before = self.bank.parts, self.bank.replaying
        self.bank.parts, self.bank.replaying = self.parts, True

    def __exit__(self, *error: Any) -> bool | None:
        self.bank.parts, self.bank.replaying = self.before
        return self.inner.__exit__(*error)


def in_backward() -> bool:
    """Whether the autograd engine is running in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


class GateHook:
    """Pre-hook on ``lora_B``: rank activations ``h`` (``..., r``) become ``h * z``.

    Where ``lora_B`` has a centre c they become ``c + z (h - c)``.
    """

    def __init__(self, bank: Bank, index: int) -> None:
        self.bank, self.index, self.fired = bank, index, False

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        self.fired = True
        gate = self.bank.read("gate", self.index)
        if gate is None:
            return None
        h = args[0]
        gate = gate.to(h)
        centre = module._buffers.get("centre")
        trailing = len(getattr(module, "kernel_size", ()))
        middle = h.dim() - 2 - trailing
        if gate.dim() == 2:
            gate = repeat_rows(gate, h.shape[0])
            gate = gate.view(len(gate), *[1] * middle, gate.shape[1], *[1] * trailing)
        else:
            gate = gate.view(-1, *[1] * trailing)
        if centre is None:
            return (h * gate, *args[1:])
        centre = centre.to(h).view(-1, *[1] * trailing)
        return (torch.lerp(centre, h, gate), *args[1:])


class WeightHook:
    """Forward hook on a linear ``lora_A`` or ``lora_B``: ``x`` times a drawn weight.

    The weight is ``out x in``, or ``B x out x in`` with one weight per example.
    """

    def __init__(self, bank: Bank, kind: Kind, index: int) -> None:
        self.bank, self.kind, self.index = bank, kind, index

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        weight = self.bank.read(self.kind, self.index)
        if weight is None:
            return None
        x = args[0]
        weight, bias = weight.to(x), module.bias
        if weight.dim() == 2:
            return F.linear(x, weight, bias)  # type: ignore[arg-type]
        check_rows(len(weight), x.shape[0])
        rows = x.reshape(len(weight), -1, x.shape[-1]) @ weight.transpose(1, 2)
        rows = rows.reshape(output.shape)
        return rows if bias is None else rows + bias  # type: ignore[operator]


def own_hooks(
    modules: Iterable[nn.Module], bank: Bank
) -> list[tuple[dict[int, Any], int, Any]]:
    """The hooks of ``bank`` on these modules: where they stand, under which key."""
    return [
        (hooks, key, hook)
        for module in dict.fromkeys(modules)
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in hooks.items()
        if getattr(hook, "bank", None) is bank
    ]


def check_rows(examples: int, rows: int) -> None:
    """Raise unless ``rows`` of the network are ``k`` consecutive rows per example."""
    if rows % examples:
        raise ValueError(
            f"the batch has {examples} examples, but a LoRA layer sees {rows} rows, "
            f"which is no multiple; draw once for the whole batch instead: "
            f'RankELBO(noise="batch")'
        )


def repeat_rows(gate: Tensor, rows: int) -> Tensor:
    """``B x r`` gates for ``rows = k B`` rows: each gate serves ``k`` rows in turn."""
    check_rows(len(gate), rows)
    copies = rows // len(gate)
    return gate if copies == 1 else gate.repeat_interleave(copies, 0)


@contextmanager
def carried_by_checkpoints(blocks: Sequence[Any], bank: Bank) -> Iterator[None]:
    """Let Transformers' gradient checkpointing carry what ``bank`` holds.

    Raises:
        RuntimeError: If a block does not checkpoint with ``use_reentrant=False``.
    """
    live = [
        (block, block._gradient_checkpointing_func)
        for block in blocks
        if block.gradient_checkpointing
        and block.training
        and hasattr(block, "_gradient_checkpointing_func")
    ]
    for block, function in live:
        options = getattr(function, "keywords", {})
        if options.get("use_reentrant") is not False:
            raise RuntimeError(REENTRANT)
        inner = options.get("context_fn", noop_context_fn)
        context_fn = partial(bank.checkpoint_context, inner)
        block._gradient_checkpointing_func = partial(function, context_fn=context_fn)
    try:
        yield
    finally:
        for block, function in live:
            block._gradient_checkpointing_func = function


def obstacle(layer: LoraLayer, adapter: str, gate: GateHook) -> tuple[str, str] | None:
    """Why no draw can enter a layer at present, and what to do; None if one can."""
    if adapter not in layer.lora_B:
        return "was deleted", "build the model on another adapter"
    if gate not in layer.lora_B[adapter]._forward_pre_hooks.values():
        return "was replaced, or its RankSpace closed,", "build the model anew"
    if adapter in layer.lora_variant and dora.ENABLE_DORA_CACHING:
        return "has a cached weight norm", "leave peft.helpers.DoraCaching()"
    if layer.merged:
        return "is merged", "call net.unmerge_adapter()"
    if layer.disable_adapters:
        return "is disabled", "leave net.disable_adapter(), or call net(**batch) itself"
    if adapter not in layer.active_adapters:
        return "is not active", f"call net.set_adapter({adapter!r})"
    return None
