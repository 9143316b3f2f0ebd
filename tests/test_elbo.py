"""RankELBO against programs whose evidence or ELBO is known in closed form."""

import math
import pickle
import warnings
from typing import Any

import pyro
import pytest
import torch
from nets import bert, regression, tokens
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch import Tensor, nn
from torch.distributions import constraints

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.noise import PerExample

N, B, R = 12, 6, 6  # B == R: the case in which wrong broadcasting is silent
SEEDED = torch.Generator().manual_seed(1)
FEATURES = torch.randn(N, R, generator=SEEDED, dtype=torch.float64)
LABELS = torch.randn(N, generator=SEEDED, dtype=torch.float64)
SD = 0.8


def regress(gate: Tensor, x: Tensor, labels: Tensor | None) -> None:
    """Linear regression on gates, drawn once per batch or once per example."""
    with pyro.plate("data", N, subsample=torch.empty(len(x))):
        pyro.sample("labels", dist.Normal((x * gate).sum(-1), SD), obs=labels)


def flat_model(x: Tensor, labels: Tensor | None = None) -> None:
    regress(pyro.sample("gate", dist.Normal(torch.ones(R), 2.0).to_event(1)), x, labels)


def flat_guide(x: Tensor, labels: Tensor | None = None) -> None:
    loc = torch.linspace(-1, 1, R)
    pyro.sample("gate", dist.Normal(loc, torch.linspace(0.3, 0.9, R)).to_event(1))


def flat_elbo() -> float:
    loc, scale = torch.linspace(-1, 1, R), torch.linspace(0.3, 0.9, R)
    mean = FEATURES @ loc
    spread = FEATURES.square() @ scale.square()
    fit = -0.5 * ((LABELS - mean) ** 2 + spread) / SD**2
    fit = fit - math.log(SD) - 0.5 * math.log(2 * math.pi)
    kl = torch.distributions.kl_divergence(
        dist.Normal(loc, scale), dist.Normal(torch.ones(R), 2.0)
    )
    return float(fit.sum()), float(kl.sum())


def hierarchical_model(x: Tensor, labels: Tensor | None = None) -> None:
    """Three levels: a global scale, two group scales, a gate per rank component."""
    top = pyro.sample("top", dist.LogNormal(torch.zeros(1), 0.5).to_event(1))
    groups = dist.LogNormal(top.log().expand(*top.shape[:-1], 2), 0.3).to_event(1)
    scale = pyro.sample("group", groups)
    each = scale[..., torch.tensor([0, 0, 0, 1, 1, 1])]
    regress(pyro.sample("gate", dist.Normal(0.0, each).to_event(1)), x, labels)


def hierarchical_guide(x: Tensor, labels: Tensor | None = None) -> None:
    pyro.sample("top", dist.LogNormal(torch.full((1,), 0.1), 0.2).to_event(1))
    pyro.sample("group", dist.LogNormal(torch.tensor([0.1, -0.2]), 0.2).to_event(1))
    flat_guide(x, labels)


def batches(count: int) -> list[dict[str, Tensor]]:
    picks = [torch.randperm(N)[:B] for _ in range(count)]
    return [{"x": FEATURES[i], "labels": LABELS[i]} for i in picks]


def estimate(elbo: Any, model: Any, guide: Any, count: int) -> tuple[float, float]:
    """Mean and standard error of the loss over random batches."""
    with torch.no_grad():
        losses = [elbo.differentiable_loss(model, guide, **b) for b in batches(count)]
    stack = torch.stack([torch.as_tensor(x) for x in losses])
    return float(stack.mean()), float(stack.std() / count**0.5)


@pytest.mark.parametrize("kl_weight", [1.0, 3.0])
@pytest.mark.parametrize("noise", ["example", "batch"])
def test_loss_is_unbiased_for_the_elbo_of_all_data(
    noise: Any, kl_weight: float
) -> None:
    fit, kl = flat_elbo()
    elbo = lrvd.RankELBO(noise=noise, kl_weight=kl_weight)
    mean, error = estimate(elbo, flat_model, flat_guide, 1500)
    assert abs(mean - (kl_weight * kl - fit)) < 5 * error
    # the twin: counting the KL once per example is told apart
    assert abs(mean - (B * kl_weight * kl - fit)) > 5 * error


@pytest.mark.parametrize("kl_weight", [1.0, 3.0])
def test_hierarchy_is_drawn_per_example_without_bias(kl_weight: float) -> None:
    per_example = lrvd.RankELBO(kl_weight=kl_weight)
    per_batch = lrvd.RankELBO(kl_weight=kl_weight, noise="batch")
    one, e1 = estimate(per_example, hierarchical_model, hierarchical_guide, 2000)
    two, e2 = estimate(per_batch, hierarchical_model, hierarchical_guide, 2000)
    assert abs(one - two) < 5 * math.hypot(e1, e2)


