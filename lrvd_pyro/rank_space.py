"""The rank components of a PEFT LoRA model as one vector space.

A LoRA module of rank ``r`` adds ``scaling * B diag(z) A x``; plain LoRA is ``z = 1``.
`RankSpace` numbers the rank components of all modules of one adapter and binds a
vector of gates, or drawn weights A and B, into the forward pass. It knows PEFT, and
no inference.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lrvd_pyro.centres import is_constant, leave_centres, refuse_centres
from lrvd_pyro.groups import Coordinates, Groups, Level
from lrvd_pyro.hooks import (
    Bank,
    Contexts,
    GateHook,
    Parts,
    WeightHook,
    carried_by_checkpoints,
    obstacle,
    own_hooks,
)
from lrvd_pyro.lora_layers import find_layers, pick_adapter
from lrvd_pyro.surgery import Cuts, check_mask, layer_cuts, resize_layer, slice_tensors

Side = Literal["lora_A", "lora_B"]


class RankSpace:
    """The rank components of one LoRA adapter, ``R = sum of ranks`` in all.

    Example::

        space = RankSpace(net)
        with space.bind(torch.ones(space.size)):   # (R,), or (B, R) one per example
            net(**batch)

    Args:
        net: A PEFT model with a LoRA adapter.
        adapter: The adapter's name; None takes the single active one.
        sides: Which weights `bind_weights` will draw; gates need none.

    Attributes:
        modules: Dotted names of the LoRA modules, as in the network without PEFT.
        ranks: Their ranks, in the same order.
        size: The sum of the ranks.
        origin: For each rank component its number before any `select`.
        constants: LoRA modules without rank, of which a bias is left, by name.

    Raises:
        TypeError: If ``net`` is no PEFT model, a layer kind cannot be gated, or weights
            are to be drawn where gates act about a centre.
        ValueError: If the adapter is unknown, ambiguous or has no LoRA layer.
        RuntimeError: If ``net`` or a part of it was compiled before.
    """

    def __init__(
        self,
        net: PeftModel,
        adapter: str | None = None,
        *,
        sides: tuple[Side, ...] = (),
    ) -> None:
        self.net = net
        self.adapter = pick_adapter(net, adapter)
        found = find_layers(net, self.adapter, linear=bool(sides))
        layers = {n: m for n, m in found.items() if not is_constant(m, self.adapter)}
        self.constants = {n: m for n, m in found.items() if n not in layers}
        if sides:
            refuse_centres(layers.values(), self.adapter)
        self.modules = tuple(layers)
        self.layers: tuple[LoraLayer, ...] = tuple(layers.values())
        self.ranks = tuple(layer.r[self.adapter] for layer in self.layers)
        self.size = sum(self.ranks)
        self._groups = Groups(self.modules, self.ranks)
        self.origin = tuple(range(self.size))
        self.sides = sides
        self.bank = Bank()
        self._fired = False
        self._blocks = [
            m for m in net.modules() if hasattr(m, "gradient_checkpointing")
        ]
        self._gates = [GateHook(self.bank, i) for i in range(len(self.layers))]
        self._hooked = [layer.lora_B[self.adapter] for layer in self.layers]
        for lora_B, gate in zip(self._hooked, self._gates, strict=True):
            lora_B.register_forward_pre_hook(gate)
        for side in sides:
            modules = [getattr(layer, side)[self.adapter] for layer in self.layers]
            self._hooked += modules
            for index, module in enumerate(modules):
                module.register_forward_hook(WeightHook(self.bank, side, index))

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector over the rank components, ``... x R``, as ``... x r`` per module."""
        parts = torch.split(vector, list(self.ranks), -1)
        return dict(zip(self.modules, parts, strict=True))

    @property
    def coordinates(self) -> Coordinates:
        """For each rank component its module, module type, layer and rank index.

        The layer is the first number in the module's name (-1 if it has none); the
        type is what follows it: ``encoder.layer.3.attention.self.query`` is of type
        ``attention.self.query`` in layer 3.
        """
        return self._groups.coordinates()

    def group(self, level: Level) -> Tensor:
        """For each rank component the number of its group at a level, (R,).

        Modules, layers and types are numbered as they first occur in `coordinates`.
        The tensor is kept for the next call: do not write into it.
        """
        return self._groups.at(level, self.device)[0]

    def count(self, level: Level) -> int:
        """How many groups there are at a level."""
        return self._groups.at(level, self.device)[1]

    @property
    def dora(self) -> tuple[str, ...]:
        """The modules that are DoRA layers, which take one draw for a whole batch."""
        pairs = zip(self.modules, self.layers)
        return tuple(name for name, m in pairs if self.adapter in m.lora_variant)

    @property
    def device(self) -> torch.device:
        """Where the first LoRA module lies; make a prior's constants there."""
        lora_A: Any = self.layers[0].lora_A[self.adapter]
        device: torch.device = lora_A.weight.device
        return device

    def ones(self, size: int | None = None) -> Tensor:
        """Ones on that device, (R,) or (size,): what a prior makes its constants of."""
        return torch.ones(self.size if size is None else size, device=self.device)

    def weights(self, side: Side) -> list[nn.Parameter]:
        """``lora_A`` (``r x in``) or ``lora_B`` (``out x r``) of each module."""
        return [getattr(layer, side)[self.adapter].weight for layer in self.layers]

    def widths(self, side: Side) -> Tensor:
        """For each rank component the length of its row of A or column of B, (R,)."""
        axis = 1 if side == "lora_A" else 0
        widths = [w.shape[axis] for w in self.weights(side)]
        return torch.tensor(widths).repeat_interleave(torch.tensor(self.ranks))

    def flatten(self, *sides: Side) -> Tensor:
        """The weights as one vector: rows of A, or columns of B, one after another."""
        pairs = [(side, w) for side in sides for w in self.weights(side)]
        rows = [w if side == "lora_A" else w.T for side, w in pairs]
        return torch.cat([row.reshape(-1) for row in rows])

    @contextmanager
    def bind(self, gate: Tensor) -> Iterator[None]:
        """Multiply the rank activations by ``gate`` within the block.

        Where they have a centre, see `gauge.centre`, they are pulled towards it.

        Args:
            gate: ``R``, shared by the batch, or ``B x R``, one row per example. If a
                layer sees ``k B`` rows, consecutive ``k`` rows share an example.

        Raises:
            ValueError: If the shape fits neither.
            RuntimeError: If the adapter is merged, disabled, inactive or deleted; and
                after the first pass, if a LoRA module took no part in it.
        """
        if gate.dim() not in (1, 2) or gate.shape[-1] != self.size:
            raise ValueError(
                f"gate has shape {tuple(gate.shape)}; expected ({self.size},) or "
                f"(batch, {self.size}), one entry per rank component of the adapter"
            )
        self._require_one_draw_for_dora(gate)
        with self._holding({"gate": torch.split(gate, list(self.ranks), -1)}):
            yield

    @contextmanager
    def bind_weights(self, value: Tensor) -> Iterator[None]:
        """Use drawn LoRA weights within the block.

        Args:
            value: ``K``, shared by the batch, or ``B x K``: the weights of the sides
                that the space was made with, laid out as by `flatten`.

        Raises:
            ValueError: If the length does not fit, or a layer's rows fit no ``B``.
        """
        sizes = {side: [w.numel() for w in self.weights(side)] for side in self.sides}
        lengths = [sum(each) for each in sizes.values()]
        if value.dim() not in (1, 2) or value.shape[-1] != sum(lengths):
            raise ValueError(
                f"the drawn weights have shape {tuple(value.shape)}; expected "
                f"({sum(lengths)},) or (batch, {sum(lengths)}) for {self.sides}"
            )
        self._require_one_draw_for_dora(value)
        parts: Parts = {}
        for side, flat in zip(self.sides, torch.split(value, lengths, -1), strict=True):
            pieces = torch.split(flat, sizes[side], -1)
            rows = [v.view(*v.shape[:-1], r, -1) for v, r in zip(pieces, self.ranks)]
            parts[side] = rows if side == "lora_A" else [v.mT for v in rows]
        with self._holding(parts):
            yield

    def checkpoint_context(self) -> Contexts:
        """The ``context_fn`` for one's own ``torch.utils.checkpoint`` calls."""
        return self.bank.checkpoint_context()

    def cuts(self, keep: Tensor) -> Cuts:
        """What `select` would slice, all checked and nothing done."""
        check_mask(keep, self.size)
        self.require_live()
        cuts: Cuts = {}
        for layer, (name, kept) in zip(self.layers, self.split(keep).items()):
            cuts |= layer_cuts(name, layer, self.adapter, kept)
        return cuts

    def select(self, keep: Tensor) -> None:
        """Remove the rank components where ``keep`` (R,) is False, in place.

        Modules, parameters and scalings stay what they are. A LoRA module without rank
        leaves this space, and the network's adapter unless it has a bias. The others
        are numbered anew. What is removed counts as 0, or as its centre.
        Guide, prior and optimiser know nothing of it: `lrvd_pyro.pruning.select` does
        it for all of them.

        Raises:
            ValueError: If ``keep`` is no such mask or keeps nothing, or a DoRA layer
                would be left without rank.
            TypeError: If a layer is a grouped convolution.
            RuntimeError: If the adapter is merged, disabled, inactive or deleted.
        """
        cuts = self.cuts(keep)
        leave_centres(self, keep)
        slice_tensors(cuts)
        ranks = [int(kept.sum()) for kept in self.split(keep).values()]
        numbers = {i: new for new, i in enumerate(i for i, r in enumerate(ranks) if r)}
        for hooks, key, hook in own_hooks(self._hooked, self.bank):
            if hook.index in numbers:
                hook.index = numbers[hook.index]
            else:
                del hooks[key]
        for name, layer, rank in zip(self.modules, self.layers, ranks):
            resize_layer(layer, self.adapter, rank)
            if not rank and self.adapter in layer.r:
                self.constants[name] = layer
        self._gates = [self._gates[i] for i in numbers]
        self._hooked = [
            m for m in self._hooked if m._forward_pre_hooks | m._forward_hooks
        ]
        self._renumber(keep)

    def after(self, keep: Tensor) -> "RankSpace":
        """What a prior would see of this space after `select`; not for `bind`."""
        space = copy.copy(self)
        space._renumber(keep)
        return space

    def _renumber(self, keep: Tensor) -> None:
        ranks = [int(kept.sum()) for kept in self.split(keep).values()]
        self.layers = tuple(m for m, r in zip(self.layers, ranks) if r)
        self.modules = tuple(name for name, r in zip(self.modules, ranks) if r)
        self.ranks = tuple(r for r in ranks if r)
        self.size = sum(ranks)
        self._groups = Groups(self.modules, self.ranks)
        self.origin = tuple(i for i, kept in zip(self.origin, keep.tolist()) if kept)

    def close(self) -> None:
        """Remove every hook; weights, and what `gauge.centre` added, stay."""
        for hooks, key, _ in own_hooks(self._hooked, self.bank):
            del hooks[key]

    def check_fired(self) -> None:
        """Raise if a LoRA module took no part in the passes so far."""
        if self._fired:
            return
        silent = [n for n, gate in zip(self.modules, self._gates) if not gate.fired]
        if silent:
            raise RuntimeError(
                f"the forward pass never reached the LoRA modules {silent}, so their "
                f"rank components would be drawn in vain; leave them out of "
                f"target_modules (LoraConfig's exclude_modules)"
            )
        self._fired = True

    @contextmanager
    def _holding(self, parts: Parts) -> Iterator[None]:
        self.require_live()
        parts = {**(self.bank.parts or {}), **parts}
        with self.bank.holding(parts), carried_by_checkpoints(self._blocks, self.bank):
            yield
        if any(gate.fired for gate in self._gates):
            self.check_fired()

    def _require_one_draw_for_dora(self, draw: Tensor) -> None:
        """DoRA sends the identity through A and B too: its rows are no examples."""
        if draw.dim() == 2 and self.dora:
            raise ValueError(
                f"the DoRA layer {self.dora[0]!r} takes one draw for the whole batch, "
                f'not one per example; use RankELBO(noise="batch")'
            )

    def require_live(self) -> None:
        """Raise a RuntimeError unless a draw can enter the forward pass."""
        modules: Iterator[Any] = self.net.modules()
        if self.layers[0] not in modules:
            raise RuntimeError(
                f"adapter {self.adapter!r} was unloaded from the network, so that no "
                f"draw can enter the forward pass; build the model anew"
            )
        for name, layer, gate in zip(self.modules, self.layers, self._gates):
            if found := obstacle(layer, self.adapter, gate):
                raise RuntimeError(
                    f"adapter {self.adapter!r} {found[0]} in {name!r}, so that no draw "
                    f"can enter the forward pass; {found[1]}"
                )
