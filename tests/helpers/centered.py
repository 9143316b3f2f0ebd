"""Networks whose gates act about a center, for the tests."""

from collections.abc import Callable
from functools import partial

import nets
import torch
from gauges import rows
from nets import bert, perceptron, tokens
from peft import PeftModel
from torch import Tensor

from lrvd_pyro.models import GateLoRA
from lrvd_pyro.rank_space.center import center_at, center_of

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
NETS: dict[str, Callable[[], tuple[PeftModel, dict[str, Tensor]]]] = {
    "bert": lambda: (bert(), tokens(4, labels=False)),
    "gpt2": lambda: (nets.gpt2(), tokens(4, labels=False)),
    "rslora, own bias": lambda: (own_bias(), tokens(4, labels=False)),
    "ragged": lambda: (perceptron(**nets.RAGGED), rows(4, 5)),
    "convolutions": lambda: (nets.conv(), {"x": torch.randn(4, 3, 6, 6)}),
}


def own_bias() -> PeftModel:
    """A network that was trained with PEFT's ``lora_bias``."""
    net = bert(use_rslora=True, lora_bias=True)
    for name, parameter in net.named_parameters():
        if name.endswith("lora_B.default.bias"):
            torch.nn.init.normal_(parameter)
    return net


def centered(net: PeftModel) -> tuple[GateLoRA, Tensor]:
    model = GateLoRA(net, num_data=60)
    point = torch.randn(model.space.size)
    center_at(model.space, point)
    return model, point


def where(model: GateLoRA) -> Tensor:
    return torch.cat([*center_of(model.space).values()])
