"""What goes: by log alpha, or by what it would cost; and never everything."""

import math
from typing import Any

import nets
import pytest
import torch
from pairs import rank_guide
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import kl_divergence

from lrvd_pyro import priors
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.selection.criteria import prune, removal_cost

close = torch.testing.assert_close


def noisy(log_alpha: Tensor, prior: Any = None) -> tuple[GateLoRA, RankDiagonal]:
    """A pair with these log alphas; positive gates have log(e^v - 1)."""
    model = GateLoRA(nets.perceptron(), num_data=60, prior=prior)
    guide = rank_guide(model)
    alpha = log_alpha.exp()
    variance = alpha if prior is None else alpha.log1p()
    with torch.no_grad():
        guide.log_variance.copy_(variance.log())
    return model, guide


@pytest.mark.parametrize("prior", [None, priors.Horseshoe(levels=["rank"])])
def test_components_above_the_threshold_go(prior: Any) -> None:
    log_alpha = torch.tensor([2.9, 3.1, -1.0, 5.0, 3.1, 4.0, 2.99, 0.0])
    model, guide = noisy(log_alpha, prior)
    close(guide.log_alpha, log_alpha)
    keep = prune(model, guide)
    assert keep.tolist() == (log_alpha < 3).tolist()
    assert model.space.ranks == (2, 2) and guide.log_alpha.max() < 3
    assert prune(model, guide).all()  # what stayed, stays
    assert prune(model, guide, log_alpha_threshold=-0.5).tolist() == [0, 1, 0, 0]
    assert model.space.ranks == (1,)


def test_each_module_keeps_its_best_min_rank_components() -> None:
    log_alpha = torch.tensor([6.0, 5.0, 4.0, 3.5, 9.0, 1.0, 9.0, 9.0])
    for least, kept in ((0, [5]), (1, [3, 5]), (2, [2, 3, 4, 5]), (9, [*range(8)])):
        model, guide = noisy(log_alpha.clone().clamp(max=8.0))
        keep = prune(model, guide, min_rank=least)
        assert len(kept) == int(keep.sum()) and keep[3] == (3 in kept) and keep[5]
    with pytest.raises(
        ValueError, match="min_rank=-1; expected a whole number, 0 or more"
    ):
        prune(model, guide, min_rank=-1)


@pytest.mark.parametrize("family", [GateLoRA, FactorLoRA])
@pytest.mark.parametrize("criterion", ["log_alpha", "elbo_drop"])
def test_if_everything_would_go_a_diagnosis_says_why_and_nothing_changes(
    family: Any, criterion: Any
) -> None:
    model = family(nets.bert(), num_data=60)
    guide = rank_guide(model, init_log_alpha=4.0)
    modules = [p.detach().clone() for p in [*model.parameters(), *guide.parameters()]]
    message = r"all 16 rank components .* 4.00 and 4.00, .*num_data=60.*linear_warmup"
    with pytest.raises(ValueError, match=message):
        prune(model, guide, criterion=criterion, max_drop=100.0)
    assert model.space.ranks == (4, 4, 4, 4)
    after = [p.detach() for p in [*model.parameters(), *guide.parameters()]]
    close(after, modules, rtol=0, atol=0)
    assert int(prune(model, guide, min_rank=1).sum()) == 4


def test_a_diverged_guide_and_unknown_criteria_are_refused() -> None:
    model, guide = noisy(torch.zeros(8))
    with pytest.raises(ValueError, match="criterion='snr'; expected \"log_alpha\""):
        prune(model, guide, criterion="snr")  # type: ignore[arg-type]
    with torch.no_grad():
        guide.log_variance[2] = math.nan
    with pytest.raises(ValueError, match="NaN for 1 of 8 components"):
        prune(model, guide)
    with pytest.raises(TypeError, match=r"AutoNormal; .*RankDiagonal\(model\)"):
        prune(model, AutoNormal(model))  # type: ignore[arg-type]


# The cost of a removal


