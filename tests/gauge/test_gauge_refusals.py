"""What the gauge refuses, by name, with the adapter untouched."""

from typing import Any

import pytest
import torch
from gauges import found, rows, weights
from nets import GROUPED, grouped, lora, perceptron
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import balance, gramians
from lrvd_pyro.models import FactorLoRA, GateLoRA


@pytest.mark.parametrize("name", ["merged", "disabled"])
def test_an_adapter_out_of_work_is_refused_and_untouched(name: str) -> None:
    torch.manual_seed(0)
    net, batch = perceptron(), rows(20, 5)
    grams = found(net, [batch])
    old = [(a.detach().clone(), b.detach().clone()) for a, b in weights(net)]
    net.merge_adapter() if name == "merged" else net.base_model.disable_adapter_layers()
    for refused in (lambda: balance(net, grams), lambda: found(net, [batch])):
        with pytest.raises(RuntimeError, match=f"is {name}"):
            refused()
    for (a, b), (c, d) in zip(old, weights(net)):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_what_gramians_cannot_use_is_refused_by_name() -> None:
    model, batch = GateLoRA(perceptron(), num_data=20), rows(20, 5)
    with pytest.raises(ValueError, match="no batches"):
        gramians(model, [])
    with pytest.raises(TypeError, match="one batch; expected several"):
        gramians(model, batch)
    with pytest.raises(ValueError, match='expected "sampled" or "observed"'):
        gramians(model, [batch], labels="true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='expected "ones" or "subsets"'):
        gramians(model, [batch], gates="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no labels"):
        gramians(model, [batch], labels="observed")
    with pytest.raises(
        TypeError, match="the gauge needs gates, and FactorLoRA draws weights"
    ):
        gramians(FactorLoRA(perceptron(), num_data=3), [batch])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one draw for the whole batch"):
        gramians(GateLoRA(perceptron(use_dora=True), num_data=3), [batch])


def test_a_fisher_over_subsets_has_no_second_moments_to_balance_by() -> None:
    net, batch = perceptron(), rows(20, 5)
    some = gramians(GateLoRA(net, num_data=20), [batch], gates="subsets")
    with pytest.raises(ValueError, match="no second moments to balance by"):
        balance(net, some)


class Rooted(torch.nn.Module):
    """Its derivative at 0 is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x).square().sqrt()


def test_gradients_that_are_not_finite_are_refused() -> None:
    torch.manual_seed(0)
    model = GateLoRA(lora(Rooted(), target_modules=["hidden"]), num_data=20)
    with pytest.raises(ValueError, match="gradients are not finite in LoRA module"):
        gramians(model, [{"x": torch.zeros(4, 5)}])
    with pytest.raises(ValueError, match="predictions are not finite"):
        gramians(model, [{"x": torch.full((4, 5), torch.inf)}])


def test_a_likelihood_that_cannot_sample_is_refused() -> None:
    class Silent(lrvd.likelihoods.Categorical):
        def __call__(self, *_: Any) -> None:
            raise NotImplementedError

    model: Any = GateLoRA(perceptron(), num_data=20, likelihood=Silent())
    with pytest.raises(ValueError, match="draws no site 'labels'"):
        gramians(model, [rows(20, 5)])


def test_second_moments_of_another_network_are_refused() -> None:
    grams = found(perceptron(r=2), [rows(20, 5)])
    net = perceptron()
    old = [a.detach().clone() for a, _ in weights(net)]
    with pytest.raises(ValueError, match="other LoRA modules or ranks"):
        balance(net, grams)
    with pytest.raises(ValueError, match="lengths='free'; expected"):
        balance(net, found(net, [rows(9, 5)]), lengths="free")  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, (b, _) in zip(old, weights(net)))


@pytest.mark.filterwarnings(GROUPED)
def test_a_grouped_convolution_is_refused() -> None:
    net = grouped()
    grams = found(net, [{"x": torch.randn(6, 4, 8, 8)}])
    with pytest.raises(TypeError, match="grouped convolution"):
        balance(net, grams)


def test_an_optimizer_of_unknown_moments_is_refused_before_anything_changes() -> None:
    net, batch = perceptron(), rows(30, 5)
    optim = torch.optim.Adagrad([w for pair in weights(net) for w in pair])
    old = [a.detach().clone() for a, _ in weights(net)]
    with pytest.raises(TypeError, match="whose change with the basis is not known"):
        balance(net, found(net, [batch]), optim)
    assert all(torch.equal(a, b) for a, (b, _) in zip(old, weights(net)))


def test_the_optimizer_of_another_network_is_refused() -> None:
    net, batch = perceptron(), rows(30, 5)
    other = torch.optim.Adam([w for pair in weights(perceptron()) for w in pair])
    with pytest.raises(ValueError, match="holds no LoRA weight of this network"):
        balance(net, found(net, [batch]), other)
