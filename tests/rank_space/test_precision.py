"""Draws at low precision, under autocast and on quantized layers."""

import nets
import peft
import pytest
import torch
from nets import folded
from peft import LoraConfig, get_peft_model
from torch import nn

from lrvd_pyro import RankSpace

close = torch.testing.assert_close


def test_bfloat16_adapters_take_gates_of_another_precision() -> None:
    net = nets.Perceptron().bfloat16()
    config = LoraConfig(r=4, target_modules=["hidden", "out"])
    net = get_peft_model(net, config, autocast_adapter_dtype=False)
    space = RankSpace(net, sides=("lora_A",))
    for w in space.weights("lora_B"):
        nn.init.normal_(w)
    x = torch.randn(3, 5).bfloat16()
    for gate in (torch.zeros(8).float(), torch.zeros(3, 8).double()):
        with space.bind(gate):
            gated = net(x)
        with net.disable_adapter():
            close(gated, net(x), rtol=0, atol=0)
    with space.bind_weights(space.flatten("lora_A").float()):
        drawn = net(x)
    assert drawn.dtype == torch.bfloat16
    close(drawn, net(x), rtol=0, atol=0)


def test_under_autocast_a_gate_equals_the_gate_folded_into_the_weights() -> None:
    net = nets.perceptron().float()
    space = RankSpace(net, sides=("lora_A", "lora_B"))
    x = torch.randn(3, 5).float()
    gate = 2.0 ** torch.randint(-2, 3, (8,))  # powers of two: exact in bfloat16
    weights = torch.cat([space.flatten("lora_A"), space.flatten("lora_B")])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with space.bind(gate):
            gated = net(x)
        with space.bind(torch.full((8,), 4.0)):
            fourfold = net(x)
        with space.bind_weights(2 * weights):
            close(net(x), fourfold, rtol=0, atol=0)
    with folded(space, gate, "lora_B"), torch.autocast("cpu", dtype=torch.bfloat16):
        close(gated, net(x), rtol=0, atol=0)
    assert gated.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_are_gated(bits: int) -> None:
    bnb = pytest.importorskip(
        "bitsandbytes", reason="the 4- and 8-bit layers are those of bitsandbytes"
    )
    torch.set_default_dtype(torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    options = {} if bits == 4 else {"has_fp16_weights": False}
    base = nn.Sequential(layer(64, 64, bias=False, **options)).to(device)
    setattr(base, f"is_loaded_in_{bits}bit", True)
    net = nets.lora(base, target_modules=["0"]).eval()
    space = RankSpace(net)
    assert type(space.layers[0]) is not peft.tuners.lora.Linear
    x = torch.randn(3, 64, device=device)
    gate = torch.rand(space.size, device=device)
    plain = net(x)
    with space.bind(gate):
        gated = net(x)
    with folded(space, gate, "lora_B"):
        close(gated, net(x))
    assert (gated - plain).abs().max() > 1e-3
