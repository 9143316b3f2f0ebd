"""RankSpace refuses LoRA layers that cannot be gated, and names the way out."""

from typing import Any

import nets
import pytest
from nets import hooks
from peft.tuners.lora.config import VeloraConfig
from torch import Tensor, nn
from torch.nn import functional as F

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


class Standardized(nn.Conv2d):
    """A weight that is standardized on its way, as in BiT's ResNets."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / (1e-3 + self.weight.std())
        return F.conv2d(x, weight, self.bias)


class Inner(nn.Conv2d):
    """A convolution that changes one level below ``forward``."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return super()._conv_forward(x, weight.tanh(), bias)


class Circular(nn.Conv2d):
    """A convolution that pads in its own way, whatever PEFT tells it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, padding_mode="circular", **options)


@pytest.mark.parametrize("kind", [Standardized, Inner, Circular])
def test_drawn_weights_refuse_a_convolution_with_a_way_of_its_own(kind: Any) -> None:
    net = nets.lora(nn.Sequential(kind(3, 4, 3)), target_modules=["0"])
    message = f"A and B of '0' are {kind.__name__} layers.*use models.GateLoRA"
    with pytest.raises(TypeError, match=message):
        FactorLoRA(net, num_data=10)
    assert hooks(net) == 0
    RankSpace(net).close()


def test_lora_dropout_is_one_warning() -> None:
    net = nets.perceptron(lora_dropout=0.1)
    with pytest.warns(UserWarning, match="lora_dropout=0.1 in 'hidden'") as caught:
        RankSpace(net)
    assert len(caught) == 1