def test_it_agrees_with_pyros_trace_elbo() -> None:
    for model, guide in (
        (flat_model, flat_guide),
        (hierarchical_model, hierarchical_guide),
    ):
        ours, e1 = estimate(lrvd.RankELBO(), model, guide, 1500)
        batch = batches(1500)
        losses = torch.tensor([Trace_ELBO().loss(model, guide, **b) for b in batch])
        error = math.hypot(e1, float(losses.std() / len(batch) ** 0.5))
        assert abs(ours - float(losses.mean())) < 5 * error


def test_every_level_of_a_hierarchy_has_one_draw_per_example() -> None:
    with PerExample(B), poutine.trace() as run:
        hierarchical_guide(FEATURES[:B])
    shapes = {name: tuple(s["value"].shape) for name, s in run.trace.nodes.items()}
    assert shapes == {"top": (B, 1), "group": (B, 2), "gate": (B, R)}
    for name, rows in shapes.items():
        assert len(run.trace.nodes[name]["value"].unique(dim=0)) == rows[0]


def test_density_per_example_sums_to_its_mean() -> None:
    with PerExample(B), poutine.trace() as run:
        flat_guide(FEATURES[:B])
    site = run.trace.nodes["gate"]
    run.trace.compute_log_prob()
    expected = site["fn"].log_prob(site["value"]).mean()
    torch.testing.assert_close(site["log_prob_sum"], expected)


def test_the_exact_posterior_has_the_evidence_at_every_draw() -> None:
    """With Trace_ELBO's estimator the loss at q = posterior has no variance."""
    precision = FEATURES.T @ FEATURES / SD**2 + torch.eye(R) / 4
    covariance = precision.inverse()
    mean = covariance @ (FEATURES.T @ LABELS / SD**2 + torch.ones(R) / 4)

    def posterior(x: Tensor, labels: Tensor | None = None) -> None:
        pyro.sample("gate", dist.MultivariateNormal(mean, covariance))

    evidence = dist.MultivariateNormal(
        FEATURES.sum(1), 4 * FEATURES @ FEATURES.T + SD**2 * torch.eye(N)
    ).log_prob(LABELS)
    elbo = lrvd.RankELBO(noise="batch")
    with pytest.warns(UserWarning, match="no closed form of KL"):
        first = elbo.loss(flat_model, posterior, x=FEATURES, labels=LABELS)
    again = [elbo.loss(flat_model, posterior, x=FEATURES, labels=LABELS) for _ in "123"]
    torch.testing.assert_close(torch.tensor([first, *again]), -evidence.expand(4))


def lognormal_model(**batch: Any) -> None:
    pyro.sample("gate", dist.LogNormal(torch.zeros(R), 1.0).to_event(1))


@pytest.mark.filterwarnings("ignore:no closed form")
@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal])
def test_autoguides_on_positive_sites_keep_their_log_density(auto: Any) -> None:
    """Without data the optimum is the prior: loss 0, log gate centred on 0."""

    def fit(loss: Any) -> tuple[float, float]:
        pyro.clear_param_store()
        guide = auto(lognormal_model)
        optim = pyro.optim.Adam({"lr": 0.05})
        svi = SVI(lognormal_model, guide, optim, loss=loss)
        for _ in range(400):
            svi.step(x=torch.zeros(B))
        losses = [svi.evaluate_loss(x=torch.zeros(B)) for _ in range(50)]
        return sum(losses) / 50, float(guide.median()["gate"].log().mean())

    loss, centre = fit(lrvd.RankELBO())
    assert abs(loss) < 0.1 * R and abs(centre) < 0.15
    # the twin: Pyro's own estimator drops the term and ends elsewhere
    loss, centre = fit(TraceMeanField_ELBO())
    assert loss < -0.3 * R and centre < -0.5


@pytest.mark.filterwarnings("ignore:no closed form")
@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_autoguide_parameters_do_not_grow_with_the_batch(auto: Any) -> None:
    guide = auto(flat_model)
    elbo = lrvd.RankELBO()
    elbo.loss(flat_model, guide, x=FEATURES[:B], labels=LABELS[:B])
    assert max(p.shape[0] for p in guide.parameters()) == R
    elbo.loss(flat_model, guide, x=FEATURES[:2], labels=LABELS[:2])


