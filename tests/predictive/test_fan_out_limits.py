"""Networks that cannot share passes between draws, and what sharing must not change."""

import warnings
from typing import Any

import pytest
import torch
from blocks import draws, encoder, model_of, padded, upper_only
from nets import CLASSES, lora, perceptron
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.models.singles import resolution
from lrvd_pyro.predictive.fan_out import FanOut, fanned_out, looped, trial

close = torch.testing.assert_close


class Mixer(nn.Module):
    """A network whose rows see each other."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(5, 6), nn.Linear(6, CLASSES)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "few" and len(x) > 5:
            raise ValueError("more than five rows")
        h = self.hidden(x).tanh()
        return self.out(h - h.mean(0) if self.kind == "mixed" else h)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mixed", r"its predictions would differ by \d"),
        ("few", "ValueError: more than five rows"),
    ],
)
def test_a_network_that_cannot_is_looped_over_and_said_so_once(
    kind: str, reason: str
) -> None:
    net = lora(Mixer(kind), target_modules=["out", "hidden"])
    model = GateLoRA(net, num_data=9)
    guide = RankDiagonal(model, init_log_alpha=0.0)
    batch = {"x": torch.randn(4, 5)}
    with pytest.warns(match=rf"Mixer cannot share passes between draws \({reason}"):
        p = lrvd.predict(model, guide, [batch], 6, return_samples=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = lrvd.predict(model, guide, [batch], 6, return_samples=True)
    torch.manual_seed(0)
    drawn = [model.value_at(guide()) for _ in range(6)]
    with torch.no_grad():
        close(p.samples, looped(model, drawn, batch).softmax(-1))
    close(p.samples, again.samples)


def nudge(model: GateLoRA) -> None:
    """Let B differ from 0."""
    with torch.no_grad():
        for weight in model.space.weights("lora_B"):
            nn.init.normal_(weight, std=0.3)


def test_a_trial_of_an_adapter_that_does_nothing_yet_proves_nothing() -> None:
    net = lora(Mixer("mixed"), randomize=False, target_modules=["out", "hidden"])
    model, batch = GateLoRA(net, num_data=9), {"x": torch.randn(4, 5)}
    guide = RankDiagonal(model, init_log_alpha=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrvd.predict(model, guide, [batch], 6)
    nudge(model)
    with pytest.warns(match="its predictions would differ by"):
        lrvd.predict(model, guide, [batch], 6)


def test_rows_that_see_each_other_are_seen_in_half_precision() -> None:
    torch.set_default_dtype(torch.float32)
    for kind, alone in (("mixed", False), ("plain", True)):
        net = lora(Mixer(kind), target_modules=["out", "hidden"])
        model, batch = GateLoRA(net, num_data=9), {"x": torch.randn(4, 5)}
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found = str(trial(model, draws(model, 3), batch, 2))
        assert "would differ" not in found if alone else "would differ" in found


class Anchored(nn.Module):
    """Compares its rows with constant ones that are given beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, 6)

    def forward(self, x: Tensor, anchors: Tensor) -> Tensor:
        return self.hidden(x) @ anchors.softmax(0).T[:, :CLASSES]


def test_a_constant_as_long_as_a_later_batch_is_not_taken_for_rows() -> None:
    model = GateLoRA(lora(Anchored(), target_modules=["hidden"]), num_data=12)
    values, anchors = draws(model), torch.randn(4, 6)
    fan_out = FanOut(model, values)
    for size in (8, 4):
        batch = {"x": torch.randn(size, 5), "anchors": anchors}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore" if size == 4 else "error")
            close(fan_out(batch), looped(model, values, batch))


