"""Everything that a step runs, on a device without numbers.

torch's meta device refuses a tensor made on the CPU, and the reading of a value. An
accelerator fails at the first, and waits at the second.
"""

import math
from itertools import product
from typing import Any

import pyro
import pytest
import torch
from families import GUIDES, PRIORS, REFUSED
from nets import CLASSES, Perceptron, lora, perceptron
from pyro import distributions as dist
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGaussian
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro import guides, likelihoods
from lrvd_pyro.autocast import autocast_dtype
from lrvd_pyro.gauge.token_sums import tapped
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.optim import AdamW, parameter_groups
from lrvd_pyro.predictive.predictive import mean_value
from lrvd_pyro.rank_space.center import center_at

pytestmark = [
    pytest.mark.filterwarnings("ignore:no closed form"),
    # Pyro's flow holds a parameter twice, of which the move to meta makes two.
    pytest.mark.filterwarnings("ignore:.*_prototype_tensor"),
]

Pair = tuple[Any, Any]
DRIVERS = ("svi", "torch")
ON_DEFAULT_DEVICE = "AutoGaussian"  # Pyro's own makes tensors there


@pytest.fixture(autouse=True)
def no_validation() -> None:
    """Pyro's validation reads values; conftest switches it on for the next test."""
    pyro.enable_validation(False)


def batch(device: str = "meta", size: int = 4) -> dict[str, Tensor]:
    x, labels = torch.randn(size, 5), torch.randint(CLASSES, (size,))
    return {"x": x.to(device), "labels": labels.to(device)}


def moved(model: Any, guide: Any, first: dict[str, Tensor] | None = None) -> Pair:
    """A pair that was set up on the CPU, on the meta device."""
    guide(**(first or batch("cpu")))
    # torch gives a module on the meta device new parameters, which the store lacks.
    pyro.clear_param_store()
    return model.to("meta"), guide.to("meta")


def step(driver: str, model: Any, guide: Any, data: Any, noise: Any) -> Tensor:
    """Two steps of training; returns the parameters of the guide, joined."""
    elbo = lrvd.RankELBO(noise=noise)
    if driver == "svi":
        svi = SVI(model, guide, AdamW(clip_norm=1.0), loss=elbo)
        assert all(math.isnan(svi.step(**data)) for _ in range(2))
        assert math.isnan(svi.evaluate_loss(**data))
    else:
        loss = elbo(model, guide)
        groups = parameter_groups(model, guide)
        optim = torch.optim.AdamW(groups, weight_decay=0.0)
        for _ in range(2):
            optim.zero_grad()
            loss(**data).backward()
            optim.step()
    kl = elbo.terms["kl"]["total"]
    assert kl.is_meta and elbo.terms["log_likelihood"].is_meta
    return torch.cat([p.flatten() for p in guide.parameters()])


PAIRS = [
    (prior, guide)
    for prior, guide in product(PRIORS, GUIDES)
    if (prior, guide) not in REFUSED and guide != ON_DEFAULT_DEVICE
]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_gates_train_and_predict_without_a_tensor_elsewhere_or_a_reading(
    prior: str, guide: str, driver: str
) -> None:
    noise = "example" if (len(prior) + len(guide) + len(driver)) % 2 else "batch"
    model = GateLoRA(perceptron(), prior=PRIORS[prior](), num_data=60)
    pair = moved(model, GUIDES[guide](model))
    assert step(driver, *pair, batch(), noise).is_meta
    for method in ("sample", "linearized"):
        prediction = lrvd.predict(*pair, [batch()], num_samples=3, method=method)
        assert prediction.probs.is_meta and prediction.probs.shape == (4, CLASSES)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("sides", [("lora_A",), ("lora_A", "lora_B")])
@pytest.mark.parametrize("guide", ["TiedDiagonal", "AutoNormal"])
def test_weights_train_and_predict_without_a_tensor_elsewhere_or_a_reading(
    guide: str, sides: Any, driver: str
) -> None:
    model = FactorLoRA(perceptron(), num_data=60, sides=sides)
    if guide == "AutoNormal":  # it has means of its own
        for weight in (w for side in sides for w in model.space.weights(side)):
            weight.requires_grad_(False)
    make: Any = {"TiedDiagonal": guides.TiedDiagonal, **GUIDES}[guide]
    pair = moved(model, make(model))
    assert step(driver, *pair, batch(), "example").is_meta
    assert lrvd.predict(*pair, [batch()], num_samples=3).probs.is_meta


