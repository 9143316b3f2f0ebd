"""Tensors of a model or guide of one's own are cut with its ranks, or refused."""

from typing import Any

import nets
import pyro
import pytest
import torch
from nets import tokens
from own_guide import Uniform
from pruned import some
from pyro import distributions as dist
from pyro.infer import SVI
from third_model import CoreLoRA
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro import RankSpace
from lrvd_pyro.guides import RankDiagonal, RankGuide
from lrvd_pyro.likelihoods import Categorical
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.selection import select


class WithFactors(CoreLoRA):
    """It has tensors of its own beside A and B."""

    def __init__(self, net: Any, *, size: int | None = None, **arguments: Any) -> None:
        super().__init__(net, **arguments)
        each = torch.arange(1.0, 1 + (size or self.space.size))
        self.register_buffer("singular_values", each)
        self.module_scale = nn.Parameter(torch.ones(len(self.space.modules)))
        self.temperature = nn.Parameter(torch.tensor(2.0))


class Likelihood(nn.Module):
    """With a parameter, which belongs to labels and not to ranks."""

    summarize, collect = Categorical().summarize, Categorical().collect

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, predictions: Tensor, labels: Any, num_data: int) -> None:
        Categorical()(predictions + self.shift, labels, num_data)


class Cores(RankGuide):
    """Noise of one width per rank component, which scales the rows of each core."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.log_width = nn.Parameter(-2 * self.space.ones())
        self.register_buffer("prior_width", self.space.ones())
        self.overall = nn.Parameter(torch.tensor(0.0))

    def forward(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        width = (self.log_width + self.overall).exp() * self.prior_width
        rows = [w.repeat_interleave(len(w)) for w in self.space.split(width).values()]
        return self.draw_independent(
            {"core": dist.Normal(self.mean(), torch.cat(rows))}
        )

    def mean(self) -> Tensor:
        return torch.cat([torch.eye(r).flatten() for r in self.space.ranks])

    @property
    def log_alpha(self) -> Tensor:
        return 2 * self.log_width.detach()


def same(model: Any, guide: Any) -> list[Tensor]:
    tensors = [*model.state_dict().values(), *guide.state_dict().values()]
    return [t.clone() for t in tensors]


@pytest.mark.filterwarnings("ignore:no closed form")
def test_a_models_own_tensors_follow_its_ranks() -> None:
    model = WithFactors(nets.bert(), num_data=60, likelihood=Likelihood())
    guide, keep = Cores(model), some(model.space)
    optim = lrvd.optim.AdamW()
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    svi.step(**tokens())
    select(model, guide, optim, keep=keep)
    assert torch.equal(model.singular_values, torch.arange(1.0, 17)[keep])
    assert len(model.module_scale) == len(model.space.modules) == 3
    assert model.temperature.dim() == 0 and len(model.likelihood.shift) == 3
    assert len(guide.prior_width) == len(guide.log_width) == model.space.size
    svi.step(**tokens())


def test_a_tensor_that_belongs_to_no_ranks_is_refused_by_name() -> None:
    model = WithFactors(nets.bert(), num_data=60, likelihood=Likelihood(), size=20)
    guide, keep = Cores(model), some(model.space)
    before = same(model, guide)
    with pytest.raises(
        TypeError, match=r"'WithFactors.singular_values' has 20 .*override cuts\(keep\)"
    ):
        select(model, guide, keep=keep)
    assert all(torch.equal(a, b) for a, b in zip(before, same(model, guide)))


class Placed(WithFactors):
    """It says itself what becomes of its tensors."""

    def cuts(self, keep: Tensor) -> Any:
        first = torch.arange(len(keep)).nonzero().squeeze(-1)[keep[1:]]
        whole = torch.arange(len(keep), len(self.singular_values))
        return {self.singular_values: (0, torch.cat([first, whole]))}


def test_a_model_may_place_its_tensors_itself() -> None:
    model = Placed(nets.bert(), num_data=60, likelihood=Likelihood(), size=20)
    select(model, Cores(model), keep=some(model.space))
    assert len(model.singular_values) == model.space.size + 4
    assert len(model.module_scale) == 4  # not among its cuts


class Rigid(CoreLoRA):
    """Its draw has the size of the ranks that it was made with."""

    def __init__(self, net: Any, **arguments: Any) -> None:
        super().__init__(net, **arguments)
        self.size = sum(r * r for r in self.space.ranks)

    def draw(self) -> Tensor:
        core: Tensor = pyro.sample(
            "core", dist.Normal(torch.ones(self.size), 1.0).to_event(1)
        )
        return core


def test_a_draw_that_does_not_follow_is_refused_before_anything_changes() -> None:
    model = Rigid(nets.bert(), num_data=60)
    guide = Cores(model)
    weight = model.space.weights("lora_B")[0].requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    before, space = same(model, guide), model.space
    with pytest.raises(
        TypeError,
        match="Rigid or its guide does not follow .* it fails",
    ):
        select(model, guide, keep=some(space))
    assert all(torch.equal(a, b) for a, b in zip(before, same(model, guide)))
    assert model.space is space and torch.equal(weight.grad, torch.ones_like(weight))


class Scalar(Uniform):
    """A guide with one number for all components, and a buffer for each."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.shift = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("seen", torch.arange(float(self.space.size)))


