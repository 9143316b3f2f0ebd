"""What the benchmarks of time and memory share."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pyro
import torch
import transformers
from torch import Tensor

import lrvd_pyro as lrvd


def bytes_kept(forward: Callable[[], Tensor], net: Any) -> int:
    """What autograd saves of a forward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor.detach()  # an output, saved as it is, would hold its own graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(s.nbytes() for pointer, s in kept.items() if pointer not in own)


def append(lines: list[dict[str, Any]], path: Path, command: str) -> None:
    """To a JSON lines file, with the command and the versions."""
    common = versions() | {"command": command}
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line | common) + "\n" for line in lines)


def versions() -> dict[str, str]:
    """Of what the times depend on."""
    return {
        "lrvd_pyro": lrvd.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "pyro": pyro.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
