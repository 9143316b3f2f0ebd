"""What a network computes before its first live LoRA layer: recorded, then replayed.

A LoRA layer is live while it has a rank. The outputs of the modules before it are the
same under every draw. They are recorded in one pass and returned in later passes, which
may hold the batch several times over.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from lrvd_pyro._compat.torch import tree_leaves, tree_map
from lrvd_pyro.models.inputs import copied
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["Prefix"]

_Forward = Callable[..., Any]


class Prefix:
    """The modules of a network that run before its first LoRA layer with a rank.

    They are the outermost modules without such a layer: embeddings, whole blocks.

    Args:
        space: The rank space of the network's adapter.
    """

    def __init__(self, space: RankSpace) -> None:
        layers: Any = space.layers
        self.live: tuple[nn.Module, ...] = layers
        outermost = _outermost(space.net, set(self.live))
        # A module may stand at several places in the network.
        self.modules = tuple(dict.fromkeys(outermost))
        self.calls: dict[nn.Module, list[_RecordedCall]] = {}
        self._open = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the modules return in one pass, up to the first live layer."""
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
        """Return the recorded outputs in one pass, once per copy of the batch."""
        left = {module: iter(calls) for module, calls in self.calls.items()}
        with _patched(left, partial(_replay, left)):
            yield

    def _close(self, *_: object) -> None:
        # From the first live layer on, outputs depend on the draw.
        self._open = False

    def _record(
        self, module: nn.Module, forward: _Forward, *args: object, **kwargs: object
    ) -> object:
        if not self._open:
            return forward(*args, **kwargs)
        # A replay calls no module inside this one. A call of one must not be recorded
        # here, or its calls elsewhere in the network would get that output.
        self._open = False
        output = forward(*args, **kwargs)
        self._open = True
        call = _RecordedCall(_lengths((args, kwargs)), tree_map(_copy, output))
        self.calls.setdefault(module, []).append(call)
        return output


@dataclass(frozen=True)
class _RecordedCall:
    """One call of a module.

    Attributes:
        lengths: The length of the first axis of each tensor that it was given.
        output: What it returned.
    """

    lengths: list[int]
    output: object

    def repeated(self, lengths: list[int]) -> object:
        """The output for inputs of these lengths, copy after copy."""
        # Only an axis whose length has grown runs over rows. Constants keep theirs.
        pairs = zip(self.lengths, lengths)
        times = {old: new // old for old, new in pairs if new != old}

        def repeat(leaf: object) -> object:
            if (
                not isinstance(leaf, Tensor)
                or leaf.dim() == 0
                or len(leaf) not in times
            ):
                return _copy(leaf)
            return leaf.repeat(times[len(leaf)], *[1] * (leaf.dim() - 1))

        return tree_map(repeat, self.output)


def _replay(
    left: dict[nn.Module, Iterator[_RecordedCall]],
    module: nn.Module,
    forward: _Forward,
    *args: object,
    **kwargs: object,
) -> object:
    call = next(left[module], None)
    if call is None:
        return forward(*args, **kwargs)
    return call.repeated(_lengths((args, kwargs)))


def _outermost(module: nn.Module, live: set[nn.Module]) -> Iterator[nn.Module]:
    """The outermost modules that can be called and hold no live LoRA layer."""
    for child in module.children():
        if child in live:
            continue
        # Containers such as ModuleList have no forward of their own: their children
        # are called in their place.
        never_called = type(child).forward is nn.Module.forward
        if never_called or not live.isdisjoint(child.modules()):
            yield from _outermost(child, live)
        else:
            yield child


@contextmanager
def _patched(modules: Iterable[nn.Module], call: _Forward) -> Iterator[None]:
    """Let ``call(module, forward, ...)`` replace each module's forward in the block.

    Other threads keep the module's own forward.

    An instance may have a ``forward`` of its own, as accelerate sets it: it comes back.
    """
    own_forwards = {module: module.__dict__.get("forward") for module in modules}
    for module in own_forwards:
        plain = module.forward
        here = partial(call, module, plain)
        module.__dict__["forward"] = partial(_by_thread, get_ident(), here, plain)
    try:
        yield
    finally:
        for module, own_forward in own_forwards.items():
            del module.__dict__["forward"]
            if own_forward is not None:
                module.__dict__["forward"] = own_forward


def _by_thread(
    thread: int, here: _Forward, elsewhere: _Forward, *args: object, **kwargs: object
) -> object:
    forward = here if get_ident() == thread else elsewhere
    return forward(*args, **kwargs)


def _lengths(tree: object) -> list[int]:
    """The length of the first axis of each tensor in nested containers."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [len(tensor) for tensor in tensors if tensor.dim() > 0]


def _copy(leaf: object) -> object:
    """A copy of an output, which the network may change."""
    return copied({"output": leaf})["output"]
