"""A user's likelihood trains with three methods; a missing one is named."""

from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch
from nets import perceptron
from pyro import distributions as dist
from pyro.infer import SVI
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods import Categorical, data_plate, samples_first
from lrvd_pyro.models import FactorLoRA, GateLoRA


class Poisson:
    """A likelihood of counts: the three methods and nothing else."""

    def __call__(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        rate = predictions.squeeze(1).exp()
        with data_plate(len(rate), labels, num_data):
            pyro.sample("labels", dist.Poisson(rate), obs=labels)

    def summarize(self, predictions: Tensor) -> dict[str, Tensor]:
        rates = predictions.squeeze(2).exp()
        return {"rate": rates.mean(0), "samples": rates.T}

    def collect(self, fields: dict[str, Tensor]) -> Any:
        return SimpleNamespace(**samples_first(fields))


def counts() -> tuple[GateLoRA, RankDiagonal, dict[str, Tensor]]:
    net = perceptron(r=2)
    net.base_model.model.out.base_layer.weight.data *= 0.1
    x = torch.randn(40, 5)
    model = GateLoRA(Mean(net).net, likelihood=Poisson(), num_data=40)
    return model, RankDiagonal(model), {"x": x, "labels": torch.poisson(x[:, 0].exp())}


class Mean:
    """The perceptron, reduced to the first of its three outputs."""

    def __init__(self, net: Any) -> None:
        base = net.base_model.model
        forward = base.forward
        base.forward = lambda x: forward(x)[:, :1]
        self.net = net


def test_three_methods_train_and_predict() -> None:
    model, guide, batch = counts()
    svi = SVI(model, guide, lrvd.optim.AdamW(lr=1e-2), loss=lrvd.RankELBO())
    losses = [svi.step(**batch) for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    inputs = [{"x": batch["x"][:7]}, {"x": batch["x"][7:10]}]
    found = lrvd.predict(model, guide, inputs, 5, return_samples=True)
    assert found.samples.shape == (5, 10)
    torch.testing.assert_close(found.samples.mean(0), found.rate)


def test_a_capability_that_is_missing_is_named_with_who_needs_it() -> None:
    model, guide, batch = counts()
    message = r"predict\(..., method=\"linearized\"\) needs .*contrasts and .*Poisson"
    with pytest.raises(TypeError, match=message):
        lrvd.predict(model, guide, [{"x": batch["x"]}], method="linearized")
    point = lrvd.guides.laplace(
        GateLoRA(
            model.base_net,
            prior=lrvd.priors.Normal(),
            likelihood=Poisson(),
            num_data=40,
        )
    )
    point(**batch)
    with pytest.raises(TypeError, match="Fisher information .*fisher_roots, which Poi"):
        point.laplace_approximation([batch])


class CallAlone:
    def __call__(self, *_: Any) -> None: ...


class NoMethods(CallAlone):
    """It has the names of the methods, for something else."""

    summarize, collect = "mean", None


@pytest.mark.parametrize("family", [GateLoRA, FactorLoRA])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("x", r"'x', which lacks \['__call__', 'summarize', 'collect'\]"),
        (CallAlone(), r"which lacks \['summarize', 'collect'\]"),
        (NoMethods(), r"which lacks \['summarize', 'collect'\]"),
        (lambda *_: None, r"which lacks \['summarize', 'collect'\]"),
        (Categorical, "a class and not an object; .*likelihoods.Categorical()"),
    ],
)
def test_what_is_not_a_likelihood_is_refused_when_the_model_is_made(
    family: Any, wrong: Any, message: str
) -> None:
    net = perceptron()
    with pytest.raises(TypeError, match=message):
        family(net, likelihood=wrong, num_data=9)
