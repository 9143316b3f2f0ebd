"""What a network computes before its first live LoRA layer, kept and handed out again.

It is the same for every draw. Module by module it is kept from one pass and returned in
later ones, which may hold the batch several times over.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lrvd_pyro._compat.torch import tree_leaves, tree_map
from lrvd_pyro.rank_space.space import RankSpace

Call = Callable[..., Any]


class Prefix:
    """What a network computes before its first LoRA layer with a rank.

    The modules are the outermost ones without such a layer: embeddings, whole blocks.
    """

    def __init__(self, space: RankSpace) -> None:
        layers: Any = space.layers
        self.live: tuple[nn.Module, ...] = layers
        outermost = _outermost(space.net, set(self.live))
        self.modules = tuple(dict.fromkeys(outermost))
        self.calls: dict[nn.Module, list[Recorded]] = {}
        self._open = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the modules return in one pass, up to the first live layer."""
        self.calls, self._open = {}, True
        hooks = [layer.register_forward_pre_hook(self._close) for layer in self.live]
        try:
            with _patched(self.modules, self._record):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Let the modules return in one pass what was kept, for as many copies."""
        left = {module: iter(calls) for module, calls in self.calls.items()}
        with _patched(left, partial(_replay, left)):
            yield

    def _close(self, *_: Any) -> None:
        self._open = False

    def _record(self, module: nn.Module, forward: Call, *args: Any, **kw: Any) -> Any:
        if not self._open:
            return forward(*args, **kw)
        self._open = False  # a module within this one will not be called again
        output = forward(*args, **kw)
        self._open = True
        kept = Recorded(_leading((args, kw)), tree_map(_copy, output))
        self.calls.setdefault(module, []).append(kept)
        return output


@dataclass(frozen=True)
class Recorded:
    """A module's output, and the leading sizes of the tensors that it was given."""

    sizes: list[int]
    output: Any

    def repeated(self, sizes: list[int]) -> Any:
        """The output for inputs of these leading sizes, copy after copy."""
        times = {old: new // old for old, new in zip(self.sizes, sizes) if new != old}

        def repeat(leaf: Any) -> Any:
            if (
                not isinstance(leaf, Tensor)
                or leaf.dim() == 0
                or len(leaf) not in times
            ):
                return _copy(leaf)
            return leaf.repeat(times[len(leaf)], *[1] * (leaf.dim() - 1))

        return tree_map(repeat, self.output)


def _replay(
    left: dict[nn.Module, Iterator[Recorded]],
    module: nn.Module,
    forward: Call,
    *args: Any,
    **kwargs: Any,
) -> Any:
    kept = next(left[module], None)
    if kept is None:
        return forward(*args, **kwargs)
    return kept.repeated(_leading((args, kwargs)))


def _outermost(module: nn.Module, live: set[nn.Module]) -> Iterator[nn.Module]:
    """The outermost modules that can be called and hold no live LoRA layer."""
    for child in module.children():
        if child in live:
            continue
        never_called = type(child).forward is nn.Module.forward
        if never_called or not live.isdisjoint(child.modules()):
            yield from _outermost(child, live)
        else:
            yield child


@contextmanager
def _patched(modules: Any, call: Call) -> Iterator[None]:
    """Let ``call(module, forward, ...)`` stand for each module's forward."""
    own = {module: module.__dict__.get("forward") for module in modules}
    for module in own:
        module.__dict__["forward"] = partial(call, module, module.forward)
    try:
        yield
    finally:
        for module, forward in own.items():
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _leading(tree: Any) -> list[int]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [len(tensor) for tensor in tensors if tensor.dim() > 0]


def _copy(leaf: Any) -> Any:
    """A tensor that whoever gets it may write to."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
