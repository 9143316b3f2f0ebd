"""One draw per example where the rows allow it; else one draw per batch, or none."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import mixed
import nets
import pyro
import pytest
import torch
from mixed import MIXED, Batch, Make, single, texts
from nets import lora
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn

from lrvd_pyro import RankELBO
from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.inference import PerExample
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.optim import AdamW
from lrvd_pyro.selection import select

close = torch.testing.assert_close
INSTEAD = "RankELBO draws once per batch instead"
NUM_DATA = 20
FAMILIES: list[tuple[Any, Any]] = [
    (GateLoRA, RankDiagonal),
    (FactorLoRA, TiedDiagonal),
]


def alone(model: Any, draws: Tensor, batch: Batch) -> Tensor:
    """The log likelihood of the data set, each example run with its draw and alone."""
    total = torch.zeros(())
    for i, draw in enumerate(draws):
        row = single(batch, i)
        labels = row.pop("labels")
        with model.bind(draw):
            predictions = model.predictions(**row)
        total = total + predictions.log_softmax(-1)[0, labels].sum()
    return total * NUM_DATA / len(draws)


def drawn(guide: Any, batch: Batch, seed: int, size: int | None) -> Tensor:
    """The draws that a loss with this seed takes."""
    pyro.set_rng_seed(seed)
    wrapped = PerExample(size)(guide) if size else guide
    value: Tensor = next(iter(wrapped(**batch).values()))
    return value if size else value.expand(len(batch["labels"]), *value.shape)


def gradients(loss: Tensor, guide: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(guide.parameters())))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f[0].__name__)
@pytest.mark.parametrize("make", MIXED, ids=lambda make: make.__name__)
def test_log_likelihood_and_gradient_are_those_of_examples_alone(
    make: Make, family: Any
) -> None:
    model = family[0](make(), num_data=NUM_DATA)
    guide, batch = family[1](model, init_log_alpha=0.0), texts()
    elbo = RankELBO(kl_weight=0.0)
    name = MIXED[make].replace(".", r"\.")
    with pytest.warns(UserWarning, match=f"LoRA layer '{name}'.*{INSTEAD}"):
        elbo.differentiable_loss(model, guide, **batch)
    pyro.set_rng_seed(7)
    found = elbo.differentiable_loss(model, guide, **batch)
    expected = -alone(model, drawn(guide, batch, 7, None), batch)
    close(found, expected)
    for a, b in zip(gradients(found, guide), gradients(expected, guide)):
        assert b.abs().max() > 0
        close(a, b)


WELL: dict[str, Callable[[], Any]] = {
    "bert": nets.bert,
    "perceptron": lambda: lora(Bag(), target_modules=["hidden", "out"]),
}


class Bag(nets.Perceptron):
    """A perceptron on token ids."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids[:, :5].to(self.out.weight) / 50)