@pytest.mark.filterwarnings("ignore:no closed form")
def test_joint_guides_have_one_joint_divergence() -> None:
    elbo = lrvd.RankELBO()
    guide = AutoMultivariateNormal(flat_model)
    elbo.loss(flat_model, guide, x=FEATURES, labels=LABELS)
    assert elbo.terms["kl"].keys() == {"total", "joint"}


def test_terms_add_up_to_the_loss_and_are_tensors() -> None:
    elbo = lrvd.RankELBO(kl_weight=0.5, num_particles=3)
    loss = elbo.differentiable_loss(
        hierarchical_model, hierarchical_guide, x=FEATURES, labels=LABELS
    )
    terms = elbo.terms
    assert terms["kl"].keys() == {"total", "top", "group", "gate"}
    parts = [v for k, v in terms["kl"].items() if k != "total"]
    torch.testing.assert_close(sum(parts), terms["kl"]["total"])
    total = terms["kl_weight"] * terms["kl"]["total"] - terms["log_likelihood"]
    torch.testing.assert_close(loss.detach(), total)
    assert not any(t.requires_grad for t in [*parts, terms["log_likelihood"]])


def test_a_pair_without_closed_form_is_named_once() -> None:
    def model(**batch: Any) -> None:
        pyro.sample("gate", dist.StudentT(3.0, torch.zeros(R)).to_event(1))

    elbo = lrvd.RankELBO()
    with pytest.warns(UserWarning, match=r"KL\(Normal \|\| StudentT\) at site 'gate'"):
        elbo.loss(model, flat_guide, x=FEATURES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elbo.loss(model, flat_guide, x=FEATURES)


def test_steps_count_optimisation_losses_only() -> None:
    seen: list[int] = []

    def weight(step: int) -> float:
        seen.append(step)
        return 1.0

    def guide(x: Tensor, labels: Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.zeros(R))
        pyro.sample("gate", dist.Normal(loc, 1.0).to_event(1))

    elbo = lrvd.RankELBO(kl_weight=weight, num_particles=4)
    svi = SVI(flat_model, guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo)
    svi.step(x=FEATURES, labels=LABELS)
    svi.evaluate_loss(x=FEATURES, labels=LABELS)
    elbo(flat_model, guide)(x=FEATURES, labels=LABELS)
    assert seen == [0, 1, 1] and elbo.step == 2
    other = lrvd.RankELBO()
    other.load_state_dict(elbo.state_dict())
    assert other.step == 2


def test_linear_warmup_starts_at_zero_and_stays_at_one() -> None:
    assert [lrvd.linear_warmup(2)(s) for s in range(4)] == [0.0, 0.5, 1.0, 1.0]


class Noisy(pyro.nn.PyroModule):
    """A guide whose noise can be switched off."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on, self.log_scale = on, nn.Parameter(torch.zeros(R))

    def forward(self, *args: Any, **batch: Any) -> None:
        scale = self.log_scale.exp()
        fn = dist.Normal(torch.ones(R), scale).to_event(1)
        draw = fn.rsample() if self.on else torch.ones(R)
        pyro.sample("gate", dist.Delta(draw, fn.log_prob(draw), event_dim=1))


def test_noise_switched_off_is_said_at_the_first_step() -> None:
    elbo = lrvd.RankELBO(noise="batch")
    with pytest.warns(UserWarning, match="log_scale.*the noise is off"):
        elbo.differentiable_loss(flat_model, Noisy(False), x=FEATURES, labels=LABELS)
    # the twin: with noise on there is no warning (warnings are errors here)
    pyro.clear_param_store()
    elbo = lrvd.RankELBO(noise="batch")
    elbo.differentiable_loss(flat_model, Noisy(True), x=FEATURES, labels=LABELS)


def test_nan_is_named_with_step_and_term_and_nothing_is_lost() -> None:
    model = GateLoRA(bert(), num_data=60)
    guide = RankDiagonal(model)
    svi = SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    batch = tokens()
    svi.step(**batch)
    head = model.base_net.base_model.model.classifier.modules_to_save.default
    before = [p.clone() for p in model.parameters()]
    bad = {**batch, "inputs_embeds": torch.full((6, 5, 16), math.nan)}
    del bad["input_ids"]
    with pytest.raises(
        ValueError, match=r"log_likelihood is nan at step 1; the parameters are"
    ):
        svi.step(**bad)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    svi.step(**batch)
    assert head.weight.isfinite().all()


def test_check_names_the_term_in_the_torch_driver() -> None:
    model = GateLoRA(bert(), num_data=60)
    guide = RankDiagonal(model)
    with torch.no_grad():
        guide.log_variance[0] = math.nan
    elbo = lrvd.RankELBO()
    elbo(model, guide)(**tokens())
    with pytest.raises(ValueError, match="kl.*is nan at step 0"):
        elbo.check()


def test_unknown_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="noise='token'; expected \"example\""):
        lrvd.RankELBO(noise="token")  # type: ignore[arg-type]


def test_guide_over_the_wrong_sites_is_refused() -> None:
    def guide(x: Tensor, labels: Tensor | None = None) -> None:
        pyro.sample("gates", dist.Normal(torch.ones(R), 1.0).to_event(1))

    with pytest.raises(
        ValueError, match=r"latent sites \['gate'\] but the guide draws"
    ):
        lrvd.RankELBO().loss(flat_model, guide, x=FEATURES, labels=LABELS)


def test_training_without_labels_is_refused() -> None:
    model = GateLoRA(bert(), num_data=60)
    with pytest.raises(
        ValueError, match=r"\['gate', 'labels'\].*give the batch its lab"
    ):
        lrvd.RankELBO().loss(model, RankDiagonal(model), **tokens(labels=False))


def test_local_parameters_of_pyro_work_with_a_torch_optimiser() -> None:
    with pyro.settings.context(module_local_params=True):
        model = GateLoRA(bert(), num_data=60)
        guide = RankDiagonal(model)
        loss = lrvd.RankELBO()(model, guide)
        loss(**tokens()).backward()
        assert guide.log_variance.grad.abs().sum() > 0
        assert len(list(pyro.get_param_store().keys())) == 0


@pytest.mark.parametrize("auto", [AutoDelta, AutoIAFNormal])
def test_guides_without_a_minimum_under_the_log_uniform_are_refused(auto: Any) -> None:
    model = GateLoRA(bert(), num_data=60)
    guide = auto(model)
    with pytest.raises(
        ValueError, match=r"log-uniform prior, .*\['\w+'\] has no minimum"
    ):
        lrvd.RankELBO().loss(model, guide, **tokens())


@pytest.mark.filterwarnings("ignore:no closed form")
@pytest.mark.parametrize(
    "auto", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
)
def test_gaussian_autoguides_train_under_the_log_uniform(auto: Any) -> None:
    model = GateLoRA(bert(), num_data=60)
    start = init_to_value(values={"gate": torch.ones(model.space.size)})
    guide = auto(model, init_loc_fn=start)
    svi = SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    svi.step(**tokens())
    after = [p for p in model.parameters() if p.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(before, after))


def test_guide_that_is_not_reparameterised_is_refused() -> None:
    def guide(x: Tensor, labels: Tensor | None = None) -> None:
        pyro.sample("gate", dist.Poisson(torch.ones(R)).to_event(1))

    with pytest.raises(ValueError, match="draws from Poisson, which is not reparam"):
        lrvd.RankELBO().loss(flat_model, guide, x=FEATURES, labels=LABELS)


def test_scale_in_the_model_alone_is_refused() -> None:
    scaled = poutine.scale(flat_model, scale=10.0)
    with pytest.raises(
        ValueError, match="scale 0.08.* in the guide and 0.8.* in the model"
    ):
        lrvd.RankELBO().loss(scaled, flat_guide, x=FEATURES, labels=LABELS)


@pytest.mark.parametrize("wrap", ["tensor", "mask"])
def test_a_tensor_scale_or_a_mask_in_the_model_alone_is_refused(wrap: str) -> None:
    scaled: Any = poutine.scale(flat_model, scale=torch.tensor(10.0))
    masked: Any = poutine.mask(flat_model, mask=False)
    model = scaled if wrap == "tensor" else masked
    with pytest.raises(ValueError, match="in the guide and .* in the model; wrap both"):
        lrvd.RankELBO().loss(model, flat_guide, x=FEATURES, labels=LABELS)


def test_a_guide_without_its_event_dimension_is_refused() -> None:
    def guide(x: Tensor, labels: Tensor | None = None) -> None:
        pyro.sample("gate", dist.Normal(torch.ones(R), 1.0))

    with pytest.raises(ValueError, match=r"0 event dimensions .*write .to_event\(1\)"):
        lrvd.RankELBO().loss(flat_model, guide, x=FEATURES[:R], labels=LABELS[:R])


def test_a_guide_of_another_network_is_told_apart() -> None:
    model = FactorLoRA(bert(), num_data=60)
    guide = RankDiagonal(FactorLoRA(bert(), num_data=60))
    elbo = lrvd.RankELBO()
    with pytest.warns(
        UserWarning, match="model's parameters .*lora_A.* stay as they are"
    ):
        elbo.differentiable_loss(model, guide, **tokens())


def test_options_out_of_range_are_refused() -> None:
    for weight in ("0.5", None, -1.0):
        with pytest.raises(
            ValueError, match="kl_weight=.*; expected a number, 0 or more"
        ):
            lrvd.RankELBO(kl_weight=weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_particles=0; expected 1 or more"):
        lrvd.RankELBO(num_particles=0)
    with pytest.raises(ValueError, match="steps=-1; expected the length"):
        lrvd.linear_warmup(-1)
    assert lrvd.linear_warmup(0)(0) == 1.0


def test_a_used_elbo_pickles_and_goes_on() -> None:
    elbo = lrvd.RankELBO(kl_weight=lrvd.linear_warmup(2))
    elbo.differentiable_loss(flat_model, flat_guide, x=FEATURES, labels=LABELS)
    copied = pickle.loads(pickle.dumps(elbo))
    copied.differentiable_loss(flat_model, flat_guide, x=FEATURES, labels=LABELS)
    assert (elbo.step, copied.step) == (1, 2) and copied.terms["kl_weight"] == 0.5


def test_setting_up_a_guide_moves_no_random_state() -> None:
    first, second = lrvd.RankELBO(), lrvd.RankELBO()
    batch = {"x": FEATURES, "labels": LABELS}
    second.loss(flat_model, flat_guide, **batch)  # sets the guide up
    losses = []
    for elbo in (first, second):
        torch.manual_seed(0)
        losses.append(elbo.loss(flat_model, flat_guide, **batch))
    assert losses[0] == losses[1]


class Recorded(dist.Normal):
    """A Normal that notes the batch shapes whose KL is asked for."""

    asked: list[torch.Size] = []


@torch.distributions.register_kl(Recorded, dist.Normal)
def recorded_kl(q: Recorded, p: dist.Normal) -> Tensor:
    Recorded.asked.append(q.batch_shape)
    plain = dist.Normal(q.loc, q.scale)
    return torch.distributions.kl_divergence(plain, p)


def test_kl_is_computed_once_for_a_batch_that_shares_its_parameters() -> None:
    def guide(x: Tensor, labels: Tensor | None = None) -> None:
        pyro.sample("gate", Recorded(torch.ones(R), 0.5).to_event(1))

    Recorded.asked.clear()
    lrvd.RankELBO().loss(flat_model, guide, x=FEATURES, labels=LABELS)
    assert Recorded.asked == [torch.Size([R])]


def test_the_data_plate_draws_no_subsample() -> None:
    before = torch.get_rng_state()
    lrvd.likelihoods.Categorical()(torch.zeros(6, 3), torch.zeros(6).long(), 60)
    assert torch.equal(before, torch.get_rng_state())


def test_batch_without_tensors_is_refused() -> None:
    with pytest.raises(TypeError, match=r"the batch \['x'\] holds no tensor"):
        lrvd.RankELBO().loss(flat_model, flat_guide, x=[1, 2])


def test_one_gate_per_example_has_less_variance_at_large_noise() -> None:
    """The gradient for log alpha over random batches, against one draw per batch."""
    ratio = {}
    net = regression(features=5, r=R)
    x = torch.randn(96, 5)
    y = (net(x).squeeze(1) + torch.randn(96)).detach()
    for log_alpha in (-4.0, 0.0, 2.0, 4.0):
        variance = {}
        for noise in ("example", "batch"):
            model = GateLoRA(net, num_data=96, likelihood=lrvd.likelihoods.Normal())
            guide = RankDiagonal(model, init_log_alpha=log_alpha)
            elbo = lrvd.RankELBO(noise=noise)  # type: ignore[arg-type]
            gradients = []
            for _ in range(400):
                rows = torch.randperm(96)[:8]
                loss = elbo.differentiable_loss(model, guide, x=x[rows], labels=y[rows])
                gradients += torch.autograd.grad(loss, [guide.log_variance])
            variance[noise] = torch.stack(gradients).var(0)
        ratio[log_alpha] = float((variance["example"] / variance["batch"]).median())
    assert ratio[-4.0] < 1.5 and ratio[0.0] < 1.3, ratio
    assert ratio[2.0] < 0.75 and ratio[4.0] < 0.75, ratio


def test_positive_constraint_of_learned_noise_trains() -> None:
    net = regression()
    model = GateLoRA(net, num_data=20, likelihood=lrvd.likelihoods.Normal(3.0))
    guide = RankDiagonal(model)
    svi = SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    x = torch.randn(20, 5)
    for _ in range(100):
        svi.step(x=x, labels=torch.zeros(20))
    assert float(model.likelihood.scale.detach()) < 3.0
    assert constraints.positive.check(model.likelihood.scale)