class Graph(nn.Module):
    """Averages over neighbors: a B x B matrix cannot be cut by rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.hidden(x)


def test_a_batch_that_cannot_be_cut_is_looped_over() -> None:
    model = GateLoRA(lora(Graph(), target_modules=["hidden"]), num_data=12)
    batch = {"x": torch.randn(6, 5), "adjacency": torch.rand(6, 6)}
    values = draws(model)
    with torch.no_grad(), pytest.warns(match="Graph cannot share passes"):
        close(FanOut(model, values)(batch), looped(model, values, batch))


def test_running_out_of_memory_is_raised_and_not_remembered() -> None:
    model, batch = GateLoRA(perceptron(), num_data=9), {"x": torch.randn(4, 5)}

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    hook = model.base_net.register_forward_pre_hook(full)
    fan_out = FanOut(model, draws(model))
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        fan_out(batch)
    hook.remove()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        fan_out(batch)


def test_a_compiled_network_takes_whole_passes() -> None:
    model = GateLoRA(perceptron(), num_data=9)
    model.base_net.compile(backend="eager")
    batch = {"x": torch.randn(4, 5)}
    values = draws(model, 3)
    with torch.no_grad(), pytest.warns(match=r"Perceptron cannot .*it is compiled"):
        close(FanOut(model, values)(batch), looped(model, values, batch))


class Twice(nn.Module):
    """One module inside another and beside it, called in both places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.encoder = nn.Sequential(self.embed, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(self.encoder(x)))


def test_a_module_may_be_called_in_several_places() -> None:
    model = GateLoRA(lora(Twice(), target_modules=["out"]), num_data=9)
    values, batch = draws(model), {"x": torch.randn(4, 5)}
    with torch.no_grad():
        close(fanned_out(model, values, batch, 3), looped(model, values, batch))


def test_half_precision_is_no_obstacle() -> None:
    torch.set_default_dtype(torch.float32)
    model, batch = model_of(encoder), padded()
    assert resolution(model) == torch.finfo(torch.float32).eps
    with torch.autocast("cpu", torch.bfloat16):
        assert resolution(model) == torch.finfo(torch.bfloat16).eps
    guide = RankDiagonal(model, init_log_alpha=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        p = lrvd.predict(model, guide, [batch], 8, max_batch=20)
        alone = lrvd.predict(model, guide, [batch], 8, max_batch=1)
    close(p.probs, alone.probs, rtol=0, atol=0.02)


def test_the_network_is_left_as_it_was() -> None:
    model, batch = upper_only(model_of(encoder)), padded()
    before = [dict(m.__dict__) for m in model.base_net.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.base_net.modules()]
    with torch.no_grad():
        fanned_out(model, draws(model), batch, 2)
        model.base_net.base_model.model.classifier.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            fanned_out(model, draws(model), batch, 2)
    del model.base_net.base_model.model.classifier.forward
    after = [dict(m.__dict__) for m in model.base_net.modules()]
    assert [a.keys() for a in after] == [b.keys() for b in before]
    assert [len(m._forward_pre_hooks) for m in model.base_net.modules()] == hooks


def test_a_shared_output_may_be_written_to() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(5, 6), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.hidden(x).mul_(2))

    model = GateLoRA(lora(InPlace(), target_modules=["out"]), num_data=9)
    values, batch = draws(model), {"x": torch.randn(4, 5)}
    with torch.no_grad():
        expected = looped(model, values, batch)
        for copies in (1, 3):
            close(fanned_out(model, values, batch, copies), expected)


def test_max_batch_below_one_is_refused() -> None:
    model = GateLoRA(perceptron(), num_data=9)
    batch = {"x": torch.randn(4, 5)}
    with pytest.raises(
        ValueError, match="max_batch=0; expected a whole number, 1 or more"
    ):
        lrvd.predict(model, RankDiagonal(model), [batch], max_batch=0)


class Absent(Mixer):
    """A choice that no row has, and rows that see each other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tensor([0.0, 0.0, -torch.inf])


@pytest.mark.parametrize("kind", ["mixed", "plain"])
def test_infinite_logits_do_not_end_the_trial(kind: str) -> None:
    model = GateLoRA(lora(Absent(kind), target_modules=["hidden"]), num_data=4)
    values = torch.rand(3, model.space.size) + 0.5
    with torch.no_grad():
        reason = str(trial(model, values, {"x": torch.randn(4, 5)}, 2))
    assert ("predictions would differ" in reason) == (kind == "mixed")
    assert (reason == "") == (kind == "plain")
