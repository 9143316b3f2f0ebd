"""Pyro's handlers are common to all threads: training beside Pyro is refused."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import nets
import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive
from pyro.poutine.messenger import Messenger
from torch import Tensor

from lrvd_pyro import RankELBO, predict
from lrvd_pyro._compat.pyro import messengers
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.inference.threads import alone_in_pyro
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.optim import AdamW
from lrvd_pyro.predictive.draws import draw_latents

REFUSED = "runs Pyro at the same time"


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(6, 5), "labels": torch.randint(0, 3, (6,))}


class Trained:
    """A model, its guide, and a step of each driver."""

    def __init__(self) -> None:
        self.model = GateLoRA(nets.perceptron(), num_data=12)
        self.guide = RankDiagonal(self.model)
        self.svi = SVI(self.model, self.guide, AdamW(lr=0.1), loss=RankELBO())
        self.loss = RankELBO()(self.model, self.guide)
        self.batch = batch()

    def step(self) -> None:
        self.svi.step(**self.batch)

    def torch_step(self) -> None:
        self.loss(**self.batch).backward()

    def values(self) -> list[Tensor]:
        parts = [*self.model.parameters(), *self.guide.parameters()]
        return [p.detach().clone() for p in parts]


@contextmanager
def within(trained: Trained, work: Callable[[], object]) -> Iterator[list[Any]]:
    """Another thread stands in a forward pass of ``work`` during the block."""
    entered, leave, errors = threading.Event(), threading.Event(), list[Any]()

    def pause(*_: object) -> None:
        entered.set()
        assert leave.wait(20)

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    hook = trained.model.base_net.register_forward_pre_hook(pause)
    thread = threading.Thread(target=run, name="trainer")
    thread.start()
    assert entered.wait(20)
    hook.remove()
    try:
        yield errors
    finally:
        leave.set()
        thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("driver", ["step", "torch_step"])
@pytest.mark.parametrize("beside", ["step", "torch_step"])
def test_training_two_models_in_two_threads_is_refused_by_name(
    driver: str, beside: str
) -> None:
    first, second = Trained(), Trained()
    before, started = second.values(), first.values()
    with within(first, getattr(first, driver)) as errors:
        with pytest.raises(RuntimeError, match=f"'trainer' {REFUSED}.*one process"):
            getattr(second, beside)()
    assert not errors  # the step that ran first is none the worse for it
    moved = any(not torch.equal(a, b) for a, b in zip(started, first.values()))
    assert moved == (driver == "step")
    assert all(torch.equal(a, b) for a, b in zip(before, second.values()))
    assert not messengers()
    second.step()


def test_training_in_one_thread_after_another_is_allowed() -> None:
    first, second = Trained(), Trained()
    for trained in (first, second, first):
        thread = threading.Thread(target=trained.step)
        before = trained.values()
        thread.start()
        thread.join()
        assert any(not torch.equal(a, b) for a, b in zip(before, trained.values()))


@pytest.mark.parametrize("same", [True, False])
def test_a_draw_while_another_thread_takes_a_step_is_refused(same: bool) -> None:
    trained = Trained()
    served = trained if same else Trained()
    with within(trained, trained.step) as errors:
        with pytest.raises(RuntimeError, match=f"'trainer' {REFUSED}"):
            draw_latents(served.model, served.guide, {})
        with pytest.raises(RuntimeError, match=REFUSED):
            served.model.latent_sites()
    assert not errors and not messengers()
    predict(served.model, served.guide, [{"x": torch.randn(2, 5)}])


def test_predict_waits_for_a_step_or_is_refused_and_is_never_wrong() -> None:
    trained, served = Trained(), Trained()
    x, outcomes = torch.randn(2, 5), list[Any]()
    right = predict(served.model, served.guide, [{"x": x}]).probs

    def ask() -> None:
        try:
            probs = predict(served.model, served.guide, [{"x": x}]).probs
            outcomes.append(torch.equal(probs, right))
        except RuntimeError as error:
            outcomes.append(REFUSED in str(error))

    with within(trained, trained.step) as errors:
        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(0.1)
        assert asking.is_alive()  # it waits
    asking.join(20)
    assert outcomes == [True] and not errors and not messengers()


def test_a_model_called_while_another_thread_runs_predictive_is_refused() -> None:
    first, second = Trained(), Trained()
    program = Predictive(first.model, guide=first.guide, num_samples=2)
    with within(first, lambda: program(x=torch.randn(2, 5))) as errors:
        with pytest.raises(RuntimeError, match=f"'trainer' {REFUSED}"):
            second.model(x=torch.randn(2, 5))
    assert not errors and not messengers()


def test_a_handler_that_another_thread_enters_meanwhile_is_seen() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with contextlib.suppress(IndexError):  # Pyro's, where its handler is gone
            with Messenger():
                entered.set()
                leave.wait(20)

    thread = threading.Thread(target=other)
    with pytest.raises(RuntimeError, match=f"'unknown' {REFUSED}"):
        with alone_in_pyro():
            thread.start()
            entered.wait(20)
    assert not messengers()
    leave.set()
    thread.join()


def test_an_error_within_the_block_stays_itself() -> None:
    with pytest.raises(ValueError, match="mine"):
        with alone_in_pyro(), pyro.poutine.trace():
            raise ValueError("mine")
    assert not messengers()


def test_other_threads_of_a_process_are_no_hindrance() -> None:
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait)
    thread.start()
    Trained().step()
    leave.set()
    thread.join()