@pytest.mark.parametrize("noise", ["auto", "example"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f[0].__name__)
@pytest.mark.parametrize("make", WELL.values(), ids=WELL)
def test_each_example_keeps_a_draw_of_its_own_where_rows_are_its_own(
    make: Any, family: Any, noise: Any
) -> None:
    model = family[0](make(), num_data=NUM_DATA)
    guide, batch = family[1](model, init_log_alpha=0.0), texts()
    elbo = RankELBO(kl_weight=0.0, noise=noise)
    elbo.differentiable_loss(model, guide, **batch)
    pyro.set_rng_seed(7)
    found = elbo.differentiable_loss(model, guide, **batch)
    draws = drawn(guide, batch, 7, len(batch["labels"]))
    assert not torch.equal(draws[0], draws[1])
    close(found, -alone(model, draws, batch))


@pytest.mark.parametrize("make", MIXED, ids=lambda make: make.__name__)
def test_a_draw_per_example_that_was_asked_for_is_refused_by_name(make: Make) -> None:
    model = GateLoRA(make(), num_data=NUM_DATA)
    svi = SVI(model, RankDiagonal(model), AdamW(), RankELBO(noise="example"))
    with pytest.raises(ValueError) as error:
        svi.step(**texts())
    assert f"LoRA layer {MIXED[make]!r}" in str(error.value)
    assert 'RankELBO(noise="batch")' in str(error.value)


def trained(net: Any, noise: Any, batches: list[Batch]) -> list[float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    model = GateLoRA(net, num_data=NUM_DATA)
    guide = RankDiagonal(model)
    svi = SVI(model, guide, AdamW(lr=1e-2), RankELBO(noise=noise))
    return [float(svi.step(**batch)) for batch in batches]


def test_the_check_moves_no_random_number_and_warns_once() -> None:
    net, batches = mixed.deberta(randomize=False), [texts() for _ in range(4)]
    plain = trained(copy.deepcopy(net), "batch", batches)
    with pytest.warns(UserWarning, match=INSTEAD) as said:
        assert trained(net, "auto", batches) == plain
    assert len(said) == 1


def test_the_check_costs_two_passes_at_the_first_step_alone() -> None:
    model, batch = GateLoRA(nets.bert(), num_data=60), nets.tokens()
    passes: list[int] = []
    model.base_net.register_forward_pre_hook(lambda *_: passes.append(1))
    svi = SVI(model, RankDiagonal(model), AdamW(), RankELBO())
    counts = []
    for _ in range(3):
        svi.step(**batch)
        counts.append(len(passes))
    assert counts == [3, 4, 5]


def test_one_example_proves_nothing_and_draws_for_itself() -> None:
    model = GateLoRA(mixed.pairs(), num_data=NUM_DATA)
    guide, batch = RankDiagonal(model, init_log_alpha=0.0), texts()
    elbo = RankELBO(kl_weight=0.0)
    one = single(batch, 0)
    pyro.set_rng_seed(7)
    found = elbo.differentiable_loss(model, guide, **one)
    close(found, -alone(model, drawn(guide, one, 7, 1), one))
    with pytest.warns(UserWarning, match=INSTEAD):
        elbo.differentiable_loss(model, guide, **batch)


def test_handlers_around_a_model_hide_nothing() -> None:
    model = GateLoRA(mixed.pairs(), num_data=NUM_DATA)
    scaled = poutine.scale(model, scale=1.0)
    with pytest.warns(UserWarning, match=INSTEAD):
        RankELBO().differentiable_loss(scaled, RankDiagonal(model), **texts())


@pytest.mark.parametrize("call", ["module", "evaluation", "inference"])
def test_the_torch_driver_and_evaluations_look_as_well(call: str) -> None:
    model = switching()
    model.base_net.train()
    guide, elbo = RankDiagonal(model), RankELBO()
    with pytest.warns(UserWarning, match=INSTEAD):
        if call == "module":
            elbo(model, guide)(**texts()).backward()
        else:
            with torch.inference_mode(call == "inference"):
                batch = texts()
                batch["input_ids"] = batch["input_ids"] * 1.0
                elbo.loss(model, guide, **batch)


class Switching(nn.Module):
    """Rows in another order while training, or for another input, or in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, turned: Tensor | None = None) -> Tensor:
        x = input_ids.to(self.first.weight) / 50
        turn = self.training or turned is not None
        h = self.first(x.flip(0)).flip(0) if turn else self.first(x)
        logits: Tensor = self.second(h)
        return logits


def switching() -> GateLoRA:
    net = lora(Switching(), target_modules=["first", "second"]).eval()
    return GateLoRA(net, num_data=NUM_DATA)


def test_each_setting_is_looked_at_training_and_evaluation_apart() -> None:
    model, batch = switching(), texts()
    guide, elbo = RankDiagonal(model), RankELBO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elbo.loss(model, guide, **batch)
    model.base_net.train()
    with pytest.warns(UserWarning, match="'first' the draw of one example moves"):
        elbo.loss(model, guide, **batch)


def test_other_inputs_are_another_setting() -> None:
    model, batch = switching(), texts()
    assert model.mixed_rows(batch) == ""
    assert "'first'" in model.mixed_rows(batch | {"turned": torch.ones(4)})
    assert model.mixed_rows(batch) == ""


def test_after_pruning_the_modules_that_are_left_decide() -> None:
    model, batch = switching(), texts()
    model.base_net.train()
    guide = RankDiagonal(model)
    assert "'first'" in model.mixed_rows(batch)
    second = torch.tensor([m == "second" for m in model.space.coordinates["module"]])
    select(model, guide, keep=second)
    assert model.mixed_rows(batch) == ""


class Dropping(nn.Module):
    """A layer that training drops at first, and which sees rows in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.passes = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        h = input_ids.to(self.layers[0].weight) / 50
        h = self.layers[0](h)
        self.passes += self.training
        if not self.training or self.passes > 2:
            h = self.layers[1](h.flip(0)).flip(0)
        return h[:, :2]


def test_a_layer_that_was_dropped_at_first_is_looked_at_once_it_runs() -> None:
    net = lora(Dropping(), target_modules=["0", "1"]).train()
    model, batch = GateLoRA(net, num_data=NUM_DATA), texts()
    found = [model.mixed_rows(batch) for _ in range(3)]
    assert found[0] == "" and "'layers.1'" in found[2]


def test_dora_draws_per_batch_and_its_layer_is_named() -> None:
    model = GateLoRA(nets.bert(use_dora=True), num_data=NUM_DATA)
    guide, batch = RankDiagonal(model, init_log_alpha=0.0), texts()
    elbo = RankELBO(kl_weight=0.0)
    with pytest.warns(UserWarning, match=rf"the DoRA layer 'bert\S+' takes.*{INSTEAD}"):
        elbo.differentiable_loss(model, guide, **batch)
    pyro.set_rng_seed(7)
    found = elbo.differentiable_loss(model, guide, **batch)
    close(found, -alone(model, drawn(guide, batch, 7, None), batch))
    with pytest.raises(ValueError, match='the DoRA layer \'bert.*noise="batch"'):
        RankELBO(noise="example").loss(model, guide, **batch)
