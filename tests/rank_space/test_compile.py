"""Draws reach a compiled network, and a fresh draw does not compile it again."""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mixed
import nets
import pyro
import pytest
import torch
from nets import flat
from pyro.infer import SVI

from lrvd_pyro import RankELBO, RankSpace
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.optim import AdamW
from lrvd_pyro.rank_space.center import center_at

close = torch.testing.assert_close
AB: tuple[Any, ...] = ("lora_A", "lora_B")


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
    # torch._dynamo reads .grad of every tensor that it meets
    nosy = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    test = pytest.mark.filterwarnings(nosy)(test)
    return pytest.mark.usefixtures("fresh_compiler")(test)


@compiling
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("per_example", [False, True])
def test_a_fresh_gate_every_step_is_compiled_once(
    per_example: bool, centered: bool
) -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    space = RankSpace(net)
    if centered:
        center_at(space, torch.rand(space.size))
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
@pytest.mark.parametrize(
    ("make", "shape"), [(nets.perceptron, (5,)), (nets.conv, (3, 6, 6))]
)
def test_fresh_weights_every_step_are_compiled_once(make: Any, shape: Any) -> None:
    net, x = make(), torch.randn(3, *shape)
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


@compiling
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_network_refuses_a_thread_without_the_draw(fullgraph: bool) -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    space, found = RankSpace(net), []
    plain = net(x)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=fullgraph)

    def run() -> None:
        try:
            found.append(compiled(x))
        except RuntimeError as error:  # with fullgraph=True it is Dynamo's
            found.append(error)

    for _ in range(2):
        with space.bind(torch.rand(space.size)):
            drawn = compiled(x)
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            close(compiled(x), drawn, rtol=0, atol=0)
        assert isinstance(found[-1], RuntimeError)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        close(found[-1], plain, rtol=1e-10, atol=1e-12)


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


@compiling
def test_the_check_of_rows_leaves_nothing_in_compiled_code() -> None:
    losses = []
    for compiled in (False, True):
        pyro.set_rng_seed(0)
        net = nets.bert()
        model = GateLoRA(net, num_data=60)
        if compiled:
            net.compile(backend="aot_eager")
        batch = nets.tokens()
        svi = SVI(model, RankDiagonal(model), AdamW(lr=1e-2), loss=RankELBO())
        losses.append([svi.step(**batch) for _ in range(3)])
    close(torch.tensor(losses[0]), torch.tensor(losses[1]))
    mixing = mixed.pairs()
    model = GateLoRA(mixing, num_data=60)
    mixing.compile(backend="aot_eager")
    assert "query" in model.mixed_rows(mixed.texts())
