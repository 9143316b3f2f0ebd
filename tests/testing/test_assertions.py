"""The assertions on a model and its guide: on a right pair, and on a wrong twin."""

from typing import Any

import pyro
import pytest
import torch
from nets import bert, perceptron, regression, tokens
from pairs import rank_guide
from pyro import distributions as dist
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from toys import FEATURES, LABELS, batches, flat_elbo, flat_guide, flat_model

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.testing import assert_error, assert_ok, assert_unbiased_elbo
from lrvd_pyro.testing.assertions import MakePair

estimated = pytest.mark.filterwarnings("ignore:no closed form")


def standard_normal(space: lrvd.RankSpace) -> Tensor:
    ones = torch.ones(space.size)
    return pyro.sample("gate", dist.Normal(ones, 1.0).to_event(1))


def rows(size: int = 6) -> dict[str, Tensor]:
    return {"x": torch.randn(size, 5), "labels": torch.randint(0, 3, (size,))}


def gated(guide: Any = RankDiagonal, **options: Any) -> MakePair:
    """A maker of pairs on a perceptron."""

    def make_pair() -> tuple[GateLoRA, Any]:
        model = GateLoRA(perceptron(), num_data=60, **options)
        return model, guide(model)

    return make_pair


@estimated
@pytest.mark.parametrize("driver", ["svi", "torch"])
@pytest.mark.parametrize("guide", [RankDiagonal, AutoNormal, AutoMultivariateNormal])
def test_assert_ok_passes_on_right_pairs(guide: Any, driver: Any) -> None:
    make_pair = gated(guide, prior=standard_normal)
    assert_ok(make_pair, [rows() for _ in range(3)], driver=driver)


@pytest.mark.parametrize("family", [GateLoRA, FactorLoRA])
def test_assert_ok_passes_on_a_transformer(family: Any) -> None:
    def make_pair() -> Any:
        model = family(bert(randomize=False), num_data=60)
        return model, rank_guide(model)

    assert_ok(make_pair, [tokens(), tokens()])


def test_assert_ok_passes_on_regression() -> None:
    def make_pair() -> Any:
        likelihood = lrvd.likelihoods.Normal()
        model = GateLoRA(regression(), num_data=60, likelihood=likelihood)
        return model, rank_guide(model)

    assert_ok(make_pair, [rows() | {"labels": torch.randn(6)} for _ in range(2)])


def function_guide(model: GateLoRA, *, trains: bool = True) -> Any:
    def guide(**batch: Any) -> None:
        loc = pyro.param("loc", torch.ones(model.space.size))
        loc = loc if trains else loc.detach() + 0 * loc
        pyro.sample("gate", dist.Normal(loc, 0.1).to_event(1))

    return guide


def test_assert_ok_takes_a_function_as_guide() -> None:
    assert_ok(gated(function_guide), [rows(), rows()])
    stuck = gated(lambda model: function_guide(model, trains=False))
    with pytest.raises(AssertionError, match=r"have not moved: \['loc'\]"):
        assert_ok(stuck, [rows(), rows()])


def test_assert_ok_leaves_the_store_as_it_was() -> None:
    kept = pyro.param("kept", torch.ones(2)).unconstrained()
    assert_ok(gated(), [rows(), rows()])
    store = pyro.get_param_store()
    assert list(store.keys()) == ["kept"] and store["kept"].unconstrained() is kept


class Stuck(RankDiagonal):
    """A guide with a parameter that changes nothing."""

    def __init__(self, model: GateLoRA) -> None:
        super().__init__(model)
        self.idle = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize("driver", ["svi", "torch"])
def test_assert_ok_names_a_parameter_that_does_not_move(driver: Any) -> None:
    with pytest.raises(AssertionError, match=r"have not moved: \['guide.idle'\]"):
        assert_ok(gated(Stuck), [rows(), rows()], driver=driver)


