"""Draws reach the recomputed forward pass of activation checkpointing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import nets
import pyro
import pytest
import torch
from nets import flat
from peft import PeftModel
from pyro.infer import SVI
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrvd_pyro import RankELBO, RankSpace
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.optim import AdamW

close = torch.testing.assert_close
AB: tuple[Any, ...] = ("lora_A", "lora_B")

renamed_in_transformers = pytest.mark.filterwarnings(
    # Transformers 5 has a new name for it: activation_checkpointing_enable
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)


def bert_model() -> GateLoRA:
    torch.manual_seed(0)
    return GateLoRA(nets.bert(), num_data=12)


def gradients(
    model: GateLoRA, batch: dict[str, Tensor], particles: int
) -> list[Tensor]:
    """The ELBO's gradients at one seed, by one backward pass for all particles."""
    model.train()
    guide = RankDiagonal(model)
    loss = RankELBO(num_particles=particles)(model, guide)
    with pyro.poutine.block():
        guide(**batch)  # the guide makes its parameters here, before the seed is set
    torch.manual_seed(1)
    loss(**batch).backward()
    parameters = [*model.named_parameters(), *guide.named_parameters()]
    return [p.grad for _, p in parameters if p.grad is not None]


ENABLE = "gradient_checkpointing_enable"


@renamed_in_transformers
def test_gradients_with_checkpointing_equal_those_without_for_two_particles() -> None:
    batch = nets.tokens()
    plain = gradients(bert_model(), batch, particles=2)
    model = bert_model()
    model.mixed_rows(batch)  # the check of rows has passes of its own
    calls = count_forwards(model.base_net)
    getattr(model.base_net.base_model.model, ENABLE)()
    checkpointed = gradients(model, batch, particles=2)
    assert len(plain) > 8
    close(checkpointed, plain, rtol=1e-10, atol=1e-14)
    assert calls["forwards"] == 2 * 2  # each particle's forward pass was recomputed


def count_forwards(net: nn.Module) -> dict[str, int]:
    """Count the runs of the first LoRA layer, recomputations included."""
    calls = {"forwards": 0}
    layer = next(m for m in net.modules() if hasattr(m, "lora_A"))

    def count(*_: Any) -> None:
        calls["forwards"] += 1

    layer.register_forward_hook(count)
    return calls


@renamed_in_transformers
def test_svi_steps_with_checkpointing_equal_those_without() -> None:
    batch = nets.tokens()
    losses = []
    for checkpointing in (False, True):
        model = bert_model()
        if checkpointing:
            getattr(model.base_net.base_model.model, ENABLE)()
        guide = RankDiagonal(model)
        svi = SVI(model, guide, AdamW(lr=1e-2), loss=RankELBO(num_particles=2))
        torch.manual_seed(1)
        losses.append([svi.step(**batch) for _ in range(3)])
    close(losses[1], losses[0], rtol=1e-10, atol=0)


@renamed_in_transformers
def test_a_retained_graph_is_recomputed_with_its_draw_each_time() -> None:
    net = nets.bert().train()
    getattr(net.base_model.model, ENABLE)()
    space = RankSpace(net)
    gate = torch.rand(space.size, requires_grad=True)
    with space.bind(gate):
        loss = net(**nets.tokens()).loss
    (first,) = torch.autograd.grad(loss, gate, retain_graph=True)
    (second,) = torch.autograd.grad(loss, gate)
    close(first, second, rtol=0, atol=0)


@renamed_in_transformers
def test_a_backward_pass_within_another_draw_recomputes_with_its_own() -> None:
    net = nets.bert().train()
    space = RankSpace(net)
    batch, a, b = nets.tokens(), *torch.rand(2, space.size)
    expected = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(net.base_model.model, ENABLE)()
        net.zero_grad()
        with space.bind(a):
            loss = net(**batch).loss
        with space.bind(b):
            loss.backward()
        expected.append([w.grad.clone() for w in space.weights("lora_A")])
    close(expected[1], expected[0], rtol=1e-10, atol=1e-14)


@renamed_in_transformers
def test_without_a_draw_checkpointing_is_that_of_the_network() -> None:
    net, batch = nets.bert().train(), nets.tokens()
    space = RankSpace(net)
    with space.bind(torch.zeros(space.size)):
        net(**batch)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(net.base_model.model, ENABLE)()
        net.zero_grad()
        net(**batch).loss.backward()
        grads.append([w.grad.clone() for w in space.weights("lora_A")])
    close(grads[1], grads[0], rtol=1e-10, atol=1e-14)


@renamed_in_transformers
@pytest.mark.parametrize("examples", [0, 6])
def test_drawn_weights_are_recomputed(examples: int) -> None:
    net, batch = nets.bert().train(), nets.tokens(6)
    space = RankSpace(net, sides=AB)
    shape = (*[examples] * (examples > 0), len(flat(space)))
    value = torch.randn(shape, requires_grad=True)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(net.base_model.model, ENABLE)()
        with space.bind_weights(value):
            loss = net(**batch).loss
        grads.append(torch.autograd.grad(loss, value))
    close(grads[1], grads[0], rtol=1e-10, atol=1e-14)


