"""A look at a network's passes that leaves the network as it was."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lrvd_pyro._compat.torch import is_compiled

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Restore the random state, and buffers such as running means, after the block.

    Hooks that are put on within the block see all passes, since what is compiled runs
    eagerly.

    Args:
        net: The network.
    """
    device = next(net.parameters()).device
    # Tensors of the inference mode, and those that are elsewhere, cannot be written.
    buffers = [b for b in net.buffers() if not (b.is_meta or b.is_inference())]
    # Nor those that are one number many times over, as by expand.
    buffers = [b for b in buffers if 0 not in b.stride()]
    copies = [buffer.clone() for buffer in buffers]
    with ExitStack() as within:
        within.enter_context(torch.inference_mode(False))
        gpus = [device] if device.type == "cuda" else []
        within.enter_context(torch.random.fork_rng(gpus))
        # Compiled code would ignore new hooks, or keep them.
        if is_compiled(net):
            within.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, copy in zip(buffers, copies, strict=True):
                    buffer.copy_(copy)
