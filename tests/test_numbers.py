"""Numbers that mean nothing are refused where they are given, and nothing moves."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from nets import bert, perceptron, tokens
from pyro.infer import SVI
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro import guides, priors
from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.guides.fisher_laplace import FisherLaplace
from lrvd_pyro.likelihoods import Normal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.optim import AdamW, parameter_groups

NAN, INF = math.nan, math.inf
Make = Callable[..., Any]


def pair(family: Any = GateLoRA) -> tuple[Any, Any]:
    model = family(bert(), num_data=60)
    return model, RankDiagonal(model) if family is GateLoRA else TiedDiagonal(model)


def state(*modules: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for m in modules for p in m.parameters()]


def proper() -> GateLoRA:
    return GateLoRA(bert(), prior=priors.Normal(), num_data=60)


def schedule(**options: Any) -> lrvd.RankSchedule:
    given: dict[str, Any] = {"start": 1, "every": 1} | options
    return lrvd.RankSchedule(*pair(), AdamW(), **given)


def predicted(**options: Any) -> object:
    return lrvd.predict(*pair(), [tokens()], **options)


def mean_of_draws(num_samples: Any) -> None:
    model = proper()
    guide = guides.low_rank_multivariate_normal(model)
    guide(**tokens())
    with lrvd.posterior_mean(model, guide, num_samples=num_samples):
        pass


def prune(**options: Any) -> Tensor:
    return lrvd.prune(*pair(), **options)


def drop(**options: Any) -> Tensor:
    return lrvd.prune(*pair(), criterion="elbo_drop", min_rank=1, **options)


RATES = (NAN, INF, -1e-3, "1e-3", True)
COUNTS = (NAN, 0, 2.5, True, "2")
DEVIATIONS = (NAN, INF, 0.0, -1.0)
REFUSED: list[tuple[Make, str, tuple[Any, ...]]] = [
    (AdamW, "lr", RATES),
    (AdamW, "head_lr", RATES),
    (AdamW, "variational_lr", RATES),
    (AdamW, "weight_decay", RATES),
    (AdamW, "clip_norm", (NAN, 0.0, -1.0, "1")),
    (lambda **k: parameter_groups(*pair(), **k), "lr", RATES),
    (lambda **k: parameter_groups(*pair(), **k), "head_lr", RATES),
    (lambda **k: parameter_groups(*pair(), **k), "variational_lr", RATES),
    (prune, "log_alpha_threshold", (NAN, "3")),
    (prune, "min_rank", (NAN, -1, 1.5)),
    (drop, "max_drop", (NAN, -0.01)),
    (drop, "kl_weight", (NAN, INF, 0.0, -1.0)),
    (schedule, "log_alpha_threshold", (NAN, None)),
    (schedule, "min_rank", (-1, 0.5)),
    (schedule, "start", (NAN, -1)),
    (schedule, "every", COUNTS),
    (schedule, "checks", COUNTS),
    (lrvd.RankELBO, "num_particles", COUNTS),
    (lrvd.RankELBO, "kl_weight", (NAN, INF, -1.0)),
    (lrvd.linear_warmup, "steps", (NAN, INF, -1)),
    (predicted, "num_samples", COUNTS),
    (predicted, "max_batch", COUNTS),
    (mean_of_draws, "num_samples", COUNTS),
    (lambda **k: lrvd.to_arviz(*pair(), [tokens()], **k), "num_samples", COUNTS),
    (lambda **k: RankDiagonal(pair()[0], **k), "init_log_alpha", (NAN, INF)),
    (lambda **k: TiedDiagonal(pair(FactorLoRA)[0], **k), "init_log_alpha", (NAN,)),
    (lambda **k: guides.iaf(proper(), **k), "init_scale", DEVIATIONS),
    (lambda **k: guides.iaf(proper(), **k), "hidden_dim", (NAN, 15, 16.5)),
    (Normal, "scale", DEVIATIONS),
]
EACH = [(m, name, value) for m, name, values in REFUSED for value in values]


@pytest.mark.parametrize(("make", "name", "value"), EACH)
def test_a_number_that_means_nothing_is_refused_by_name(
    make: Make, name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r}[;,].* expected"):
        make(**{name: value})


@pytest.mark.parametrize("betas", [(NAN, 0.9), (0.9, 1.0), (-0.1, 0.9)])
def test_betas_out_of_range_are_refused(betas: Any) -> None:
    with pytest.raises(ValueError, match="betas=.*; expected numbers from 0 to below"):
        AdamW(betas=betas)


def test_numbers_at_the_edge_that_mean_something_are_taken() -> None:
    """0 holds a group still; an infinite threshold keeps all; no norm exceeds inf."""
    AdamW(lr=0, head_lr=0.0, weight_decay=0, clip_norm=INF, betas=(0.0, 0.0))
    assert prune(log_alpha_threshold=INF).all()
    assert int(prune(log_alpha_threshold=-INF, min_rank=1).sum()) == 4
    assert int(drop(max_drop=INF).sum()) == 4
    assert lrvd.linear_warmup(0)(0) == 1.0


@pytest.mark.parametrize("factor", [NAN, INF, -1.0])
def test_a_schedule_that_gives_nonsense_is_refused_before_anything_moves(
    factor: float,
) -> None:
    model, guide = pair()
    optim = AdamW(schedule=lambda step: factor if step == 1 else 1.0)
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    svi.step(**tokens())
    before = state(model, guide)
    with pytest.raises(ValueError, match=rf"schedule\(1\)={factor}; expected a finite"):
        svi.step(**tokens())
    assert all(map(torch.equal, state(model, guide), before)) and optim.steps == 1


def test_a_schedule_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="schedule=0.5; expected a function from the"):
        AdamW(schedule=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [GateLoRA, FactorLoRA])
@pytest.mark.parametrize("criterion", ["log_alpha", "elbo_drop"])
@pytest.mark.parametrize("where", ["one", "all"])
def test_pruning_a_guide_whose_noise_is_nan_is_refused(
    family: Any, criterion: Any, where: str
) -> None:
    """By "elbo_drop" NaN was an infinite cost, and every such rank stayed."""
    model, guide = pair(family)
    with torch.no_grad():
        guide.log_variance[: 1 if where == "one" else 16] = NAN
    with pytest.raises(ValueError, match="is NaN for .* the training diverged"):
        lrvd.prune(model, guide, criterion=criterion)
    assert model.space.size == 16


def test_pruning_under_a_prior_whose_scale_is_nan_is_refused() -> None:
    """The noise is a number, and the gradient of the KL is not."""
    model = GateLoRA(bert(), prior=priors.ARD(), num_data=60)
    guide = RankDiagonal(model)
    with torch.no_grad():
        model.prior.log_gamma[3] = NAN
    # With validation, Pyro itself refuses such a scale.
    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="gradient of the KL is NaN for 1 of 16"):
            lrvd.prune(model, guide, criterion="elbo_drop")


def large() -> GateLoRA:
    """More latents than a full covariance may have."""
    return GateLoRA(perceptron(r=2050), prior=priors.Normal(), num_data=60)


@pytest.mark.parametrize(
    ("guide", "what"),
    [
        (guides.multivariate_normal, "a full covariance"),
        (guides.iaf, "an autoregressive network"),
        (guides.laplace, "Laplace's covariance"),
    ],
)
def test_a_guide_of_quadratic_memory_is_refused_with_the_way_out(
    guide: Make, what: str
) -> None:
    way_out = r"low_rank_multivariate_normal\(model, rank=16\)"
    message = rf"{what} over 4100 latent components takes 0.063 GiB, .*{way_out}"
    with pytest.raises(ValueError, match=message):
        guide(large())


def test_a_laplace_guide_of_ones_own_is_refused_before_the_fisher_information() -> None:
    guide = FisherLaplace(large())
    batch = {"x": torch.randn(2, 5), "labels": torch.tensor([0, 1])}
    guide(**batch)
    with pytest.raises(ValueError, match="Laplace's covariance over 4100 latent"):
        guide.laplace_approximation([batch])


def test_the_trial_of_a_prior_has_two_batches_that_are_the_size_of_nothing_in_it() -> (
    None
):
    batches = []

    def prior(space: Any) -> Tensor:
        gate = 1.0
        for size in (2, 3):
            one = pyro.distributions.Normal(torch.ones(size), 1.0).to_event(1)
            gate = gate * pyro.sample(f"of_{size}", one)[..., :1]
        each = pyro.distributions.Normal(space.ones(), 1.0).to_event(1)
        z: Tensor = gate * pyro.sample("z", each)
        if z.dim() == 2:
            batches.append(len(z))
        return z

    GateLoRA(perceptron(r=2), prior=prior, num_data=60)  # R = 4
    assert {5, 6} <= set(batches) and max(batches) == 6
