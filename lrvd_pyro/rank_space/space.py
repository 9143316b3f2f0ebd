"""The rank components of a PEFT LoRA model as one vector space.

A LoRA module of rank ``r`` adds ``scaling * B diag(z) A x``; plain LoRA is ``z = 1``.
`RankSpace` numbers the rank components of all modules of one adapter. It binds a vector
of gates, or drawn weights A and B, into the forward pass. It does not know inference.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lrvd_pyro.rank_space.bank import Contexts, Parts
from lrvd_pyro.rank_space.binding import Binding
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
from lrvd_pyro.rank_space.rows import Rows, Side, split_rows

__all__ = ["RankSpace"]


class RankSpace:
    """The rank components of one LoRA adapter, ``R = sum of ranks`` in all.

    Example::

        space = RankSpace(net)
        with space.bind(torch.ones(space.size)):   # (R,), or (B, R) one per example
            net(**batch)

    Args:
        net: A PEFT model, or a Transformers one after ``net.add_adapter``, with LoRA.
        adapter: The adapter's name; None takes the single active one.
        sides: The weights that `bind_weights` will draw; gates need none.

    Attributes:
        modules: Dotted names of the LoRA modules, as in the network without PEFT.
        ranks: The rank of each module, in the same order.
        size: The sum of the ranks.
        origin: The number of each rank component before any `select`.
        constants: LoRA modules by name that have no rank left, only a bias.
        lineage: The names of the spaces that this is a copy of, its own name last.

    Raises:
        TypeError: If ``net`` has no LoRA layers, or adapters of PEFT upon others; if a
            layer kind cannot be gated; or if ``sides`` are given while gates act about
            a center.
        ValueError: If the adapter is unknown, ambiguous, has no LoRA layer, or is not
            the only active one; or if two of its modules share weights.
        RuntimeError: If ``net`` or a part of it is compiled already.
    """

    def __init__(
        self,
        net: nn.Module,
        adapter: str | None = None,
        *,
        sides: tuple[Side, ...] = (),
    ) -> None:
        self.net: Any = net
        self.adapter = pick_adapter(net, adapter)
        every = find_layers(net, self.adapter, weights=bool(sides))
        layers = {n: m for n, m in every.items() if not is_constant(m, self.adapter)}
        self.constants = {n: m for n, m in every.items() if n not in layers}
        if sides:
            refuse_centers(layers.values(), self.adapter)
        self.modules = tuple(layers)
        self.layers: tuple[LoraLayer, ...] = tuple(layers.values())
        self.ranks = tuple(layer.r[self.adapter] for layer in self.layers)
        self.size = sum(self.ranks)
        self._groups = Groups(self.modules, self.ranks)
        self.origin = tuple(range(self.size))
        self.sides = sides
        self.lineage: tuple[str, ...] = (uuid4().hex,)
        self.binding = Binding(net, self.adapter, layers, sides)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copying and unpickling end here; texts survive both.
        self.__dict__.update(state, lineage=(*state["lineage"], uuid4().hex))

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector over the rank components, ``... x R``, as ``... x r`` by module."""
        parts = torch.split(vector, list(self.ranks), -1)
        return dict(zip(self.modules, parts, strict=True))

    @property
    def coordinates(self) -> Coordinates:
        """The module, module type, layer and rank index of each rank component.

        The layer is the first number in the module's name, or -1. The type is the part
        of the name after it: ``encoder.layer.3.attention.self.query`` has the type
        ``attention.self.query`` in layer 3.
        """
        return self._groups.coordinates()

    def group(self, level: Level) -> Tensor:
        """The group number of each rank component at a level, ``R``.

        Modules, layers and types are numbered in the order of `coordinates`. The tensor
        is cached: do not write into it.
        """
        return self._groups.at(level, self.device)[0]

    def count(self, level: Level) -> int:
        """The number of groups at a level."""
        return self._groups.at(level, self.device)[1]

    @property
    def dora(self) -> tuple[str, ...]:
        """The names of the DoRA modules, which take one draw for a whole batch."""
        pairs = zip(self.modules, self.layers)
        return tuple(name for name, m in pairs if self.adapter in m.lora_variant)

    @property
    def device(self) -> torch.device:
        """The device of the first LoRA module, for a prior's constants."""
        lora_A: Any = self.layers[0].lora_A[self.adapter]
        device: torch.device = lora_A.weight.device
        return device

    def ones(self, size: int | None = None) -> Tensor:
        """Ones on the adapter's device, ``R`` or ``size``, for a prior's constants."""
        return torch.ones(self.size if size is None else size, device=self.device)

    def weights(self, side: Side) -> list[nn.Parameter]:
        """The weight ``lora_A``, ``r x in ...``, or ``lora_B``, ``out x r ...``."""
        return [getattr(layer, side)[self.adapter].weight for layer in self.layers]

    def rows(self, side: Side) -> list[Rows]:
        """How each module's weight falls into one row per rank component."""
        pairs = zip(self.weights(side), self.ranks)
        return [Rows(side, w.shape, rank) for w, rank in pairs]

    def widths(self, side: Side) -> Tensor:
        """The length of each component's row of A or column of B, ``R``."""
        widths = [rows.width for rows in self.rows(side)]
        return torch.tensor(widths).repeat_interleave(torch.tensor(self.ranks))

    def flatten(self, *sides: Side) -> Tensor:
        """The weights of these sides, one row of A or column of B after another."""
        pairs = [(s, w, r) for s in sides for w, r in zip(self.weights(s), self.ranks)]
        return torch.cat([Rows(s, w.shape, r).flatten(w) for s, w, r in pairs])

    def unflatten(self, value: Tensor) -> Parts:
        """The weights of ``sides`` by module, from a value as `bind_weights` takes it.

        Raises:
            ValueError: If the shape does not fit.
        """
        return split_rows(value, {side: self.rows(side) for side in self.sides})

    @contextmanager
    def bind(self, gate: Tensor) -> Iterator[None]:
        """Multiply the rank activations by ``gate`` within the block.

        Activations with a center (see `gauge.center`) are pulled towards it instead.

        Args:
            gate: ``R``, shared by the batch, or ``B x R``, one row per example. If a
                layer sees ``k B`` rows, each ``k`` consecutive rows share an example.

        Raises:
            ValueError: If the shape fits neither.
            RuntimeError: If the adapter is merged, disabled, inactive or deleted; also
                after the first block, if its forward passes left a LoRA module out.
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
            value: The weights of ``sides`` in the order of `flatten`: ``K``, shared by
                the batch, or ``B x K``, one row per example.

        Raises:
            ValueError: If the shape does not fit, or a layer's rows are not ``k B``.
            RuntimeError: As `bind` raises it.
        """
        parts = self.unflatten(value)
        self._require_one_draw_for_dora(value)
        with self.binding.holding(parts):
            yield

    def checkpoint_context(self) -> Contexts:
        """The ``context_fn`` to give your own ``torch.utils.checkpoint`` calls."""
        return self.binding.bank.checkpoint_context()

    def cuts(self, keep: Tensor) -> Cuts:
        """The tensors that `select` would slice; checks everything, changes nothing."""
        check_mask(keep, self.size)
        self.require_live()
        cuts: Cuts = {}
        for layer, (name, kept) in zip(self.layers, self.split(keep).items()):
            cuts |= layer_cuts(name, layer, self.adapter, kept)
        return cuts

    def select(self, keep: Tensor) -> None:
        """Remove rank components from the network, in place.

        Parameters and modules stay the same objects, and scalings stay. A module with
        no rank left leaves this space; unless it has a bias, it also leaves the
        adapter. The other components are renumbered. A removed component counts as 0,
        or as its center. Wrong when a guide, prior or optimizer is in use: call
        `lrvd_pyro.selection.select`, which cuts these too.

        Args:
            keep: The components that stay, ``R``, bool.

        Raises:
            ValueError: If ``keep`` is not such a mask or keeps nothing, or if a DoRA
                layer would be left without rank.
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
        """This space as a prior would see it after `select`; not for `bind`."""
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
        """Remove every hook; weights, centers and biases stay."""
        self.binding.close()

    def check_fired(self, again: Callable[[], object] | None = None) -> None:
        """Raise a RuntimeError if forward passes so far left some LoRA module out."""
        self.binding.check_fired(again)

    def require_live(self) -> None:
        """Raise a RuntimeError unless a draw can enter the forward pass."""
        self.binding.require_live()

    def indices_kept(self, keep: Tensor, name: str, size: int) -> Tensor:
        """The indices of a site's components that stay when ``keep`` stays.

        A site ``<level>_...`` has one per module, layer or type: those with a rank left
        stay, in the later order of `group`. A single component always stays.

        Args:
            keep: The rank components that stay, ``R``, bool.
            name: The site's name.
            size: The number of the site's components: 1, R or a level's `count`.

        Raises:
            TypeError: If the size is none of these.
        """
        return self._groups.indices_kept(keep.to(self.device), name, size)

    def _require_one_draw_for_dora(self, draw: Tensor) -> None:
        # DoRA's weight norm sends the identity through A and B; its rows would be
        # taken for examples, without an error where their number happens to fit
        if draw.dim() == 2 and self.dora:
            raise ValueError(
                f"the DoRA layer {self.dora[0]!r} takes one draw for the whole batch, "
                f'not one per example; use RankELBO(noise="batch")'
            )
