"""The rank components of a PEFT LoRA model as one vector space.

A LoRA module of rank ``r`` adds ``scaling * B diag(z) A x``; plain LoRA is ``z = 1``.
`RankSpace` numbers the rank components of all modules of one adapter and binds a
vector of gates, or drawn weights A and B, into the forward pass. It knows PEFT, and
no inference.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lrvd_pyro.rank_space.bank import Contexts, Parts
from lrvd_pyro.rank_space.binding import Binding, Side
from lrvd_pyro.rank_space.constant import is_constant, leave_center, refuse_centers
from lrvd_pyro.rank_space.coordinates import Coordinates, Groups, Level
from lrvd_pyro.rank_space.find import find_layers, pick_adapter
from lrvd_pyro.rank_space.removal import (
    Cuts,
    check_mask,
    layer_cuts,
    resize_layer,
    slice_tensors,
)


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
            are to be drawn where gates act about a center.
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
            refuse_centers(layers.values(), self.adapter)
        self.modules = tuple(layers)
        self.layers: tuple[LoraLayer, ...] = tuple(layers.values())
        self.ranks = tuple(layer.r[self.adapter] for layer in self.layers)
        self.size = sum(self.ranks)
        self._groups = Groups(self.modules, self.ranks)
        self.origin = tuple(range(self.size))
        self.sides = sides
        self.binding = Binding(net, self.adapter, layers, sides)

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

    def unflatten(self, value: Tensor) -> Parts:
        """The weights of ``sides`` by module, from a vector laid out as by `flatten`.

        Raises:
            ValueError: If the length does not fit.
        """
        sizes = {side: [w.numel() for w in self.weights(side)] for side in self.sides}
        lengths = [sum(each) for each in sizes.values()]
        if value.dim() not in (1, 2) or value.shape[-1] != sum(lengths):
            raise ValueError(
                f"the drawn weights have shape {tuple(value.shape)}; expected "
                f"({sum(lengths)},) or (batch, {sum(lengths)}) for {self.sides}"
            )
        parts: Parts = {}
        for side, flat in zip(self.sides, torch.split(value, lengths, -1), strict=True):
            pieces = torch.split(flat, sizes[side], -1)
            rows = [v.view(*v.shape[:-1], r, -1) for v, r in zip(pieces, self.ranks)]
            parts[side] = rows if side == "lora_A" else [v.mT for v in rows]
        return parts

    @contextmanager
    def bind(self, gate: Tensor) -> Iterator[None]:
        """Multiply the rank activations by ``gate`` within the block.

        Where they have a center, see `gauge.center`, they are pulled towards it.

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
        with self.binding.holding({"gate": torch.split(gate, list(self.ranks), -1)}):
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
        parts = self.unflatten(value)
        self._require_one_draw_for_dora(value)
        with self.binding.holding(parts):
            yield

    def checkpoint_context(self) -> Contexts:
        """The ``context_fn`` for one's own ``torch.utils.checkpoint`` calls."""
        return self.binding.bank.checkpoint_context()

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
        are numbered anew. What is removed counts as 0, or as its center.
        Guide, prior and optimizer know nothing of it: `lrvd_pyro.selection.select` does
        it for all of them.

        Raises:
            ValueError: If ``keep`` is no such mask or keeps nothing, or a DoRA layer
                would be left without rank.
            TypeError: If a layer is a grouped convolution.
            RuntimeError: If the adapter is merged, disabled, inactive or deleted.
        """
        cuts = self.cuts(keep)
        for layer, kept in zip(self.layers, self.split(keep).values()):
            leave_center(layer, self.adapter, kept)
        slice_tensors(cuts)
        ranks = [int(kept.sum()) for kept in self.split(keep).values()]
        gone = {name for name, rank in zip(self.modules, ranks) if not rank}
        self.binding.drop(gone)
        for name, layer, rank in zip(self.modules, self.layers, ranks):
            resize_layer(layer, self.adapter, rank)
            if not rank and self.adapter in layer.r:
                self.constants[name] = layer
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
        """Remove every hook; weights, and what `gauge.center` added, stay."""
        self.binding.close()

    def check_fired(self) -> None:
        """Raise if a LoRA module took no part in the passes so far."""
        self.binding.check_fired()

    def require_live(self) -> None:
        """Raise a RuntimeError unless a draw can enter the forward pass."""
        self.binding.require_live()

    def indices_kept(self, keep: Tensor, name: str, size: int) -> Tensor:
        """Which components of a vector stay when the rank components ``keep`` (R,) do.

        One component per module, layer or type under a name ``<level>_...``: those with
        a rank left, in the order in which `group` will number them. R components: as
        ``keep``. One component: it stays.

        Raises:
            TypeError: If the vector is none of these.
        """
        return self._groups.indices_kept(keep.to(self.device), name, size)

    def _require_one_draw_for_dora(self, draw: Tensor) -> None:
        """DoRA sends the identity through A and B too: its rows are no examples."""
        if draw.dim() == 2 and self.dora:
            raise ValueError(
                f"the DoRA layer {self.dora[0]!r} takes one draw for the whole batch, "
                f'not one per example; use RankELBO(noise="batch")'
            )
