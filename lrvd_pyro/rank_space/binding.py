"""The hooks on the LoRA layers of an adapter, and whether a draw reaches them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from lrvd_pyro._compat.transformers import checkpointing_blocks
from lrvd_pyro.rank_space.bank import Bank, Parts
from lrvd_pyro.rank_space.checkpointing import carried_by_checkpointing
from lrvd_pyro.rank_space.hooks import GateHook, WeightHook, obstacle, own_hooks

__all__ = ["Binding", "Side"]

Side = Literal["lora_A", "lora_B"]


class Binding:
    """Puts hooks on every LoRA layer of an adapter; the hooks read one `Bank`.

    Args:
        net: The PEFT model.
        adapter: The adapter's name.
        layers: The LoRA layers by name, in the order of their rank components.
        sides: The weights that may be drawn; gates need none.
    """

    def __init__(
        self,
        net: PeftModel,
        adapter: str,
        layers: Mapping[str, LoraLayer],
        sides: tuple[Side, ...],
    ) -> None:
        self.net, self.adapter, self.layers = net, adapter, dict(layers)
        self.bank = Bank()
        self._fired = False
        self._blocks = checkpointing_blocks(net)
        self._gates = [GateHook(self.bank, i) for i in range(len(layers))]
        self._hooked: list[nn.Module] = []
        for layer, gate in zip(layers.values(), self._gates, strict=True):
            lora_B = layer.lora_B[adapter]
            lora_B.register_forward_pre_hook(gate)
            self._hooked.append(lora_B)
        for side in sides:
            for index, layer in enumerate(layers.values()):
                module = getattr(layer, side)[adapter]
                module.register_forward_hook(WeightHook(self.bank, side, index))
                self._hooked.append(module)

    @contextmanager
    def holding(self, parts: Parts) -> Iterator[None]:
        """Let the forward passes within the block read ``parts``.

        Raises:
            RuntimeError: If `require_live` or `check_fired` raises it.
        """
        self.require_live()
        # an outer block may have bound another kind of draw, which stays in force
        parts = {**(self.bank.parts or {}), **parts}
        with (
            self.bank.holding(parts),
            carried_by_checkpointing(self._blocks, self.bank),
        ):
            yield
        # A block without a forward pass shows nothing about the layers that it reaches.
        if any(gate.fired for gate in self._gates):
            self.check_fired()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the network in eval mode within the block; its mode is restored.

        Other threads wait until the block ends, or their passes are refused.
        """
        with self.bank.owning():
            # Module by module: users keep parts of a training network in eval mode.
            was_training = [m for m in self.net.modules() if m.training]
            self.net.eval()
            try:
                yield
            finally:
                for module in was_training:
                    module.training = True

    def check_fired(self) -> None:
        """Raise a RuntimeError if forward passes so far left some LoRA module out."""
        if self._fired:
            return
        silent = [n for n, gate in zip(self.layers, self._gates) if not gate.fired]
        if silent:
            raise RuntimeError(
                f"the forward pass never reached the LoRA modules {silent}, so draws "
                f"of their rank components have no effect; leave them out of "
                f"target_modules (LoraConfig's exclude_modules)"
            )
        self._fired = True

    def require_live(self) -> None:
        """Raise a RuntimeError unless a draw can enter the forward pass."""
        first: nn.Module = next(iter(self.layers.values()))  # type: ignore[assignment]
        if first not in self.net.modules():
            raise RuntimeError(
                f"adapter {self.adapter!r} was unloaded from the network, so no draw "
                f"can enter the forward pass; make the model again"
            )
        for (name, layer), gate in zip(self.layers.items(), self._gates, strict=True):
            if reason := obstacle(layer, self.adapter, gate):
                raise RuntimeError(
                    f"adapter {self.adapter!r} {reason[0]} in {name!r}, so no draw "
                    f"can enter the forward pass; {reason[1]}"
                )

    def drop(self, names: set[str]) -> None:
        """Take the hooks off these layers; the others keep their order."""
        kept = [i for i, name in enumerate(self.layers) if name not in names]
        numbers = {old: new for new, old in enumerate(kept)}
        for hooks, key, hook in own_hooks(self._hooked, self.bank):
            if hook.index in numbers:
                hook.index = numbers[hook.index]
            else:
                del hooks[key]
        self._gates = [self._gates[i] for i in kept]
        self.layers = {n: m for n, m in self.layers.items() if n not in names}

    @contextmanager
    def closed_on_failure(self) -> Iterator[None]:
        """Take every hook off if the block fails: a refusal leaves no trace."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take every hook off."""
        for hooks, key, _ in own_hooks(self._hooked, self.bank):
            del hooks[key]
