"""What the tests of rank selection share: pairs to prune, and what to keep of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from nets import tokens
from pyro.infer import SVI
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro import RankSpace
from lrvd_pyro.models import FactorLoRA, GateLoRA

PAIR = ("lora_A", "lora_B")
MODELS: dict[str, Callable[[Any], Any]] = {
    "gate": partial(GateLoRA, num_data=60),
    "factor": partial(FactorLoRA, num_data=60),
    "factor-both": partial(FactorLoRA, num_data=60, sides=PAIR),
}


def some(space: RankSpace, *, gone: int | None = 0) -> Tensor:
    """A mask with every second component, and none of module ``gone``."""
    keep = torch.arange(space.size) % 2 == 1
    if gone is not None:
        keep[sum(space.ranks[:gone]) : sum(space.ranks[: gone + 1])] = False
    return keep


def outputs(model: Any, value: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), model.bind(value):
        return model.predictions(**inputs)


def trained(model: Any, guide: Any, **options: Any) -> tuple[SVI, Any]:
    optim = lrvd.optim.AdamW(lr=1e-2)
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO(**options))
    for _ in range(2):
        svi.step(**tokens())
    return svi, optim