def test_assert_ok_names_the_weights_that_one_step_cannot_reach() -> None:
    def make_pair() -> Any:
        model = GateLoRA(perceptron(randomize=False), num_data=60)
        return model, rank_guide(model)

    with pytest.raises(AssertionError, match=r"have not moved: .*lora_A"):
        assert_ok(make_pair, [rows()])
    assert_ok(make_pair, [rows(), rows()])


class Forgetful(RankDiagonal):
    """A guide whose noise is not part of its state."""

    def __init__(self, model: GateLoRA) -> None:
        super().__init__(model)
        self.noise = float(torch.rand(()))

    def forward(self, *args: Any, **batch: Any) -> Tensor:
        loc = self.log_variance + self.noise
        return pyro.sample("gate", dist.Normal(loc, 0.1).to_event(1))


def test_assert_ok_notices_what_the_state_dict_lacks() -> None:
    with pytest.raises(AssertionError, match="it predicts another probs"):
        assert_ok(gated(Forgetful), [rows(), rows()])


def test_assert_ok_wants_a_new_network_each_time() -> None:
    net = perceptron()

    def make_pair() -> Any:
        model = GateLoRA(net, num_data=60)
        return model, rank_guide(model)

    with pytest.raises(AssertionError, match="make_pair shares one network"):
        assert_ok(make_pair, [rows(), rows()])


@pytest.mark.parametrize("driver", ["svi", "torch"])
def test_assert_ok_names_the_step_of_an_infinite_loss(driver: Any) -> None:
    wrong = rows() | {"labels": torch.randn(6)}
    wrong["labels"][0] = torch.inf

    def make_pair() -> Any:
        likelihood = lrvd.likelihoods.Normal()
        net = regression()
        model = GateLoRA(net, prior=standard_normal, num_data=60, likelihood=likelihood)
        return model, rank_guide(model)

    right = rows() | {"labels": torch.randn(6)}
    with pytest.raises((AssertionError, ValueError), match="(of|at) step 1"):
        assert_ok(make_pair, [right, wrong], driver=driver)


def test_assert_ok_refuses_probabilities_that_do_not_sum_to_one() -> None:
    class Doubled(lrvd.likelihoods.Categorical):
        def summarize(self, predictions: Tensor) -> dict[str, Tensor]:
            fields = super().summarize(predictions)
            return fields | {"probs": 2 * fields["probs"]}

    with pytest.raises(AssertionError, match="probs do not sum to one"):
        assert_ok(gated(likelihood=Doubled()), [rows(), rows()])


def test_assert_error_passes_on_a_refusal_and_fails_without() -> None:
    assert_error(gated(AutoDelta), rows(), "has no minimum")
    wrong = rows() | {"labels": torch.rand(6)}
    assert_error(gated(), wrong, "expected integers", TypeError)
    with pytest.raises(AssertionError, match="no ValueError was raised"):
        assert_error(gated(), rows(), "has no minimum")
    with pytest.raises(AssertionError, match="'soft' is not in the message"):
        assert_error(gated(AutoDelta), rows(), "soft")


def test_assert_error_fails_where_a_refusal_moves_parameters() -> None:
    class Moving(RankDiagonal):
        def forward(self, *args: Any, **batch: Any) -> Tensor:
            self.log_variance.data += 1
            raise ValueError("too late")

    with pytest.raises(AssertionError, match=r"have moved: \['guide.log_variance'\]"):
        assert_error(gated(Moving), rows(), "too late")


@estimated
@pytest.mark.parametrize("elbo", [lrvd.RankELBO(), Trace_ELBO()])
def test_unbiased_elbo_passes_on_the_exact_one_and_fails_without_the_kl(
    elbo: Any,
) -> None:
    fit, kl = flat_elbo()
    assert_unbiased_elbo(flat_model, flat_guide, batches(1000), kl - fit, elbo=elbo)
    whole = [{"x": FEATURES, "labels": LABELS}]
    assert_unbiased_elbo(flat_model, flat_guide, whole, kl - fit, elbo=elbo)
    with pytest.raises(AssertionError, match="the mean of 5000 losses is .* expected"):
        assert_unbiased_elbo(
            flat_model, flat_guide, whole, -fit, elbo=elbo, num_estimates=5000
        )
