"""Weights drawn for the LoRA of convolutions replace the weights of the layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import nets
import pytest
import torch
from nets import flat, replaced
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrvd_pyro import RankSpace

pytestmark = pytest.mark.filterwarnings(nets.GROUPED)
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
A: tuple[Any, ...] = ("lora_A",)
AB: tuple[Any, ...] = ("lora_A", "lora_B")
BATCH = 6
Make = Callable[..., nn.Module]
KINDS: dict[str, Make] = {
    "1d": partial(nn.Conv1d, 4, 6, 3, stride=2, padding=1),
    "1d, a point": partial(nn.Conv1d, 4, 6, 1),
    "1d, groups": partial(nn.Conv1d, 4, 6, 2, groups=2),
    "2d": partial(nn.Conv2d, 4, 6, 3),
    "2d, a point": partial(nn.Conv2d, 4, 6, 1),
    "2d, a point, same": partial(nn.Conv2d, 4, 6, 1, padding="same"),
    "2d, a point, strides": partial(nn.Conv2d, 4, 6, 1, stride=2),
    "2d, a point, padding": partial(nn.Conv2d, 4, 6, 1, padding=1),
    "2d, a point, strides and padding": partial(nn.Conv2d, 4, 6, 1, 2, 2),
    "2d, a point, dilation": partial(nn.Conv2d, 4, 6, 1, dilation=2),
    "2d, a point, groups": partial(nn.Conv2d, 4, 6, 1, groups=2),
    "2d, oblong": partial(nn.Conv2d, 4, 6, (3, 2), stride=(1, 2), padding=(0, 1)),
    "2d, same": partial(nn.Conv2d, 4, 6, (3, 5), padding="same"),
    "2d, reflecting": partial(nn.Conv2d, 4, 6, 3, padding=1, padding_mode="reflect"),
    "2d, groups": partial(nn.Conv2d, 4, 6, 3, padding=1, groups=2),
    "2d, by channel": partial(nn.Conv2d, 4, 8, 3, groups=4),
    "3d": partial(nn.Conv3d, 4, 6, 2, stride=(1, 2, 1)),
    "3d, a point": partial(nn.Conv3d, 4, 6, 1),
    "3d, groups": partial(nn.Conv3d, 4, 6, 2, groups=2),
}


def adapted(kind: str, **config: Any) -> tuple[PeftModel, Tensor]:
    layer = KINDS[kind]()
    net = nets.lora(nn.Sequential(layer), r=4, target_modules=["0"], **config)
    return net, torch.randn(BATCH, 4, *[5] * int(kind[0]))


def drawn(net: nn.Module, space: RankSpace, value: Tensor, x: Tensor) -> Tensor:
    with space.bind_weights(value):
        y: Tensor = net(x)
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", [A, AB])
def test_bound_weights_equal_replaced_weights(kind: str, sides: Any) -> None:
    net, x = adapted(kind)
    space = RankSpace(net, sides=sides)
    values = torch.randn(BATCH, len(flat(space)))
    shared, each = (drawn(net, space, v, x) for v in (values[0], values))
    with replaced(space, values[0]):
        close(shared, net(x))
    for b, value in enumerate(values):
        with replaced(space, value):
            close(each[b], net(x)[b])
    assert (each - net(x)).flatten(1).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", AB)
def test_a_row_is_what_the_gate_of_its_component_multiplies(
    kind: str, side: Any
) -> None:
    net, x = adapted(kind)
    space = RankSpace(net, sides=(side,))
    assert int(space.widths(side).sum()) == len(flat(space))
    gates = torch.randn(BATCH, space.size)
    for gate in (gates[0], gates):
        with space.bind(gate):
            expected = net(x)
        factors = gate.repeat_interleave(space.widths(side), -1)
        close(drawn(net, space, flat(space) * factors, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind: str) -> None:
    net, x = adapted(kind)
    space = RankSpace(net, sides=AB)
    x = x[:2].requires_grad_()
    for shape in ((), (2,)):
        value = torch.randn(*shape, len(flat(space)), requires_grad=True)
        run = partial(drawn, net, space)
        assert torch.autograd.gradcheck(run, (value, x), fast_mode=True)


@pytest.mark.parametrize("kind", ["1d", "2d", "2d, a point", "2d, groups", "3d"])
def test_weights_per_example_serve_consecutive_rows(kind: str) -> None:
    net, x = adapted(kind)
    space = RankSpace(net, sides=AB)
    values = torch.randn(3, len(flat(space)))
    folded = drawn(net, space, values, x)
    close(folded, drawn(net, space, values.repeat_interleave(2, 0), x))


@pytest.mark.parametrize("kind", ["1d", "2d", "2d, a point", "2d, groups", "3d"])
def test_an_image_without_a_batch_axis_is_one_example(kind: str) -> None:
    net, x = adapted(kind)
    space = RankSpace(net, sides=AB)
    values = torch.randn(2, len(flat(space)))
    for value in (values[0], values[:1]):
        close(drawn(net, space, value, x[0]), drawn(net, space, value, x[:1])[0])
    with pytest.raises(ValueError, match="has 2 examples.*sees 1 rows, .*a multiple"):
        drawn(net, space, values, x[0])


@pytest.mark.parametrize("kind", ["2d", "2d, a point", "2d, groups"])
def test_rows_that_fit_no_example_are_refused(kind: str) -> None:
    net, x = adapted(kind)
    space = RankSpace(net, sides=A)
    with pytest.raises(ValueError, match="has 6 examples.*sees 4 rows, .*a multiple"):
        drawn(net, space, torch.randn(BATCH, len(flat(space))), x[:4])


@pytest.mark.parametrize("kind", ["2d", "2d, a point", "2d, groups", "3d"])
def test_the_bias_of_the_adapter_stays(kind: str) -> None:
    net, x = adapted(kind, lora_bias=True)
    (layer,) = RankSpace(net).layers
    nn.init.normal_(layer.lora_B["default"].bias)
    space = RankSpace(net, sides=AB)
    own = flat(space)
    for value in (own, own.expand(BATCH, -1)):
        close(drawn(net, space, value, x), net(x))


@pytest.mark.parametrize("make", [nets.conv, nets.grouped])
@pytest.mark.parametrize("examples", [(), (4,)])
def test_recomputed_layers_see_their_draw(make: Any, examples: Any) -> None:
    net = make()
    space = RankSpace(net, sides=AB)
    x = torch.randn(4, 3 if make is nets.conv else 4, 7, 7)
    value = torch.randn(*examples, len(flat(space)), requires_grad=True)
    own = partial(checkpoint, use_reentrant=False, context_fn=space.checkpoint_context)
    grads = []
    for run in (net, partial(own, net)):
        y = drawn(run, space, value, x).square().sum()
        grads += torch.autograd.grad(y, value)
    close(grads[1], grads[0])


def test_half_precision_stays_half_precision() -> None:
    net, x = adapted("2d, groups", lora_bias=True)
    net, x = net.bfloat16(), x.bfloat16()
    space = RankSpace(net, sides=AB)
    value = flat(space).float()
    for each in (value, value.expand(BATCH, -1)):
        y = drawn(net, space, each, x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, net(x), rtol=0.1, atol=0.1)
