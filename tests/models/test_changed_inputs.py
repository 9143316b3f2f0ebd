"""Inputs that a forward pass changes: each pass sees them as the caller gave them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from changing import (
    CASES,
    SIZE,
    Changing,
    Counter,
    bits,
    by_hand,
    cached,
    changing,
    llama,
    made,
)
from pyro.infer import SVI
from torch import Tensor, nn
from transformers import DynamicCache

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods import Categorical
from lrvd_pyro.models import FactorLoRA, GateLoRA

close = torch.testing.assert_close
SHARED = "ignore:.*cannot share passes between draws:UserWarning"
pytestmark = pytest.mark.filterwarnings(SHARED)


@pytest.mark.parametrize("kind", [GateLoRA, FactorLoRA])
@pytest.mark.parametrize("case", CASES)
def test_every_draw_of_predict_sees_the_inputs_as_they_were(
    case: str, kind: Any
) -> None:
    net, batch = made(case)
    model = kind(net, num_data=SIZE)
    start = next(iter(model.start().values()))
    draws = start * (1 + 0.5 * torch.randn(5, len(start)))
    before = bits(batch)
    name = "gate" if kind is GateLoRA else "factor"
    options: Any = {"posterior_samples": {name: draws}, "return_samples": True}
    found = [lrvd.predict(model, None, [batch], **options).samples for _ in range(2)]
    expected = torch.stack([by_hand(model, z, batch).softmax(-1) for z in draws])
    for samples in found:
        close(samples, expected, rtol=1e-7, atol=1e-9)
    assert bits(batch) == before
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def linearized(model: Any, guide: Any, batch: Any) -> Tensor:
    probs: Tensor = lrvd.predict(model, guide, [batch], method="linearized").probs
    return probs


def called(model: Any, guide: Any, batch: Any) -> Tensor:
    torch.manual_seed(1)
    logits: Tensor = model(**batch)
    return logits.detach()


def inferred(model: Any, guide: Any, batch: Any) -> Tensor:
    labels = torch.arange(SIZE) % 3
    data = lrvd.to_arviz(model, guide, [{**batch, "labels": labels}], 5)
    return torch.as_tensor(data.log_likelihood.labels.values)


def moments(model: Any, guide: Any, batch: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return lrvd.gauge.gramians(model, [batch], generator=generator).gate_fisher


def objective(model: Any, guide: Any, batch: Any) -> Tensor:
    torch.manual_seed(1)
    labels = torch.arange(SIZE) % 3
    elbo = lrvd.RankELBO(num_particles=3)
    return elbo.differentiable_loss(model, guide, **batch, labels=labels).detach()


USERS = [linearized, called, inferred, moments, objective]


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("case", CASES)
def test_a_second_call_gives_what_the_first_gave(
    case: str, user: Callable[[Any, Any, Any], Tensor]
) -> None:
    net, batch = made(case)
    model = GateLoRA(net.eval(), num_data=SIZE)
    guide = RankDiagonal(model)
    before = bits(batch)
    first = user(model, guide, batch)
    close(user(model, guide, batch), first, rtol=0, atol=0)
    assert bits(batch) == before and first.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_bayesianize_and_steps_leave_the_batch_as_it_was(case: str) -> None:
    net, batch = made(case)
    before = bits(batch)
    model, guide = lrvd.gauge.bayesianize(
        net, [batch], likelihood=Categorical(), num_data=SIZE
    )
    svi = SVI(model, guide, lrvd.optim.AdamW(), lrvd.RankELBO())
    for _ in range(2):
        svi.step(**batch, labels=torch.arange(SIZE) % 3)
    assert bits(batch) == before


def test_the_repetition_of_a_first_pass_sees_the_inputs_as_they_were() -> None:
    class Dropping(Changing):
        def forward(self, x: Tensor, state: Any = None) -> Tensor:  # type: ignore[override]
            state.pop()
            assert state == ["first"], "the repetition has what the first pass left"
            return super().forward(x) if not self.training else self.out(x[:, :1] + 0)

    net = Dropping(features=5, hidden=1)
    model = GateLoRA(nets.lora(net, target_modules=["hidden", "out"]), num_data=SIZE)
    state = ["first", "second"]
    model.net.train()
    model(x=torch.randn(SIZE, 5), state=state)
    assert state == ["first", "second"] and not model.space.binding.unreached()


@pytest.mark.parametrize("mode", ["pruned", "merged"])
def test_the_probe_of_an_export_stays_as_it_was(mode: Any, tmp_path: Path) -> None:
    net, batch = made("llama-dynamic")
    model = GateLoRA(net, num_data=SIZE)
    before = bits(batch)
    guide = RankDiagonal(model)
    lrvd.export_peft(tmp_path / "out", model, guide, mode=mode, probe=batch)
    assert bits(batch) == before


class Stateful(nn.Module):
    """Hands an object of its own on, which each later layer changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Start(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, counter = self.first(x)
        counter.calls += 1
        return self.second(x) * counter.calls


class Start(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Counter]:
        return x.tanh(), Counter()


def test_what_is_replayed_is_as_it_was_recorded() -> None:
    net = nets.lora(Stateful(), target_modules=["second"])
    model = GateLoRA(net, num_data=SIZE)
    draws = 1 + torch.randn(5, model.space.size)
    batch = {"x": torch.randn(SIZE, 5)}
    expected = torch.stack([by_hand(model, z, batch).softmax(-1) for z in draws])
    samples = {"gate": draws}
    found = lrvd.predict(
        model, None, [batch], posterior_samples=samples, return_samples=True
    )
    close(found.samples, expected, rtol=1e-7, atol=1e-9)


def test_gradients_reach_tensors_that_the_caller_gave() -> None:
    model = GateLoRA(changing(), num_data=SIZE)
    for kind in (torch.randn(SIZE, 5).requires_grad_(), nn.Parameter(torch.ones(4, 5))):
        with model.bind(model.space.ones()):
            model.predictions(x=kind).sum().backward()
        assert kind.grad is not None and kind.grad.abs().max() > 1e-3


def test_a_cache_that_has_a_graph_is_copied_with_it() -> None:
    base = llama()
    batch = cached(base, DynamicCache, with_graph=True)
    model = GateLoRA(nets.lora(base, target_modules=["v_proj"]), num_data=SIZE)
    keys = batch["past_key_values"].layers[0].keys
    with model.bind(model.space.ones()):
        logits = model.predictions(**batch)
    (gradient,) = torch.autograd.grad(logits.sum(), keys)
    assert gradient.abs().max() > 0 and batch["past_key_values"].layers[0].keys is keys


def test_what_cannot_be_copied_is_refused_by_name() -> None:
    model = GateLoRA(changing(), num_data=SIZE)
    guide = RankDiagonal(model)
    batch = {"x": torch.randn(SIZE, 5), "state": (i for i in range(9))}
    with pytest.raises(TypeError, match="'state' is a generator, which cannot be co"):
        model(**batch)
    with pytest.raises(TypeError, match="tensors, lists or dicts, or give its class"):
        lrvd.predict(model, guide, [batch])


class Prompted(nets.Perceptron):
    """It takes a module as an input."""

    def forward(self, x: Tensor, prompt: nn.Module) -> Tensor:
        logits: Tensor = super().forward(prompt(x))
        return logits


def test_a_module_among_the_inputs_trains() -> None:
    net = nets.lora(Prompted(), target_modules=["hidden"])
    model, prompt = GateLoRA(net, num_data=SIZE), nn.Linear(5, 5)
    model.predictions(x=torch.randn(SIZE, 5), prompt=prompt).sum().backward()
    assert prompt.weight.grad is not None and prompt.weight.grad.abs().max() > 0
