"""The state of every global random number generator, as JSON and tensors."""

import random
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "set_random_state"]


def random_state() -> dict[str, Any]:
    """Read the generators of torch (CPU, and CUDA where used), NumPy and Python."""
    numpy: Any = np.random.get_state()
    kind, keys, *rest = numpy
    # Reading CUDA's generators would start CUDA in a process that does not use it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": (kind, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` read; CUDA devices that are not here are left out."""
    torch.set_rng_state(state["torch"])
    for device, saved in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(saved, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
