"""Draws reach the forward pass and its recomputation, whatever is around them."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import nets
import pyro
import pytest
import torch
from peft import PeftModel
from pyro.infer import SVI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertForSequenceClassification

from lrvd_pyro import RankELBO, RankSpace
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.optim import AdamW

close = torch.testing.assert_close

A: tuple[Any, ...] = ("lora_A",)
AB: tuple[Any, ...] = ("lora_A", "lora_B")

renamed_in_transformers = pytest.mark.filterwarnings(
    # Transformers 5: it now says activation_checkpointing_enable
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)


# Drawn weights


@contextmanager
def replaced(space: RankSpace, value: Tensor) -> Iterator[None]:
    """The network's own weights replaced by ``value``, laid out as by flatten."""
    weights = [w for side in space.sides for w in space.weights(side)]
    shapes = [(s, w.shape) for s in space.sides for w in space.weights(s)]
    before = [w.detach().clone() for w in weights]
    pieces = value.split([w.numel() for w in weights])
    with torch.no_grad():
        for w, piece, (side, (out, into)) in zip(weights, pieces, shapes):
            by_row = side == "lora_A"
            w.copy_(piece.view(out, into) if by_row else piece.view(into, out).T)
    yield
    with torch.no_grad():
        for w, old in zip(weights, before):
            w.copy_(old)


def flat(space: RankSpace) -> Tensor:
    return torch.cat([space.flatten(side) for side in space.sides]).detach()


WEIGHED: dict[str, tuple[Callable[[], PeftModel], Callable[[], Any]]] = {
    "Linear": (nets.perceptron, lambda: torch.randn(3, 7, 5)),
    "ragged": (
        lambda: nets.perceptron(rank_pattern={"out": 2}),
        lambda: torch.randn(3, 5),
    ),
    "Conv1D": (lambda: nets.gpt2().eval(), lambda: torch.randint(0, 50, (3, 4))),
}


def output(net: nn.Module, x: Tensor) -> Tensor:
    y = net(x)
    return getattr(y, "logits", y)