@renamed_in_transformers
def test_two_spaces_are_both_recomputed() -> None:
    net, batch = nets.bert().train(), nets.tokens()
    first, second = RankSpace(net), RankSpace(net)
    a, b = torch.rand(2, first.size)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(net.base_model.model, ENABLE)()
        net.zero_grad()
        with first.bind(a), second.bind(b):
            loss = net(**batch).loss
        loss.backward()
        grads.append([w.grad.clone() for w in first.weights("lora_A")])
    close(grads[1], grads[0], rtol=1e-10, atol=1e-14)


@renamed_in_transformers
@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"debug": False}])
def test_reentrant_checkpointing_is_refused(options: dict[str, Any]) -> None:
    net = nets.bert().train()
    getattr(net.base_model.model, ENABLE)(gradient_checkpointing_kwargs=options)
    space = RankSpace(net)
    with pytest.raises(RuntimeError, match=r'reentrant .*"use_reentrant": False'):
        with space.bind(torch.ones(space.size)):
            pytest.fail("entered")
    net.eval()  # in evaluation mode Transformers recomputes nothing
    with space.bind(torch.ones(space.size)):
        net(**nets.tokens())


@renamed_in_transformers
def test_a_step_names_the_reentrant_checkpointing_that_gradients_cross() -> None:
    net = nets.bert().train()
    options = {"use_reentrant": True}
    getattr(net.base_model.model, ENABLE)(gradient_checkpointing_kwargs=options)
    net.base_model.model.enable_input_require_grads()
    model = GateLoRA(net, num_data=60)
    with pytest.raises(RuntimeError, match=r'reentrant .*"use_reentrant": False'):
        RankELBO().differentiable_loss(model, RankDiagonal(model), **nets.tokens())


@renamed_in_transformers
def test_the_networks_checkpointing_function_is_restored() -> None:
    net = nets.bert().train()
    getattr(net.base_model.model, ENABLE)()
    space = RankSpace(net)
    layer = net.base_model.model.bert.encoder.layer[0]
    before = layer._gradient_checkpointing_func
    with space.bind(torch.ones(space.size)):
        assert layer._gradient_checkpointing_func is not before
    assert layer._gradient_checkpointing_func is before


class Checkpointed(nets.Perceptron):
    """A network that applies activation checkpointing to its first layer."""

    def __init__(self, how: Callable[..., Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.how(lambda x: self.hidden(x).tanh(), x))


def own_checkpointing(how: Callable[..., Tensor]) -> tuple[PeftModel, RankSpace]:
    net = nets.lora(Checkpointed(how), target_modules=["hidden", "out"])
    return net, RankSpace(net)


@pytest.mark.parametrize("reentrant", [False, True])
def test_ones_own_checkpoint_that_forgets_the_draw_raises_in_backward(
    reentrant: bool,
) -> None:
    net, space = own_checkpointing(partial(checkpoint, use_reentrant=reentrant))
    with space.bind(torch.rand(space.size)):
        loss = net(torch.randn(3, 5, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="context_fn=space.checkpoint_context"):
        loss.backward()


def test_ones_own_checkpoint_also_raises_where_another_draw_is_bound() -> None:
    net, space = own_checkpointing(partial(checkpoint, use_reentrant=False))
    with space.bind(torch.rand(space.size)):
        loss = net(torch.randn(3, 5)).sum()
    with space.bind(torch.rand(space.size)):
        with pytest.raises(RuntimeError, match="recomputes a LoRA layer"):
            loss.backward()


@pytest.mark.parametrize("examples", [0, 3])
def test_ones_own_checkpoint_with_the_spaces_context_is_exact(examples: int) -> None:
    net, space = own_checkpointing(lambda run, x: run(x))
    model = net.base_model.model
    x = torch.randn(3, 5)
    draws = torch.rand(2, *[examples] * (examples > 0), space.size, requires_grad=True)
    grads = []
    own = partial(checkpoint, use_reentrant=False, context_fn=space.checkpoint_context)
    for how in (model.how, own):
        model.how = how
        net.zero_grad()
        draws.grad = None
        loss = torch.zeros(())
        for draw in draws:
            with space.bind(draw):
                loss = loss + net(x).square().sum()
        loss.backward()
        grads.append([draws.grad, *[w.grad.clone() for w in space.weights("lora_A")]])
    close(grads[1], grads[0], rtol=1e-10, atol=1e-14)


def test_the_spaces_context_without_a_draw_is_the_plain_network() -> None:
    net, space = own_checkpointing(lambda run, x: run(x))
    model, x = net.base_model.model, torch.randn(3, 5)
    grads = []
    own = partial(checkpoint, use_reentrant=False, context_fn=space.checkpoint_context)
    for how in (model.how, own):
        model.how = how
        net.zero_grad()
        loss = net(x).square().sum()
        with space.bind(torch.zeros(space.size)):
            loss.backward()
        grads.append([w.grad.clone() for w in space.weights("lora_A")])
    close(grads[1], grads[0], rtol=1e-10, atol=1e-14)