@pytest.mark.parametrize("prior", PRIORS)
def test_a_prior_draws_on_the_device_of_its_model(prior: str) -> None:
    model = GateLoRA(perceptron(), prior=PRIORS[prior](), num_data=60).to("meta")
    inputs = {"x": batch()["x"]}
    assert model(**inputs).is_meta
    assert all(fn.sample().is_meta for fn in model.latent_sites().values())
    assert model.log_prior(model.start()).is_meta


def test_weights_are_drawn_on_the_device_of_their_model() -> None:
    model = FactorLoRA(perceptron(), num_data=60).to("meta")
    assert all(fn.sample().is_meta for fn in model.latent_sites().values())


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("density", [dist.Normal(0.0, 1.0), dist.Laplace(0.0, 1.0)])
def test_a_weight_prior_and_a_center_are_on_the_device(
    density: Any, driver: str
) -> None:
    model = GateLoRA(perceptron(), weight_prior=density, num_data=60)
    center_at(model.space, torch.randn(model.space.size))
    pair = moved(model, guides.RankDiagonal(model))
    assert step(driver, *pair, batch(), "example").is_meta


@pytest.mark.parametrize("driver", DRIVERS)
def test_regression_learns_its_noise_on_the_device(driver: str) -> None:
    def data(device: str) -> dict[str, Tensor]:
        return {k: v.to(device) for k, v in {"x": x, "labels": torch.randn(4)}.items()}

    x = torch.randn(4, 5)
    net = lora(Perceptron(outputs=1), target_modules=["hidden", "out"])
    model = GateLoRA(net, likelihood=likelihoods.Normal(), num_data=60)
    pair = moved(model, guides.RankDiagonal(model), data("cpu"))
    assert step(driver, *pair, data("meta"), "batch").is_meta
    for method in ("sample", "linearized"):
        prediction = lrvd.predict(*pair, [data("meta")], method=method)
        assert prediction.variance.is_meta


@pytest.mark.parametrize(
    ("kind", "family"),
    [(GateLoRA, guides.RankDiagonal), (FactorLoRA, guides.TiedDiagonal)],
)
def test_what_a_rankwise_guide_knows_stays_on_the_device(
    kind: Any, family: Any
) -> None:
    model = kind(perceptron(), num_data=60)
    model, rankwise = moved(model, family(model))
    known = rankwise.log_alpha, rankwise.effective_rank, rankwise.noise_ratio()
    assert all(each.is_meta for each in (*known, rankwise.mean()))
    assert mean_value(model, rankwise).is_meta
    with lrvd.posterior_sample(model, rankwise, seed=0) as net:
        assert net(batch()["x"]).is_meta


def test_rank_activations_and_their_gradients_stay_on_the_device() -> None:
    model = GateLoRA(perceptron(), num_data=60).to("meta")
    seen: list[Tensor] = []
    with tapped(model, lambda _, h, g: seen.extend((h, g))):
        with model.bind(model.space.ones()):
            model.predictions(x=batch()["x"]).sum().backward()
    assert len(seen) == 4 and all(each.is_meta for each in seen)


def test_a_device_without_autocast_has_no_precision_of_it() -> None:
    assert autocast_dtype("meta") is None and autocast_dtype("cpu") is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype("cpu") is torch.bfloat16


def test_pyros_autogaussian_stays_on_the_default_device() -> None:
    model = GateLoRA(perceptron(), num_data=60)
    pair = moved(model, AutoGaussian(model))
    with pytest.raises(RuntimeError, match="positive-definite|meta"):
        step("torch", *pair, batch(), "batch")


def on_the_cpu(space: Any) -> Tensor:
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(1)).to_event(1))
    return scale * pyro.sample("z", dist.Normal(space.ones(), 1.0).to_event(1))


def reading(space: Any) -> Tensor:
    gate = pyro.sample("gate", dist.Normal(space.ones(), 1.0).to_event(1))
    if gate.abs().max().item() == math.inf:
        raise ValueError("infinite")
    return gate


@pytest.mark.parametrize(
    ("prior", "message"),
    [(on_the_cpu, "device cpu is not on the expected device meta"), (reading, "item")],
)
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_prior_that_makes_a_tensor_elsewhere_or_reads_one_is_caught(
    prior: Any, message: str, driver: str
) -> None:
    model = GateLoRA(perceptron(), prior=prior, num_data=60)
    pair = moved(model, guides.RankDiagonal(model))
    with pytest.raises(RuntimeError, match=message):
        step(driver, *pair, batch(), "example")
