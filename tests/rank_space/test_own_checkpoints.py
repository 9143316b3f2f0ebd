"""One's own activation checkpointing without the space's context raises."""

from functools import partial
from typing import Any

import nets
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lrvd_pyro import RankSpace

close = torch.testing.assert_close
FORGOTTEN = "context_fn=space.checkpoint_context"
both_kinds = pytest.mark.parametrize("reentrant", [False, True])


class Checkpointed(nets.Perceptron):
    """A network that applies activation checkpointing to its first layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.how = partial(checkpoint, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.how(lambda x: self.hidden(x).tanh(), x))


def own_checkpointing(reentrant: bool) -> tuple[PeftModel, RankSpace]:
    base = Checkpointed(use_reentrant=reentrant)
    net = nets.lora(base, target_modules=["hidden", "out"])
    return net, RankSpace(net)


def rows() -> Tensor:
    return torch.randn(3, 5, requires_grad=True)


@both_kinds
@pytest.mark.parametrize("grad", [False, True])
def test_a_plain_pass_before_backward_does_not_hide_a_forgotten_draw(
    reentrant: bool, grad: bool
) -> None:
    net, space = own_checkpointing(reentrant)
    with space.bind(torch.rand(space.size)):
        loss = net(rows()).sum()
    with torch.set_grad_enabled(grad):
        net(rows())
    with pytest.raises(RuntimeError, match=FORGOTTEN):
        loss.backward()


@both_kinds
def test_drawn_and_plain_passes_in_one_loss_raise(reentrant: bool) -> None:
    net, space = own_checkpointing(reentrant)
    with space.bind(torch.rand(space.size)):
        drawn = net(rows()).sum()
    loss = drawn + net(rows()).sum()
    with pytest.raises(RuntimeError, match=FORGOTTEN):
        loss.backward()


@both_kinds
@pytest.mark.parametrize("bound", [False, True])
def test_a_plain_pass_is_recomputed_as_such_whatever_draws_came_after_it(
    reentrant: bool, bound: bool
) -> None:
    net, space = own_checkpointing(reentrant)
    x, gate = rows(), torch.zeros(space.size)
    grads = []
    for disturbed in (False, True):
        net.zero_grad()
        loss = net(x).square().sum()
        if disturbed:
            with space.bind(gate):
                net(rows()).sum()
                if bound:
                    loss.backward()
        if not (disturbed and bound):
            loss.backward()
        grads.append([w.grad.clone() for w in space.weights("lora_A")])
    close(grads[1], grads[0], rtol=0, atol=0)


@both_kinds
def test_training_without_draws_goes_on_after_many_steps_with_draws(
    reentrant: bool,
) -> None:
    net, space = own_checkpointing(reentrant)
    losses = []
    for _ in range(100):
        with space.bind(torch.rand(space.size)):
            losses.append(net(rows()).sum())
    net(rows()).sum().backward()
    for loss in (losses[0], losses[50], losses[99]):
        with pytest.raises(RuntimeError, match=FORGOTTEN):
            loss.backward()


def test_a_checkpoint_within_one_that_has_the_context_raises_if_it_has_none() -> None:
    net, space = own_checkpointing(False)
    outer = partial(
        checkpoint, use_reentrant=False, context_fn=space.checkpoint_context
    )
    with space.bind(torch.rand(space.size)):
        loss = outer(net, rows()).square().sum()
    net(rows())
    with pytest.raises(RuntimeError, match=FORGOTTEN):
        loss.backward()
