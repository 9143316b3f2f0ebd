"""What RankELBO promises about steps, noise and errors, and what it refuses."""

import math
import pickle
import warnings
from typing import Any

import pyro
import pytest
import torch
from nets import bert, tokens
from pairs import rank_guide
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn
from toys import (
    FEATURES,
    LABELS,
    R,
    flat_guide,
    flat_model,
)

import lrvd_pyro as lrvd
from lrvd_pyro.models import GateLoRA


def test_a_pair_without_closed_form_is_named_once() -> None:
    def model(**batch: Any) -> None:
        pyro.sample("gate", dist.StudentT(3.0, torch.zeros(R)).to_event(1))

    elbo = lrvd.RankELBO()
    with pytest.warns(UserWarning, match=r"KL\(Normal \|\| StudentT\) at site 'gate'"):
        elbo.loss(model, flat_guide, x=FEATURES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elbo.loss(model, flat_guide, x=FEATURES)


def test_steps_count_optimization_losses_only() -> None:
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
    # the twin: with noise on nothing is warned of (warnings are errors here)
    pyro.clear_param_store()
    elbo = lrvd.RankELBO(noise="batch")
    elbo.differentiable_loss(flat_model, Noisy(True), x=FEATURES, labels=LABELS)


def test_nan_is_named_with_step_and_term_and_nothing_is_lost() -> None:
    model = GateLoRA(bert(), num_data=60)
    guide = rank_guide(model)
    svi = SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    batch = tokens()
    svi.step(**batch)
    head = model.base_net.base_model.model.classifier.modules_to_save.default
    before = [p.clone() for p in model.parameters()]
    bad = {**batch, "inputs_embeds": torch.full((6, 5, 16), math.nan)}
    del bad["input_ids"]
    with pytest.raises(
        ValueError, match=r"log_likelihood is nan at step 1. The parameters are"
    ):
        svi.step(**bad)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    svi.step(**batch)
    assert head.weight.isfinite().all()


def test_check_names_the_term_in_the_torch_driver() -> None:
    model = GateLoRA(bert(), num_data=60)
    guide = rank_guide(model)
    with torch.no_grad():
        guide.log_variance[0] = math.nan
    elbo = lrvd.RankELBO()
    elbo(model, guide)(**tokens())
    with pytest.raises(ValueError, match="kl.*is nan at step 0"):
        elbo.check()


def test_unknown_noise_is_refused() -> None:
    with pytest.raises(ValueError, match='noise=\'token\'; expected "auto", "example"'):
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
        lrvd.RankELBO().loss(model, rank_guide(model), **tokens(labels=False))


def test_local_parameters_of_pyro_work_with_a_torch_optimizer() -> None:
    with pyro.settings.context(module_local_params=True):
        model = GateLoRA(bert(), num_data=60)
        guide = rank_guide(model)
        loss = lrvd.RankELBO()(model, guide)
        loss(**tokens()).backward()
        assert guide.log_variance.grad.abs().sum() > 0
        assert len(list(pyro.get_param_store().keys())) == 0


def test_guide_that_is_not_reparameterized_is_refused() -> None:
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


@pytest.mark.filterwarnings("ignore:unused.weight.* of the base train:UserWarning")
def test_a_parameter_that_the_loss_does_not_reach_is_named() -> None:
    net = bert()
    net.base_model.model.unused = nn.Linear(2, 2)
    model = GateLoRA(net, num_data=60)
    elbo = lrvd.RankELBO()
    with pytest.warns(UserWarning, match=r"parameters \[.*unused.* stay as they are"):
        elbo.differentiable_loss(model, rank_guide(model), **tokens())


def test_options_out_of_range_are_refused() -> None:
    for weight in ("0.5", None, -1.0):
        with pytest.raises(
            ValueError, match="kl_weight=.*; expected a number, 0 or more"
        ):
            lrvd.RankELBO(kl_weight=weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_particles=0; expected a whole number"):
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
    """A Normal that records the batch shapes whose KL is computed."""

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
