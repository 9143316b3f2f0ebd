"""Two guides of one class in one process both train, or are refused."""

import pickle
from typing import Any

import pyro
import pytest
import torch
from nets import bert, tokens
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro import guides
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.inference.param_store import give_own_name
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.priors.gaussian import ARD, Normal
from lrvd_pyro.priors.log_uniform import LogUniform

pytestmark = pytest.mark.filterwarnings("ignore:no closed form")
AUTO = pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
NOISE = pytest.mark.parametrize("noise", ["example", "batch"])


def pair(auto: Any) -> tuple[GateLoRA, Any]:
    model = GateLoRA(bert(), num_data=60)
    return model, auto(model, init_loc_fn=init_to_value(values=model.start()))


def svi(model: Any, guide: Any, noise: Any) -> SVI:
    elbo = lrvd.RankELBO(noise=noise)
    return SVI(model, guide, lrvd.optim.AdamW(lr=1e-2), loss=elbo)


@NOISE
@AUTO
def test_a_second_guide_of_one_name_is_refused(auto: Any, noise: Any) -> None:
    first, second = pair(auto), pair(auto)
    svi(*first, noise).step(**tokens())
    with pytest.raises(
        RuntimeError,
        match=rf"'{auto.__name__}\..* of another guide, .*give_own_name\(guide\)",
    ):
        svi(*second, noise).step(**tokens())


@NOISE
@AUTO
def test_guides_with_names_of_their_own_both_train(auto: Any, noise: Any) -> None:
    both = [pair(auto), pair(auto)]
    for _, guide in both:
        assert give_own_name(guide) is guide
    runs = [svi(model, guide, noise) for model, guide in both]
    for run in runs:
        run.step(**tokens())
    seen = [list(guide.parameters()) for _, guide in both]
    before = [[p.detach().clone() for p in each] for each in seen]
    for which, run in enumerate(runs):  # each in turn: only its own guide moves
        run.step(**tokens())
        for number, (each, old) in enumerate(zip(seen, before)):
            moved = [not torch.equal(p, o) for p, o in zip(each, old)]
            assert moved and all(m == (number <= which) for m in moved)
    assert not {id(p) for p in seen[0]} & {id(p) for p in seen[1]}
    addresses = [{p.data_ptr() for p in each} for each in seen]
    assert not addresses[0] & addresses[1]


@AUTO
def test_without_the_refusal_the_second_guide_is_handed_the_first_ones_tensors(
    auto: Any,
) -> None:
    """The twin: what Pyro's own loss does."""
    both = [pair(auto), pair(auto)]
    for model, guide in both:
        loss = pyro.infer.Trace_ELBO()
        SVI(model, guide, lrvd.optim.AdamW(lr=1e-2), loss=loss).step(**tokens())
    first, second = ([id(p) for p in guide.parameters()] for _, guide in both)
    assert first and first == second


def two_sites(space: Any) -> Tensor:
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(1), 1.0).to_event(1))
    return scale * LogUniform().sample("z", space.size)


@NOISE
def test_a_point_mass_beside_a_joint_guide_is_refused_under_the_log_uniform(
    noise: Any,
) -> None:
    model = GateLoRA(bert(), prior=two_sites, num_data=60)
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["z"])))
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=["scale"])))
    with pytest.raises(ValueError, match=r"'z' has a log-uniform prior.*\['Delta'\]"):
        svi(model, guide, noise).step(**tokens())


@NOISE
def test_guides_of_their_own_site_each_train_side_by_side(noise: Any) -> None:
    """The same list with Gaussians on both sites is not refused."""
    model = GateLoRA(bert(), prior=two_sites, num_data=60)
    start = init_to_value(values=model.start())
    guide = AutoGuideList(model)
    for site, auto in (("z", AutoMultivariateNormal), ("scale", AutoNormal)):
        guide.append(auto(poutine.block(model, expose=[site]), init_loc_fn=start))
    run = svi(model, guide, noise)
    run.step(**tokens())
    before = [p.detach().clone() for p in guide.parameters()]
    run.step(**tokens())
    assert len(before) == 5
    assert not any(torch.equal(p, old) for p, old in zip(guide.parameters(), before))


@pytest.mark.parametrize("driver", ["svi", "torch"])
def test_a_frozen_guide_and_prior_stay_frozen(driver: str) -> None:
    model = GateLoRA(bert(), prior=ARD(), num_data=60)
    model.prior.requires_grad_(False)
    guide = RankDiagonal(model).requires_grad_(False)
    elbo = lrvd.RankELBO()
    if driver == "svi":
        SVI(model, guide, lrvd.optim.AdamW(), loss=elbo).step(**tokens())
    else:
        elbo(model, guide)(**tokens()).backward()
    frozen = [*model.prior.parameters(), *guide.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)
    assert (guide.log_alpha == guide.log_alpha[0]).all()


@pytest.mark.parametrize(
    "make", [guides.multivariate_normal, guides.delta, guides.laplace, guides.iaf]
)
def test_an_unpickled_guide_is_refused_until_it_has_a_name_of_its_own(
    make: Any,
) -> None:
    model = GateLoRA(bert(), prior=Normal(), num_data=60)
    guide = make(model)
    SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO()).step(**tokens())
    copied = pickle.loads(pickle.dumps((model, guide)))
    svi = SVI(*copied, lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    with pytest.raises(RuntimeError, match="of another guide.*give_own_name"):
        svi.step(**tokens())
    give_own_name(copied[1])
    before = [p.clone() for p in [*guide.parameters(), *copied[1].parameters()]]
    svi.step(**tokens())
    after = [*guide.parameters(), *copied[1].parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after)]
    count = len(list(guide.parameters()))
    assert not any(moved[:count]) and any(moved[count:])