def test_a_guides_scalars_stay_and_its_buffers_are_cut() -> None:
    model = GateLoRA(nets.bert(), num_data=60)
    guide, keep = Scalar(model), some(model.space)
    select(model, guide, keep=keep)
    assert torch.equal(guide.seen, torch.arange(16.0)[keep])
    assert guide.shift.dim() == 0 and len(guide.log_width) == 6


class Fixed(nn.Module):
    """A prior whose draw ignores the space."""

    def forward(self, space: RankSpace) -> Tensor:
        return pyro.sample("gate", dist.Normal(torch.ones(16), 1.0).to_event(1))


def test_gradients_survive_a_refused_selection() -> None:
    model = GateLoRA(nets.bert(), num_data=60, prior=Fixed())
    guide = RankDiagonal(model)
    lrvd.RankELBO()(model, guide)(**tokens()).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(TypeError, match="GateLoRA or its guide does not follow"):
        select(model, guide, keep=some(model.space))
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after))


class Shared(Uniform):
    """Its width is the prior's own number for each rank: empirical Bayes."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.log_width = model.prior.log_gamma


@pytest.mark.filterwarnings("ignore:no closed form")
def test_a_tensor_that_guide_and_prior_share_is_cut_once() -> None:
    model = GateLoRA(nets.bert(), num_data=60, prior=lrvd.priors.ARD())
    guide, keep = Shared(model), some(model.space)
    optim = lrvd.optim.AdamW()
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    svi.step(**tokens())
    before = guide.log_width.detach().clone()
    select(model, guide, optim, keep=keep)
    assert guide.log_width is model.prior.log_gamma
    assert torch.equal(guide.log_width, before[keep])
    svi.step(**tokens())


class Wide(Uniform):
    """Its state has another layout than one row per rank component."""

    def __init__(self, model: Any, shape: tuple[int, ...], name: str) -> None:
        super().__init__(model)
        setattr(self, name, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("shape", "name"), [((1, 16), "row"), ((16, 16), "matrix"), ((4, 16), "module_row")]
)
def test_a_guides_tensor_of_two_rank_dimensions_is_refused(
    shape: tuple[int, ...], name: str
) -> None:
    model = GateLoRA(nets.bert(), num_data=60)
    guide = Wide(model, shape, name)
    before = same(model, guide)
    with pytest.raises(TypeError, match=rf"'Wide.{name}' has shape .*override cuts"):
        select(model, guide, keep=some(model.space))
    assert all(torch.equal(a, b) for a, b in zip(before, same(model, guide)))


class Plain(Uniform):
    """It keeps a number for each rank where no cut reaches it."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.factor = torch.ones(self.space.size)

    def mean(self) -> Tensor:
        return self.factor


def test_a_guide_that_does_not_follow_is_refused_before_anything_changes() -> None:
    model = GateLoRA(nets.bert(), num_data=60)
    guide = Plain(model)
    before = same(model, guide)
    with pytest.raises(TypeError, match=r"Plain does not follow .*has \[6, 16\] entr"):
        select(model, guide, keep=some(model.space))
    assert all(torch.equal(a, b) for a, b in zip(before, same(model, guide)))


class Scaled(CoreLoRA):
    """Its draw has a latent number and a parameter of Pyro's store."""

    def draw(self) -> Tensor:
        scale = pyro.param("own_scale", self.space.ones())
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        core: Tensor = super().draw() * top * scale.mean()
        return core


def test_a_scalar_site_is_no_obstacle_and_the_store_stays_as_it_is() -> None:
    model = Scaled(nets.bert(), num_data=60)
    model.draw()
    select(model, Cores(model), keep=some(model.space))
    assert len(pyro.param("own_scale")) == 16 and model.space.size == 6


def test_a_prior_that_makes_its_parameters_late_is_cut_all_the_same() -> None:
    class Own(lrvd.models.RankModel):
        binds = "gates"

        def draw(self) -> Tensor:
            gate: Tensor = self.prior(self.space)
            return gate

        bind, factors = GateLoRA.bind, GateLoRA.factors

    model = Own(nets.bert(), num_data=60, prior=lrvd.priors.ARD())
    select(model, Uniform(model), keep=some(model.space))
    assert len(model.prior.log_gamma) == 6


def test_a_mask_that_is_no_tensor_is_refused_by_name() -> None:
    model = GateLoRA(nets.bert(), num_data=60)
    keep: Any = [True] * 16
    with pytest.raises(TypeError, match="keep is a list; expected a tensor"):
        select(model, RankDiagonal(model), keep=keep)