@pytest.mark.parametrize("kind", WEIGHED)
@pytest.mark.parametrize("sides", [A, AB])
def test_bound_weights_equal_replaced_weights(kind: str, sides: Any) -> None:
    make, sample = WEIGHED[kind]
    net, x = make(), sample()
    space = RankSpace(net, sides=sides)
    values = torch.randn(3, len(flat(space)))
    with space.bind_weights(values[0]):
        shared = output(net, x)
    with replaced(space, values[0]):
        close(shared, output(net, x), rtol=1e-10, atol=1e-12)
    with space.bind_weights(values):
        each = output(net, x)
    for b, value in enumerate(values):
        with replaced(space, value):
            close(each[b], output(net, x)[b], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sides", [A, AB])
def test_the_networks_own_weights_bound_are_the_network(sides: Any) -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    space = RankSpace(net, sides=sides)
    with space.bind_weights(flat(space)):
        bound = net(x)
    close(bound, net(x), rtol=1e-12, atol=1e-14)


def test_weights_per_example_serve_consecutive_rows() -> None:
    net, x = nets.perceptron(), torch.randn(6, 5)
    space = RankSpace(net, sides=AB)
    values = torch.randn(3, len(flat(space)))
    with space.bind_weights(values):
        folded = net(x)
    with space.bind_weights(values.repeat_interleave(2, 0)):
        close(folded, net(x))


def test_dora_takes_bound_weights_into_its_norm() -> None:
    net, x = nets.perceptron(use_dora=True), torch.randn(6, 5)
    space = RankSpace(net, sides=AB)
    value = torch.randn(len(flat(space)))
    with space.bind_weights(value):
        bound = net(x)
    with replaced(space, value):
        close(bound, net(x), rtol=1e-10, atol=1e-12)


def test_weights_of_the_wrong_length_are_refused() -> None:
    space = RankSpace(nets.regression(features=5, r=3), sides=A)
    for shape in ((14,), (2, 16), (1, 1, 15)):
        with pytest.raises(ValueError, match=r"drawn weights have shape .*\(15,\) or"):
            with space.bind_weights(torch.ones(shape)):
                pass


# Several draws at once


def test_two_spaces_on_one_network_do_not_disturb_each_other() -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    first, second, third = RankSpace(net), RankSpace(net), RankSpace(net)
    a, b = torch.rand(2, 8)
    with first.bind(a):
        only_a = net(x)
        with second.bind(b):
            both = net(x)
        close(net(x), only_a, rtol=0, atol=0)
    with third.bind(a * b):
        close(net(x), both)
    with third.bind(a):
        close(net(x), only_a, rtol=0, atol=0)


def test_the_innermost_draw_counts_and_the_outer_one_returns() -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    space = RankSpace(net)
    plain = net(x)
    a, b = torch.rand(2, 8)
    with space.bind(b):
        only_b = net(x)
    with space.bind(a):
        only_a = net(x)
        with space.bind(b):
            close(net(x), only_b, rtol=0, atol=0)
        close(net(x), only_a, rtol=0, atol=0)
        with pytest.raises(ZeroDivisionError):
            with space.bind(b):
                raise ZeroDivisionError
        close(net(x), only_a, rtol=0, atol=0)
    close(net(x), plain, rtol=0, atol=0)


def test_a_gate_and_drawn_weights_of_one_space_are_both_in_force() -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    space = RankSpace(net, sides=A)
    gate, value = torch.rand(8), torch.randn(len(flat(space)))
    with space.bind(gate), space.bind_weights(value):
        both = net(x)
    with space.bind_weights(value), space.bind(gate):
        close(both, net(x), rtol=0, atol=0)
    with space.bind(gate), replaced(space, value):
        close(both, net(x), rtol=1e-10, atol=1e-12)


# Activation checkpointing


def bert_model() -> GateLoRA:
    torch.manual_seed(0)
    return GateLoRA(nets.bert(), num_data=12)


def gradients(
    model: GateLoRA, batch: dict[str, Tensor], particles: int
) -> list[Tensor]:
    """Of the ELBO, at one seed, with one backward for all particles."""
    model.train()
    guide = RankDiagonal(model)
    loss = RankELBO(num_particles=particles)(model, guide)
    with pyro.poutine.block():
        guide(**batch)  # makes its parameters before the seed is set
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
    calls = count_forwards(model.base_net)
    getattr(model.base_net.base_model.model, ENABLE)()
    checkpointed = gradients(model, batch, particles=2)
    assert len(plain) > 8
    close(checkpointed, plain, rtol=1e-10, atol=1e-14)
    assert calls["forwards"] == 2 * 2  # each particle's forward pass was recomputed


def count_forwards(net: nn.Module) -> dict[str, int]:
    """How often the first LoRA layer ran, recomputations included."""
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
    net.eval()  # it checkpoints nothing then
    with space.bind(torch.ones(space.size)):
        net(**nets.tokens())


@renamed_in_transformers
def test_the_networks_checkpoint_function_is_restored() -> None:
    net = nets.bert().train()
    getattr(net.base_model.model, ENABLE)()
    space = RankSpace(net)
    layer = net.base_model.model.bert.encoder.layer[0]
    before = layer._gradient_checkpointing_func
    with space.bind(torch.ones(space.size)):
        assert layer._gradient_checkpointing_func is not before
    assert layer._gradient_checkpointing_func is before


class Checkpointed(nets.Perceptron):
    """A network that checkpoints its first layer by itself."""

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


def test_it_raises_also_where_a_draw_is_bound_that_may_be_another() -> None:
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


# torch.compile


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiling(test: Callable[..., None]) -> Callable[..., None]:
    """Start with an empty compiler; let it look at a gate that a guide has drawn."""
    # torch._dynamo: it reads .grad of every tensor it meets
    nosy = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    test = pytest.mark.filterwarnings(nosy)(test)
    return pytest.mark.usefixtures("fresh_compiler")(test)


@compiling
@pytest.mark.parametrize("per_example", [False, True])
def test_a_fresh_gate_every_step_is_compiled_once(per_example: bool) -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    space = RankSpace(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for step in range(5):
        gate = torch.rand(*[3] * per_example, space.size, requires_grad=True)
        with space.bind(gate):
            fast, slow = compiled(x), net(x)
        close(fast, slow, rtol=1e-10, atol=1e-12)
        close(
            torch.autograd.grad(fast.square().sum(), gate),
            torch.autograd.grad(slow.square().sum(), gate),
        )
        if step == 0:
            before = graphs()
    assert graphs() == before == 1


@compiling
def test_fresh_weights_every_step_are_compiled_once() -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    space = RankSpace(net, sides=AB)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        with space.bind_weights(torch.randn(3, len(flat(space)))):
            close(compiled(x), net(x), rtol=1e-10, atol=1e-12)
    assert graphs() == 1


@compiling
def test_a_compiled_network_follows_binding_and_release() -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    plain = net(x).detach()
    space = RankSpace(net)
    net.compile(backend="aot_eager")
    for _ in range(2):
        with space.bind(torch.zeros(space.size)):
            assert (net(x) - plain).abs().max() > 1e-3
        close(net(x), plain, rtol=1e-10, atol=1e-12)
    assert graphs() == 2  # one with a draw, one without


@compiling
def test_a_compiled_bert_gives_the_values_of_bert_at_every_fresh_gate() -> None:
    net, batch = nets.bert().eval(), nets.tokens(3, labels=False)
    space = RankSpace(net)
    gates = torch.rand(4, 3, space.size)
    values = []
    for compiled in (False, True):
        if compiled:
            net.compile(backend="aot_eager")
        for step, gate in enumerate(gates):
            with space.bind(gate), torch.no_grad():
                values.append(net(**batch).logits)
            if step == 0:
                before = graphs()
    close(values[4:], values[:4], rtol=1e-10, atol=1e-12)
    assert graphs() == before >= 1


@compiling
def test_svi_on_a_compiled_network_equals_svi_on_the_network() -> None:
    batch = {"x": torch.randn(6, 5), "labels": torch.randint(0, 3, (6,))}
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = GateLoRA(nets.perceptron(), num_data=12)
        if compiled:
            model.base_net.compile(backend="aot_eager")
        guide = RankDiagonal(model)
        svi = SVI(model, guide, AdamW(lr=1e-2), loss=RankELBO())
        torch.manual_seed(1)
        losses.append([svi.step(**batch) for _ in range(4)])
        if compiled:
            before = graphs()
            svi.step(**batch)
            assert graphs() == before
    close(losses[1], losses[0], rtol=1e-10, atol=0)


def test_a_network_compiled_before_the_injection_would_miss_the_hooks() -> None:
    net = nets.perceptron()
    net.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"was compiled .*then call net.compile\(\)"):
        RankSpace(net)
    net = nets.perceptron()
    net.get_submodule("base_model.model.out").compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match="was compiled"):
        RankSpace(net)
    RankSpace(copy.deepcopy(net))