class Linear:
    """A Gaussian regression whose expected log-likelihood is known in closed form.

    The inputs are orthogonal, the teacher has singular values 2, 0.5 and 0.15.
    """

    N, SD = 40, 0.5

    def __init__(self, family: Any, kl_weight: float, **options: Any) -> None:
        self.x = torch.linalg.qr(torch.randn(self.N, 4))[0] * math.sqrt(self.N)
        left, right = (torch.linalg.qr(torch.randn(n, 3))[0] for n in (3, 4))
        self.teacher = left * torch.tensor([2.0, 0.5, 0.15]) @ right.T
        self.model = family(nets.regression(4, 3, 3), num_data=self.N, **options)
        self.guide = rank_guide(self.model)
        self.kl_weight = kl_weight
        (self.A,) = self.model.space.weights("lora_A")
        (self.B,) = self.model.space.weights("lora_B")
        with torch.no_grad():
            self.A.copy_(right.T)
            self.B.copy_(left * torch.tensor([2.0, 0.5, 0.15]))

    def fit(self, present: Tensor) -> Tensor:
        """E_q[log p(y | x)], with the components where ``present`` is 0 removed."""
        (_, q), *_ = self.guide.distributions().items()
        gated = len(q.mean) == 3
        A, B = self.A, self.B * present
        if gated:
            q, B = dist.Normal(1.0, q.stddev / q.mean), B * q.mean
        misfit = (self.x @ (self.teacher - B @ A).T).square().sum()
        activity, size = (self.x @ A.T).square().sum(0), B.square().sum(0)
        if gated:
            noise = q.variance * activity * size
        else:  # of A, and where B is random of B and of both
            var_A = q.variance[:12].view(3, 4)[:, 0] * self.x.square().sum()
            var_B = (
                3 * present * q.variance[12:].view(-1, 3)[:, 0]
                if len(q.mean) > 12
                else 0
            )
            noise = activity * var_B + var_A * (size + var_B)
        return -(misfit + noise.sum()) / (2 * self.SD**2)

    def loss(self) -> Tensor:
        (name, q), *_ = self.guide.distributions().items()
        kl = kl_divergence(q.to_event(1), self.model.latent_sites()[name])
        return self.kl_weight * kl - self.fit(torch.ones(3))

    def train(self) -> None:
        params: list[nn.Parameter] = [self.A, self.B, self.guide.log_variance]
        optim = torch.optim.LBFGS(params, max_iter=500, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optim.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        optim.step(closure)
        assert max(p.grad.abs().max() for p in params) < 0.01

    def losses(self) -> Tensor:
        """What each component's removal costs, by removing it."""
        with torch.no_grad():
            each = [self.fit(1 - row) for row in torch.eye(3)]
            return self.fit(torch.ones(3)) - torch.stack(each)


@pytest.mark.parametrize(
    "family, options, kl_weight, error",
    [
        (GateLoRA, {}, 1.0, 1e-3),
        (GateLoRA, {}, 0.1, 1e-3),
        (GateLoRA, {"prior": priors.Horseshoe(levels=["rank"])}, 1.0, 1e-3),
        (GateLoRA, {"prior": priors.TruncatedLogUniform()}, 0.1, 0.01),
        (GateLoRA, {"prior": priors.Normal()}, 1.0, 1e-3),
        (FactorLoRA, {}, 0.1, 1e-3),
        (FactorLoRA, {"sides": ("lora_A", "lora_B")}, 0.1, 0.2),
    ],
)
def test_the_cost_of_a_removal_is_what_removing_it_costs(
    family: Any, options: Any, kl_weight: float, error: float
) -> None:
    case = Linear(family, kl_weight, **options)
    case.train()
    if kl_weight == 1.0 and not options:  # beyond the limit of little noise
        assert case.guide.log_alpha.max() > -1.5
    cost = removal_cost(case.model, case.guide, kl_weight)
    close(cost, case.losses(), rtol=error, atol=0.0)
    with torch.no_grad():
        case.guide.log_variance += 1.0  # no stationary point
    cost = removal_cost(case.model, case.guide, kl_weight)
    assert (cost / case.losses()).log().abs().max() > 0.5


def test_components_go_while_their_cost_stays_within_the_drop() -> None:
    case = Linear(GateLoRA, 1.0)
    case.train()
    cost = removal_cost(case.model, case.guide)
    least = float(cost.min())
    kept = prune(
        case.model, case.guide, criterion="elbo_drop", max_drop=0.9 * least / 40
    )
    assert kept.all()
    kept = prune(
        case.model, case.guide, criterion="elbo_drop", max_drop=1.1 * least / 40
    )
    assert kept.tolist() == (cost > least).tolist()


@pytest.mark.parametrize(
    "prior, message",
    [
        (priors.SpikeSlab(), "not a product of the latent sites"),
        (priors.Horseshoe(levels=["global", "module"]), "per rank component"),
    ],
)
def test_gates_without_noise_of_their_own_have_no_cost(
    prior: Any, message: str
) -> None:
    model = GateLoRA(nets.perceptron(), num_data=60, prior=prior)
    with pytest.raises(TypeError, match=message):
        removal_cost(model, rank_guide(model))


def test_scales_above_a_gate_are_averaged_over() -> None:
    model = GateLoRA(nets.perceptron(), num_data=60, prior=priors.Hierarchical())
    guide = rank_guide(model)
    cost = removal_cost(model, guide)
    assert cost.shape == (8,) and (cost > 0).all()
    state = torch.random.get_rng_state()
    close(removal_cost(model, guide), cost, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)
