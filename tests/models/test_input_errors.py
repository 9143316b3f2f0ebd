"""Errors about a batch: the message as it was written, whoever runs the model."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from nets import bert, tokens
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.inference.input_errors import InputError

SHAPES = "Trace Shapes:"


def by_svi(model: Any, batch: Any) -> None:
    guide = lrvd.guides.RankDiagonal(model)
    SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO()).step(**batch)


def by_autoguide(model: Any, batch: Any) -> None:
    guide = lrvd.guides.multivariate_normal(model)
    SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO()).step(**batch)


def by_torch(model: Any, batch: Any) -> None:
    lrvd.RankELBO()(model, lrvd.guides.RankDiagonal(model))(**batch)


def by_predictive(model: Any, batch: Any) -> None:
    guide = lrvd.guides.RankDiagonal(model)
    Predictive(model, guide=guide, num_samples=2)(**batch)


def by_nuts(model: Any, batch: Any) -> None:
    options = dict(num_samples=1, warmup_steps=1, disable_progbar=True)
    MCMC(NUTS(model), **options).run(**batch)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a label beyond the classes": (
        lambda b: b | {"labels": b["labels"] * 0 + 9},
        "labels lie in 9 .. 9 but the network has 3 classes; expected 0 .. 2: load it "
        "with num_labels=10",
    ),
    "labels of two dimensions": (
        lambda b: b | {"labels": b["labels"][:, None]},
        "labels have shape (8, 1) and logits (8, 3); expected one label per row of "
        "logits",
    ),
    "Transformers' own": (
        lambda b: {k: v for k, v in b.items() if k != "input_ids"},
        "You must specify exactly one of input_ids or inputs_embeds",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "run", [by_svi, by_autoguide, by_torch, by_predictive, by_nuts]
)
def test_an_input_error_is_its_message_and_no_shapes(run: Any, wrong: str) -> None:
    model = lrvd.models.GateLoRA(bert(), prior=lrvd.priors.Normal(), num_data=8)
    spoil, message = WRONG[wrong]
    batch = spoil(dict(tokens(8)))
    with pytest.raises(ValueError) as caught:
        run(model, batch)
    assert str(caught.value).startswith(message) and SHAPES not in str(caught.value)


@pytest.mark.parametrize("run", [by_svi, by_predictive])
def test_an_error_of_the_forward_pass_is_its_message_and_no_shapes(run: Any) -> None:
    net = bert()
    model = lrvd.models.GateLoRA(net, prior=lrvd.priors.Normal(), num_data=8)
    net.merge_adapter()
    with pytest.raises(RuntimeError, match="so no draw can enter") as caught:
        run(model, dict(tokens(8)))
    assert SHAPES not in str(caught.value)


class OwnLikelihood(lrvd.likelihoods.Categorical):
    """A plate of the wrong size around the labels."""

    def __call__(self, predictions: Tensor, labels: Any, num_data: int) -> None:
        with pyro.plate("data", 5):
            pyro.sample("labels", pyro.distributions.Categorical(logits=predictions))


def test_what_is_wrong_with_a_site_keeps_its_shapes() -> None:
    """The twin: there the shapes are what helps."""
    model = lrvd.models.GateLoRA(bert(), likelihood=OwnLikelihood(), num_data=8)
    with pytest.raises(ValueError, match=SHAPES):
        by_predictive(model, dict(tokens(8)))


def test_an_error_of_another_class_keeps_its_class() -> None:
    class Refused(ValueError):
        pass

    def refuse(*args: object, **options: object) -> None:
        raise Refused("no")

    net = bert()
    model = lrvd.models.GateLoRA(net, num_data=8)
    net.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(Refused, match="no"):
        by_svi(model, dict(tokens(8)))


def test_the_error_still_points_at_the_line_that_raised_it() -> None:
    model = lrvd.models.GateLoRA(bert(), num_data=8)
    batch = dict(tokens(8)) | {"labels": torch.full((8,), 9)}
    with pytest.raises(InputError) as caught, poutine.trace():
        model(**batch)
    assert caught.traceback[-1].name == "_check"
