"""Second moments, weights and changes of basis for the tests of the gauge."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lrvd_pyro.gauge import Gramians, gramians
from lrvd_pyro.models import GateLoRA


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def found(net: PeftModel, batches: list[Any], **options: Any) -> Gramians:
    model = GateLoRA(net, num_data=1000)
    try:
        return gramians(model, batches, **{"generator": seeded()} | options)
    finally:
        model.release()


def weights(net: PeftModel) -> list[tuple[Tensor, Tensor]]:
    model = GateLoRA(net, num_data=1)
    pairs = zip(model.space.weights("lora_A"), model.space.weights("lora_B"))
    model.release()
    return list(pairs)


@torch.no_grad()
def mix(net: PeftModel, seed: int, condition: float) -> None:
    """A random change of basis in every module, of a given condition number."""
    for a, b in weights(net):
        r = len(a)
        left, right = (
            torch.linalg.qr(
                torch.randn(r, r, generator=seeded(seed + i), dtype=torch.float64)
            )[0]
            for i in range(2)
        )
        sizes = condition ** torch.linspace(-0.5, 0.5, r, dtype=torch.float64)
        a.copy_(((left * sizes) @ right @ a.double().flatten(1)).view_as(a))
        mixed = b.double().movedim(1, -1) @ (right.T / sizes) @ left.T
        b.copy_(mixed.movedim(-1, 1))


def rows(size: int, features: int) -> dict[str, Tensor]:
    return {"x": torch.randn(size, features)}
