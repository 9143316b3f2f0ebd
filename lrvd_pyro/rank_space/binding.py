"""The hooks on the LoRA layers of an adapter, and whether a draw reaches them."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lrvd_pyro._compat.transformers import checkpointing_blocks
from lrvd_pyro.rank_space.bank import Bank, Parts
from lrvd_pyro.rank_space.checkpointing import carried_by_checkpointing
from lrvd_pyro.rank_space.find import plain_net
from lrvd_pyro.rank_space.hooks import GateHook, WeightHook, obstacle, own_hooks
from lrvd_pyro.rank_space.rows import Side
from lrvd_pyro.rank_space.undisturbed import undisturbed

__all__ = ["Binding"]

_PASSES = 32  # at a layerdrop of .5, one of 1e9 layers is dropped in all of them


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
        net: nn.Module,
        adapter: str,
        layers: Mapping[str, LoraLayer],
        sides: tuple[Side, ...],
    ) -> None:
        self.net, self.adapter, self.layers = net, adapter, dict(layers)
        self.bank = Bank()
        self.passes = 0  # forward passes judged while some module had not run
        self._with_gradient = 0  # of these
        self._fired = False
        self._skipped: set[str] = set()  # modules of parts that the first pass left out
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
        judged = self.passes
        with (
            self.bank.holding(parts),
            carried_by_checkpointing(self._blocks, self.bank),
        ):
            yield
        # A block without a forward pass shows nothing about the layers that it reaches.
        if judged == self.passes and any(gate.fired for gate in self._gates):
            self.check_fired()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the network in eval mode within the block; its mode is restored.

        Other threads wait until the block ends, or their passes are refused.
        """
        with self.bank.owning(), _in_eval_mode(self.net):
            yield

    @property
    def in_float16(self) -> bool:
        """Whether some LoRA module ran in float16 when it last ran."""
        return any(gate.float16 for gate in self._gates)

    def unreached(self) -> list[str]:
        """The LoRA modules that no forward pass has run so far."""
        return [n for n, gate in zip(self.layers, self._gates) if not gate.fired]

    def check_fired(self, again: Callable[[], object] | None = None) -> None:
        """Judge the forward passes so far; the model calls this after each.

        Training may drop layers. In any mode, a router may send nothing to a module
        beside others of its kind, and a batch may have nothing for a whole part, as
        text for a vision tower. Such modules are given several passes, and parts that
        do not run are told of. A step may take more than one pass. Passes without
        gradients are none of them: a trained network may predict for text alone.

        Right under the network's root no part is around a module, so that it is judged
        at once; so is a pass outside of a model, within `RankSpace.bind`.

        Args:
            again: Repeats the last pass. If the first one left a module out, its
                repetition in eval mode shows whether it was dropped, and whether the
                part around the module ran.

        Raises:
            RuntimeError: If some LoRA module has not run, and should have by now.
        """
        if self._fired:
            return
        training = any(module.training for module in self.net.modules())
        if again and self.passes == 0 and self.unreached():
            self._look_again(again)
            training = False
        self.passes += 1
        self._with_gradient += torch.is_grad_enabled()
        silent = self.unreached()
        seen = {_kind(name) for name in self.layers if name not in silent}
        waited_for = {n for n in silent if _kind(n) in seen} | self._skipped
        alone = set(silent) - waited_for
        overdue = silent and self._with_gradient >= _PASSES
        if overdue or alone and not training:
            raise RuntimeError(
                f"in {self.passes} forward passes the network never reached the LoRA "
                f"modules {silent}, so draws of their rank components have no effect. "
                f"If fused LoRA kernels compute them (Unsloth, or axolotl's "
                f"lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel), turn the kernels "
                f"off. If training drops layers (layerdrop) or a router sends them no "
                f"token, set layerdrop to 0, or leave rarely used experts out. "
                f"Otherwise leave them out of target_modules (LoraConfig's "
                f"exclude_modules)"
            )
        self._fired = not silent

    def _look_again(self, again: Callable[[], object]) -> None:
        """Repeat a pass in eval mode; note the modules of parts that do not run."""
        around = {name: _around(self.net, self.layers[name]) for name in self.layers}
        ran = {plain_net(self.net)}  # PEFT calls its forward, past all hooks
        hooks = [
            module.register_forward_pre_hook(lambda module, _: ran.add(module))
            for module in {*around.values()} - ran
        ]
        try:
            # A run that is killed and resumed judges once more, from the same state.
            with undisturbed(self.net), _in_eval_mode(self.net), torch.no_grad():
                again()
        finally:
            for hook in hooks:
                hook.remove()
        skipped = [n for n in self.unreached() if around[n] not in ran]
        if skipped:
            names = ", ".join(skipped[:4])
            warnings.warn(
                f"the first batch did not run the parts around {len(skipped)} LoRA "
                f"modules: {names}. Their draws have no effect until a batch does; if "
                f"fused kernels or methods of one's own compute them, never",
                stacklevel=4,
            )
        self._skipped = set(skipped)

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


def _kind(name: str) -> str:
    """A module's name without its numbers, which layers and experts differ in."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _around(net: nn.Module, layer: object) -> nn.Module:
    """The part that a layer belongs to, past lists and dicts of modules."""
    parents = {child: m for m in net.modules() for child in m.children()}
    parent = parents[layer]  # type: ignore[index]
    while isinstance(parent, nn.ModuleList | nn.ModuleDict):  # which nobody calls
        parent = parents[parent]
    return parent


@contextmanager
def _in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Run a network in eval mode within the block; its mode is restored."""
    # Module by module: users keep parts of a training network in eval mode.
    was_training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
