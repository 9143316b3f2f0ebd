"""RankSpace refuses LoRA layers that cannot be gated, and names the way out."""

from typing import Any

import nets
import pytest
from nets import hooks
from peft.tuners.lora.config import VeloraConfig
from torch import Tensor, nn

from lrvd_pyro import RankSpace
from lrvd_pyro.models import FactorLoRA


class Assorted(nn.Module):
    """One layer of each kind on which a hook on lora_B would never run."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 4, 3)

    def prepare_inputs_for_generation(self) -> None:
        """PEFT requires this method of a causal language model."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.linear(self.attention(h, h, h)[0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Embedding": (
        {"target_modules": ["embed"]},
        "'embed' is a LoRA Embedding layer.*leave it out of target_modules",
    ),
    "MultiheadAttention": (
        {"target_modules": ["attention"]},
        "'attention' is a LoRA MultiheadAttention layer.*leave it out",
    ),
    "out_proj": (
        {"target_modules": ["attention.out_proj", "linear"]},
        "'attention.out_proj' belongs to an nn.MultiheadAttention.*leave it out",
    ),
    "target_parameters": (
        {"target_modules": [], "target_parameters": ["linear.weight"]},
        "'linear' is a LoRA ParamWrapper layer.*leave it out",
    ),
    "VeLoRA": (
        {"target_modules": ["linear"], "velora_config": VeloraConfig()},
        "'linear' uses VeloraLinearVariant.*plain LoRA, rsLoRA, or DoRA on linear",
    ),
    "aLoRA": (
        {
            "target_modules": ["linear"],
            "alora_invocation_tokens": [1],
            "task_type": "CAUSAL_LM",
        },
        "'linear' uses ALoraLinearVariant.*plain LoRA, rsLoRA, or DoRA on linear",
    ),
    "DoRA on Conv2d": (
        {"target_modules": ["conv"], "use_dora": True},
        "'conv' uses DoraConv2dVariant.*plain LoRA, rsLoRA, or DoRA on linear",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_cannot_be_gated_is_refused_with_the_way_out(kind: str) -> None:
    config, message = REFUSED[kind]
    net = nets.lora(Assorted(), **config)
    with pytest.raises(TypeError, match=message):
        RankSpace(net)
    assert hooks(net) == 0


def test_drawn_weights_need_linear_layers() -> None:
    message = "'first' is a LoRA Conv2d layer; drawn weights.*use models.GateLoRA"
    with pytest.raises(TypeError, match=message):
        FactorLoRA(nets.conv(), num_data=10)


def test_lora_dropout_is_one_warning() -> None:
    net = nets.perceptron(lora_dropout=0.1)
    with pytest.warns(UserWarning, match="lora_dropout=0.1 in 'hidden'") as caught:
        RankSpace(net)
    assert len(caught) == 1
