"""Every prior is the density that it says, and its scales mean what it says."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from nets import bert
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions import constraints
from scipy import stats
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.distributions import LOG_UNIFORM_CONSTANT
from lrvd_pyro.inference.per_example import PerExample
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.priors.gaussian import ARD, Normal
from lrvd_pyro.priors.hierarchical import Hierarchical, Horseshoe
from lrvd_pyro.priors.log_uniform import LogUniform, TruncatedLogUniform
from lrvd_pyro.priors.spike_slab import SpikeSlab

RANKS = {"rank_pattern": {"query": 2}}  # modules of 2, 4, 2, 4 ranks, two a layer
GROUPS = {
    "module": [0] * 2 + [1] * 4 + [2] * 2 + [3] * 4,
    "layer": [0] * 6 + [1] * 6,
    "type": ([0] * 2 + [1] * 4) * 2,
}
R = 12
POSITIVE = constraints.positive.check
LogDensity = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Case:
    """A prior, the sizes of its sites, their support, and its density by scipy."""

    prior: Callable[[], Any]
    sizes: dict[str, int]
    log_density: LogDensity
    positive: bool = False
    proper: bool = True


def of_gate(frozen: Any) -> LogDensity:
    return lambda z: frozen.logpdf(z["gate"]).sum()


def ard() -> ARD:
    prior = ARD()
    prior.log_gamma = torch.nn.Parameter(torch.linspace(-1, 1, R))
    return prior


def horseshoe(z: dict[str, Any]) -> float:
    top = stats.halfcauchy(0, 0.3).logpdf(z["global_scale"]).sum()
    rest = [stats.halfcauchy.logpdf(z[f"{x}_scale"]).sum() for x in ("module", "rank")]
    return top + sum(rest)


def hierarchical(z: dict[str, Any], family: Any, over: str) -> float:
    scale = z[f"{over}_scale"]
    gates = family.logpdf(z["gate"], 0, scale[GROUPS[over]])
    return gates.sum() + stats.halfcauchy.logpdf(scale).sum()


# a gate is not 0 where its logit is above -log 11: here with probability 0.3
SPIKE = stats.logistic(math.log(0.3 / 0.7) / 0.5 - math.log(11), 1 / 0.5)
LEVELS = {"global_scale": 1, "module_scale": 4, "rank_scale": R}
CASES = {
    "LogUniform": Case(
        LogUniform,
        {"gate": R},
        lambda z: -(np.log(abs(z["gate"])) + LOG_UNIFORM_CONSTANT).sum(),
        proper=False,
    ),
    "TruncatedLogUniform": Case(
        lambda: TruncatedLogUniform(-5.0, 2.0),
        {"gate": R},
        of_gate(stats.loguniform(math.exp(-5), math.exp(2))),
        positive=True,
    ),
    "Normal": Case(lambda: Normal(2.0), {"gate": R}, of_gate(stats.norm(0, 2))),
    "ARD": Case(
        ard,
        {"gate": R},
        of_gate(stats.norm(0, np.exp(np.linspace(-1, 1, R) / 2))),
    ),
    "Horseshoe": Case(lambda: Horseshoe(0.3), LEVELS, horseshoe, positive=True),
    "slab": Case(lambda: Horseshoe(0.3, slab=2.0), LEVELS, horseshoe, positive=True),
    "module": Case(
        Hierarchical,
        {"module_scale": 4, "gate": R},
        partial(hierarchical, family=stats.halfcauchy, over="module"),
        positive=True,
    ),
    "layer": Case(
        lambda: Hierarchical(dist.HalfNormal, "layer"),
        {"layer_scale": 2, "gate": R},
        partial(hierarchical, family=stats.halfnorm, over="layer"),
        positive=True,
    ),
    "type": Case(
        lambda: Hierarchical(dist.Exponential, "type"),
        {"type_scale": 2, "gate": R},
        lambda z: (
            stats.halfcauchy.logpdf(z["type_scale"]).sum()
            + stats.expon.logpdf(
                z["gate"], 0, 1 / z["type_scale"][GROUPS["type"]]
            ).sum()
        ),
        positive=True,
    ),
    "SpikeSlab": Case(
        lambda: SpikeSlab(0.3),
        {"gate_logit": R},
        lambda z: SPIKE.logpdf(z["gate_logit"]).sum(),
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def gates(prior: Any, count: int) -> Tensor:
    """Prior draws of the gate, ``count x R``."""
    with torch.no_grad(), PerExample(count):
        gate: Tensor = prior(lrvd.RankSpace(bert(**RANKS)))
    return gate


@cases
def test_sites_have_the_sizes_and_supports_that_are_documented(case: Case) -> None:
    model = GateLoRA(bert(**RANKS), prior=case.prior(), num_data=60)
    sites = model.latent_sites()
    assert {name: fn.event_shape for name, fn in sites.items()} == {
        name: (size,) for name, size in case.sizes.items()
    }
    for fn in sites.values():
        assert bool(fn.support.check(-torch.ones(fn.event_shape))) != case.positive
        assert bool(fn.support.check(torch.ones(fn.event_shape)))
    run = poutine.trace(model.draw).get_trace()
    assert run.nodes["gate"]["value"].shape == (R,)


@cases
def test_log_density_is_that_of_scipy(case: Case) -> None:
    model = GateLoRA(bert(**RANKS), prior=case.prior(), num_data=60)
    latents = {name: torch.rand(size) + 0.1 for name, size in case.sizes.items()}
    log_prior = float(model.log_prior(latents).detach())
    given = {name: value.numpy() for name, value in latents.items()}
    assert log_prior == pytest.approx(float(case.log_density(given)), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].proper])
def test_draws_of_proper_priors_are_finite(name: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    drawn = gates(CASES[name].prior(), 2000)
    assert drawn.isfinite().all() and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    "levels", [("global",), ("module",), ("rank",), ("global", "rank"), None]
)
def test_a_horseshoe_gate_is_the_product_of_the_chosen_scales(levels: Any) -> None:
    options = {} if levels is None else {"levels": levels}
    model = GateLoRA(bert(**RANKS), prior=Horseshoe(**options), num_data=60)
    run = poutine.trace(model.draw).get_trace()
    expected = torch.ones(R)
    groups = {"global": [0] * R, "module": GROUPS["module"], "rank": list(range(R))}
    for level in levels or groups:
        expected = expected * run.nodes[f"{level}_scale"]["value"][groups[level]]
    torch.testing.assert_close(run.nodes["gate"]["value"], expected)
    absent = groups.keys() - set(levels or groups)
    assert not any(f"{level}_scale" in run.nodes for level in absent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("each", [1e-30, 1e-3, 2.0, 1e10, 1e30])
def test_the_slab_bounds_every_gate_and_leaves_small_ones(
    each: float, dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    model = GateLoRA(bert(), prior=Horseshoe(slab=2.0), num_data=60)
    sites = model.latent_sites().items()
    latents = {name: torch.full(fn.event_shape, each) for name, fn in sites}
    gate = model.value_at(latents)
    assert (gate <= 2.0).all()
    product = each**3
    expected = torch.full((16,), product / math.hypot(1, product / 2))
    torch.testing.assert_close(gate, expected)  # at 1e30 float32 has no such product
    assert gates(Horseshoe(), 2000).max() > 2.0  # the twin has no bound


@pytest.mark.parametrize("over", GROUPS)
def test_a_hierarchy_gives_each_group_of_each_example_its_own_scale(over: Any) -> None:
    space = lrvd.RankSpace(bert(**RANKS))
    with poutine.trace() as run, PerExample(5):
        Hierarchical(dist.HalfNormal, over)(space)
    scale = run.trace.nodes[f"{over}_scale"]["value"]
    assert scale.shape == (5, max(GROUPS[over]) + 1) and len(scale.unique()) > 5
    given: Any = run.trace.nodes["gate"]["fn"]
    expected = torch.stack([row[GROUPS[over]] for row in scale])
    torch.testing.assert_close(given.base_dist.scale.expand(5, R), expected)


def share(hit: Tensor) -> tuple[float, float]:
    """The share of hits, and five of its standard errors."""
    mean = float(hit.double().mean())
    return mean, 5 * math.sqrt(mean * (1 - mean) / hit.numel())


@pytest.mark.parametrize(("inclusion", "temperature"), [(0.3, 0.5), (0.7, 0.1)])
def test_a_spike_slab_gate_is_not_zero_with_probability_inclusion(
    inclusion: float, temperature: float
) -> None:
    drawn = gates(SpikeSlab(inclusion, temperature), 20_000)
    assert (drawn == 0).any() and (drawn == 1).any()
    found, error = share(drawn != 0)
    assert abs(found - inclusion) < error
    assert abs(found - (inclusion + 0.01)) > error  # the twin


def test_a_spike_slab_becomes_bernoulli_at_low_temperature() -> None:
    """Between 0 and 1 lies P(gate > 0) - sigmoid(log odds - 2 T log 11)."""
    for temperature in (0.5, 0.1, 0.01):
        expected = 0.3 - 1 / (1 + 0.7 / 0.3 * math.exp(2 * temperature * math.log(11)))
        drawn = gates(SpikeSlab(0.3, temperature), 20_000)
        found, error = share((drawn > 0) & (drawn < 1))
        assert abs(found - expected) < error
    assert expected < 0.011


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogUniform(0.0), r"multiplicity=0.0; expected a positive number"),
        (lambda: LogUniform(math.inf), r"multiplicity=inf; expected a positive"),
        (lambda: Normal(-1.0), r"scale=-1.0; expected a positive number"),
        (lambda: Normal("1"), r"scale='1'; expected a positive number"),
        (lambda: Horseshoe(-1.0), r"scale=-1.0; expected a positive number"),
        (lambda: Horseshoe(slab=0.0), r"slab=0.0; expected a positive number"),
        (lambda: Horseshoe(levels=()), r"levels=\(\); expected some of"),
        (lambda: Horseshoe(levels=("rank", "module")), r"levels=.*in this order"),
        (lambda: Horseshoe(levels=("layer",)), r"levels=\('layer',\); expected"),
        (lambda: TruncatedLogUniform(1.0, 2.0), r"low=1.0, high=2.0; expected bounds"),
        (lambda: TruncatedLogUniform(-1.0, math.inf), r"high=inf; expected bounds"),
        (lambda: Hierarchical(over="rank"), r"over='rank'; expected .module., .layer"),
        (lambda: SpikeSlab(1.0), r"inclusion=1.0; expected the probability"),
        (lambda: SpikeSlab(0.5, 0.0), r"temperature=0.0; expected a positive number"),
    ],
)
def test_a_prior_refuses_what_it_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_family_is_a_function() -> None:
    with pytest.raises(TypeError, match=r"family=2.0; expected a function from scales"):
        Hierarchical(2.0)  # type: ignore[arg-type]


def vector(space: Any, site: str, event_dim: int = 1, rows: int = 1) -> Tensor:
    fn = dist.Normal(torch.ones(*[rows] * (event_dim - 1), space.size), 1.0)
    value: Tensor = pyro.sample(site, fn.to_event(event_dim))
    return value


def without_a_vector(space: Any) -> Tensor:
    pyro.sample("s", dist.HalfCauchy(1.0))
    return vector(space, "gate")


@pytest.mark.parametrize(
    ("prior", "problem"),
    [
        (lambda space: None, "it returns None; expected the gate, a tensor"),
        (lambda space: 2 * vector(space, "gate"), "'gate' is not what it returns"),
        (without_a_vector, "'s' has 0 event dimensions, not 1"),
        (lambda space: vector(space, "m", 2, 3)[..., 0, :], "'m' has 2 event dim"),
    ],
)
def test_a_prior_that_is_not_a_gate_of_vectors_shows_the_contract(
    prior: Any, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        GateLoRA(bert(), prior=prior, num_data=60)
    assert "A prior maps a RankSpace to the gate" in str(error.value)