# Copies


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_trains_and_the_original_does_not_move(
    duplicate: Callable[[Any], Any],
) -> None:
    batch = {"x": torch.randn(6, 5), "labels": torch.randint(0, 3, (6,))}
    model = GateLoRA(nets.perceptron(), num_data=6)
    twin = duplicate(model)
    original = [p.detach().clone() for p in model.parameters()]
    svi = SVI(twin, RankDiagonal(twin), AdamW(lr=0.1), loss=RankELBO())
    for _ in range(2):
        svi.step(**batch)
    close([p.detach() for p in model.parameters()], original, rtol=0, atol=0)
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            moved = parameter - model.get_parameter(name)
            assert moved.abs().max() > 1e-3, name


def test_a_bert_model_pickles_with_its_hooks() -> None:
    model = GateLoRA(nets.bert(), num_data=6)
    twin = through_pickle(model)
    assert isinstance(twin.base_net.base_model.model, BertForSequenceClassification)
    batch, gate = nets.tokens(labels=False), torch.rand(model.space.size)
    with model.bind(gate), twin.bind(gate):
        close(twin.predictions(**batch), model.predictions(**batch), rtol=0, atol=0)


# The whole: the likelihood's gradient with respect to the gate


def test_the_gate_gets_the_gradient_of_the_formula() -> None:
    net = nets.regression(features=5, r=3, outputs=2)
    space = RankSpace(net)
    x, gate = torch.randn(4, 5), torch.rand(4, 3, requires_grad=True)
    with space.bind(gate):
        net(x).sum().backward()
    (a,), (b,) = space.weights("lora_A"), space.weights("lora_B")
    close(gate.grad, F.linear(x, a) * b.sum(0))
