"""A server predicts from several threads: right or refused, and nothing stays bound."""

import asyncio
import contextlib
import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import nets
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from lrvd_pyro import posterior_mean, posterior_sample, predict
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA

FOREIGN = "a draw belongs to the thread that binds it"


def served(net: PeftModel | None = None) -> tuple[GateLoRA, RankDiagonal]:
    model = GateLoRA(net or nets.perceptron(), num_data=8)
    return model, RankDiagonal(model, init_log_alpha=0.0)


def in_threads(*works: Callable[[], object]) -> list[BaseException]:
    """Run functions in a thread each; the errors that they raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return errors


def answers(model: GateLoRA, guide: RankDiagonal) -> dict[str, Callable[[], Tensor]]:
    """Each way to predict, at draws of its own."""
    batch = {"x": torch.randn(3, 5)}

    def sampled() -> Tensor:
        with torch.no_grad(), posterior_sample(model, guide, seed=3) as net:
            return net(**batch)

    def mean() -> Tensor:
        with torch.no_grad(), posterior_mean(model, guide) as net:
            return net(**batch)

    def linearized() -> Tensor:
        return predict(model, guide, [batch], method="linearized").probs

    return {
        "sampled": sampled,
        "mean": mean,
        "linearized": linearized,
        "predict": lambda: predict(model, guide, [batch], 4, seed=1).probs,
        "other seed": lambda: predict(model, guide, [batch], 4, seed=2).probs,
    }


def wrong_of(rounds: int, ways: list[Callable[[], Tensor]]) -> Counter[str]:
    """Four threads that predict in all ways, each in another order, and their count."""
    right, count = [way() for way in ways], Counter[str]()

    def serve(first: int) -> None:
        for step in range(rounds):
            which = (first + step) % len(ways)
            same = torch.equal(ways[which](), right[which])
            count["right" if same else "wrong"] += 1

    errors = in_threads(*[lambda n=n: serve(n) for n in range(4)])
    assert not errors, errors
    return count


def test_four_threads_predict_a_thousand_times_and_none_is_wrong() -> None:
    model, guide = served()
    net, x = model.base_net.train(), torch.randn(2, 5)
    ways = [*answers(model, guide).values()]
    plain, state = net(x), torch.get_rng_state()
    count = wrong_of(250, ways)
    assert count == {"right": 1000}
    assert model.space.binding.bank.parts is None
    assert torch.equal(net(x), plain)
    assert all(m.training for m in net.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_two_models_on_one_network_predict_in_threads() -> None:
    net = nets.perceptron()
    ways = [way for _ in "ab" for way in answers(*served(net)).values()]
    assert wrong_of(25, ways) == {"right": 100}


def test_models_on_different_networks_share_the_random_state_without_harm() -> None:
    ways = [way for _ in "ab" for way in answers(*served()).values()]
    assert wrong_of(25, ways) == {"right": 100}


def test_bert_with_its_prefix_predicts_in_threads() -> None:
    model, guide = served(nets.bert())
    batches = [nets.tokens(n, labels=False) for n in (2, 3)]
    ways = [lambda b=b: predict(model, guide, [b], 4).probs for b in batches]
    assert wrong_of(6, ways) == {"right": 24}


def test_a_pass_without_a_draw_beside_predictions_is_plain_or_refused() -> None:
    model, guide = served()
    net, x = model.base_net.eval(), torch.randn(3, 5)
    plain, count = net(x).detach(), Counter[str]()
    answer = answers(model, guide)["predict"]
    right, done = answer(), threading.Event()

    def passes() -> None:
        while not done.is_set():
            try:
                count["plain" if torch.equal(net(x), plain) else "wrong"] += 1
            except RuntimeError as error:
                assert FOREIGN in str(error)
                count["refused"] += 1

    def serve() -> None:
        try:
            for _ in range(100):
                assert torch.equal(answer(), right)
        finally:
            done.set()

    assert not in_threads(passes, serve)
    assert count["wrong"] == 0 and count["refused"] > 0
    assert torch.equal(net(x), plain)


def test_a_thread_started_within_a_block_is_refused_and_not_answered_plainly() -> None:
    model, guide = served()
    x = torch.randn(2, 5)
    with posterior_sample(model, guide, seed=0) as net:
        expected = net(x)
        (error,) = in_threads(lambda: net(x))
        assert torch.equal(net(x), expected)
    with pytest.raises(RuntimeError, match=FOREIGN):
        raise error
    assert not in_threads(lambda: net(x))


def test_a_refused_pass_does_not_count_as_one_that_reached_the_layers() -> None:
    model, guide = served()
    with posterior_sample(model, guide, seed=0) as net:
        assert len(in_threads(lambda: net(torch.randn(2, 5)))) == 1
    predict(model, guide, [{"x": torch.randn(2, 5)}])


def stream(model: GateLoRA, guide: RankDiagonal, x: Tensor) -> Iterator[Tensor]:
    with posterior_sample(model, guide, seed=0) as net:
        while True:
            yield net(x)


def test_a_block_that_another_thread_closes_leaves_nothing_bound() -> None:
    model, guide = served()
    x = torch.randn(2, 5)
    plain = model.base_net(x)
    chunks = stream(model, guide, x)
    assert not torch.equal(next(chunks), plain)
    assert not in_threads(chunks.close)
    assert torch.equal(model.base_net(x), plain)
    assert not in_threads(lambda: predict(model, guide, [{"x": x}]))


def test_a_block_that_fails_in_a_thread_leaves_nothing_bound() -> None:
    model, guide = served()
    x = torch.randn(2, 5)
    plain = model.base_net(x)

    def fail() -> None:
        with posterior_sample(model, guide, seed=0):
            raise ZeroDivisionError

    assert len(in_threads(fail, fail)) == 2
    assert torch.equal(model.base_net(x), plain)
    assert not in_threads(lambda: predict(model, guide, [{"x": x}]))


def test_an_await_within_a_block_is_refused_to_other_tasks() -> None:
    model, guide = served()
    batch = {"x": torch.randn(2, 5)}
    right = predict(model, guide, [batch]).probs

    async def hold() -> None:
        with posterior_sample(model, guide, seed=0):
            await asyncio.sleep(0.05)

    async def ask() -> Any:
        return predict(model, guide, [batch]).probs

    async def both() -> list[Any]:
        return await asyncio.gather(hold(), ask(), return_exceptions=True)

    _, refused = asyncio.run(both())
    with pytest.raises(RuntimeError, match="another asyncio task .*asyncio.to_thread"):
        raise refused
    assert torch.equal(predict(model, guide, [batch]).probs, right)


def test_tasks_that_predict_by_to_thread_are_right() -> None:
    model, guide = served()
    batch = {"x": torch.randn(2, 5)}
    right = predict(model, guide, [batch]).probs

    async def all_of_them() -> list[Any]:
        calls = (asyncio.to_thread(predict, model, guide, [batch]) for _ in range(20))
        return await asyncio.gather(*calls)

    assert all(torch.equal(p.probs, right) for p in asyncio.run(all_of_them()))


def test_to_arviz_beside_predictions_gives_its_own_draws() -> None:
    pytest.importorskip("arviz")
    from lrvd_pyro import to_arviz

    model, guide = served()
    batch = {"x": torch.randn(3, 5), "labels": torch.tensor([0, 1, 2])}

    def likelihoods() -> Tensor:
        data = to_arviz(model, guide, [batch], 5)
        return torch.tensor(data.log_likelihood.labels.values)

    with contextlib.suppress(FutureWarning):
        ways = [likelihoods, answers(model, guide)["predict"]]
        assert wrong_of(6, ways) == {"right": 24}


def test_a_stream_that_waits_for_another_thread_holds_no_turn() -> None:
    """A pipeline: one model's batches are what another thread has predicted."""
    first, second = served(), served()
    ready: queue.Queue[Tensor] = queue.Queue()

    def produce() -> None:
        for _ in range(3):
            batch = {"x": torch.randn(3, 5)}
            ready.put(predict(*first, [batch], 2).probs)

    def consume() -> None:
        stream = ({"x": F.pad(ready.get(timeout=30), (0, 2))} for _ in range(3))
        assert len(predict(*second, stream, 2).probs) == 9

    assert not in_threads(consume, produce)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_forked_while_another_thread_has_the_turn_predicts() -> None:
    model, guide = served()
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with posterior_sample(model, guide, seed=0):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(60)
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        other, its = served()
        os._exit(
            int(len(predict(other, its, [{"x": torch.randn(3, 5)}], 2).probs) != 3)
        )
    _, status = os.waitpid(child, 0)
    leave.set()
    thread.join()
    assert status == 0
