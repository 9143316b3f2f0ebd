"""From Fisher information to noise, and from a trained adapter to a posterior."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from gauges import seeded
from nets import bert, hooks, perceptron, regression, tokens
from peft import AutoPeftModelForSequenceClassification
from pyro.infer import SVI
from torch import Tensor
from torch.distributions import kl_divergence

import lrvd_pyro as lrvd
from lrvd_pyro import priors
from lrvd_pyro.distributions import LogUniform as LogUniformDensity
from lrvd_pyro.gauge import bayesianize, gramians, hankel_values, optimal_alpha
from lrvd_pyro.likelihoods.categorical import Categorical
from lrvd_pyro.likelihoods.normal import Normal

FISHER = torch.logspace(-5, 5, 41, dtype=torch.float64)


def slope(fisher: Tensor, alpha: Tensor, kl: Any) -> Tensor:
    """The objective's derivative in log alpha, relative to that of its first term."""
    log_alpha = alpha.log().requires_grad_()
    ratio = log_alpha.exp()
    (found,) = torch.autograd.grad((fisher * ratio / 2 + kl(ratio)).sum(), log_alpha)
    return found / (fisher * alpha / 2)


def normal(ratio: Tensor) -> torch.distributions.Normal:
    import pyro.distributions as dist

    return dist.Normal(torch.ones_like(ratio), ratio.sqrt(), validate_args=False)


@pytest.mark.parametrize("weight", [0.1, 1.0, 768.0])
def test_alpha_under_the_log_uniform_prior_is_stationary(weight: float) -> None:
    alpha = optimal_alpha(FISHER, priors.LogUniform(weight))
    density = LogUniformDensity().expand([len(FISHER)])

    def kl(ratio: Tensor) -> Tensor:
        return weight * kl_divergence(normal(ratio), density)

    assert slope(FISHER, alpha, kl).abs().max() < 1e-6
    assert slope(FISHER, 1.1 * alpha, kl).min() > 1e-3


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_alpha_under_a_normal_prior_is_stationary(scale: float) -> None:
    alpha = optimal_alpha(FISHER, priors.Normal(scale))

    def kl(ratio: Tensor) -> Tensor:
        prior = torch.distributions.Normal(0.0, scale)
        return kl_divergence(normal(ratio), prior)

    assert slope(FISHER, alpha, kl).abs().max() < 1e-6 / scale**2 / FISHER.min()


def test_alpha_under_ard_is_stationary() -> None:
    alpha = optimal_alpha(FISHER, priors.ARD())
    assert slope(FISHER, alpha, lambda a: 0.5 * (1 / a).log1p()).abs().max() < 1e-6


def test_where_nothing_is_known_alpha_has_no_bound_but_the_prior() -> None:
    nothing = torch.zeros(1)
    assert optimal_alpha(nothing, priors.LogUniform()).isinf()
    assert optimal_alpha(nothing, priors.ARD()).isinf()
    assert optimal_alpha(nothing, priors.Normal(2.0)) == 4.0


def test_other_priors_and_bad_information_are_refused() -> None:
    with pytest.raises(TypeError, match="Horseshoe, under which alpha has no closed"):
        optimal_alpha(FISHER, priors.Horseshoe())
    for wrong in (-1.0, torch.nan):
        with pytest.raises(ValueError, match="expected finite values from 0"):
            optimal_alpha(torch.tensor([1.0, wrong]), priors.LogUniform())


def trained_bert() -> Any:
    torch.manual_seed(0)
    net = bert()
    batch = tokens(32)
    optim = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    for _ in range(30):
        optim.zero_grad()
        net(**batch).loss.backward()
        optim.step()
    return net.eval(), batch


def test_a_lora_from_disk_becomes_a_posterior(tmp_path: Path) -> None:
    net, batch = trained_bert()
    net.base_model.model.save_pretrained(tmp_path / "base")
    net.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    bert_only = bert().unload()
    bert_only.load_state_dict(
        {
            name.replace(".base_layer", "").replace(".original_module", ""): value
            for name, value in net.base_model.model.state_dict().items()
            if "lora_" not in name and "modules_to_save" not in name
        }
    )
    bert_only.save_pretrained(tmp_path / "base")
    net.save_pretrained(str(tmp_path / "adapter"))
    load: Any = AutoPeftModelForSequenceClassification.from_pretrained
    again = load(str(tmp_path / "adapter"), num_labels=3).eval()
    before = net(**batch).logits
    model, guide = bayesianize(
        again,
        [batch],
        likelihood=Categorical(),
        num_data=32,
        generator=seeded(),
    )
    with lrvd.posterior_mean(model, guide) as mean:
        torch.testing.assert_close(mean(**batch).logits, before, rtol=0, atol=1e-5)
    same = seeded()
    grams, second = (gramians(model, [batch], generator=same) for _ in range(2))
    expected = optimal_alpha(second.gate_fisher, priors.LogUniform())
    log_alpha = expected.log().clamp(max=8)
    torch.testing.assert_close(guide.log_alpha, log_alpha, rtol=1e-2, atol=1e-2)
    for name, t in hankel_values(grams).items():
        alive = t > 1e-2 * t[0]
        both = grams.gradients[name], grams.activations[name]
        own = (both[0].diagonal() * both[1].diagonal()).sqrt()
        torch.testing.assert_close(own[alive], t[alive], rtol=1e-3, atol=0)


def test_the_pair_predicts_prunes_exports_and_trains_on(tmp_path: Path) -> None:
    net, batch = trained_bert()
    model, guide = bayesianize(net, [batch], likelihood=Categorical())
    assert model.num_data == 32
    inputs = {name: v for name, v in batch.items() if name != "labels"}
    sampled = lrvd.predict(model, guide, [inputs], 8)
    assert sampled.mutual_information.mean() > 1e-4
    svi = SVI(model, guide, lrvd.optim.AdamW(lr=1e-3), loss=lrvd.RankELBO())
    losses = [svi.step(**batch) for _ in range(20)]
    assert sum(losses[-5:]) < sum(losses[:5])
    keep = lrvd.prune(model, guide, svi.optim, log_alpha_threshold=2.0)
    assert 0 < model.space.size == int(keep.sum()) < 16
    lrvd.export_peft(tmp_path / "small", model, guide, probe=inputs)


def test_the_one_pass_noise_is_where_svi_would_take_it() -> None:
    """Linear in the gates, the quadratic is exact: log alpha has reached its place."""
    torch.manual_seed(0)
    net = regression(r=3)
    x = torch.randn(200, 5)
    batch = {"x": x, "labels": (net(x).squeeze(-1) + torch.randn(200)).detach()}
    model, guide = bayesianize(net, [batch], likelihood=Normal(1.0))
    for parameter in (*model.net.parameters(), *model.likelihood.parameters()):
        parameter.requires_grad_(False)
    start = guide.log_alpha
    loss = lrvd.RankELBO(noise="batch", num_particles=512)
    pull = torch.autograd.grad(loss(model, guide)(**batch), guide.log_variance)[0]
    fisher = gramians(model, [batch], labels="sampled").gate_fisher
    live = start < 5
    assert live.any() and (pull.abs() / (fisher * start.exp() / 2))[live].max() < 0.5
    with torch.no_grad():
        guide.log_variance += 1.5
    pull = torch.autograd.grad(loss(model, guide)(**batch), guide.log_variance)[0]
    assert pull[live].min() > 0.5


def test_ard_gets_its_own_variances_too() -> None:
    net, batch = trained_bert()
    model, guide = bayesianize(
        net, [batch], likelihood=Categorical(), prior=priors.ARD()
    )
    alpha = guide.log_alpha.exp()
    assert alpha.max() > 1000  # at the guide's bound
    torch.testing.assert_close(model.prior.log_gamma.exp(), 1 + alpha)


def test_without_balancing_the_weights_stay() -> None:
    net, batch = trained_bert()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    bayesianize(net, [batch], likelihood=Categorical(), balance=False)
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())


def test_batches_that_end_and_priors_without_closed_form_change_nothing() -> None:
    net, batch = trained_bert()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(TypeError, match="can be read only once"):
        bayesianize(net, iter([batch]), likelihood=Categorical())
    with pytest.raises(TypeError, match="batches is one batch; expected several"):
        bayesianize(net, batch, likelihood=Categorical())
    with pytest.raises(TypeError, match="no closed form"):
        bayesianize(net, [batch], likelihood=Categorical(), prior=priors.Horseshoe())
    bare = perceptron()
    with pytest.raises(ValueError, match="got no batches"):
        bayesianize(bare, [], likelihood=Categorical())
    assert not any(module._forward_pre_hooks for module in bare.modules())
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())


class Interrupted(list[Any]):
    """Batches whose reader is interrupted at the end of its n-th pass."""

    def __init__(self, batches: list[Any], passes: int) -> None:
        super().__init__(batches)
        self.passes = passes

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        self.passes -= 1
        if not self.passes:
            raise KeyboardInterrupt


@pytest.mark.parametrize("passes", [1, 2])
def test_an_interrupted_bayesianize_leaves_nothing_in_pyros_store(passes: int) -> None:
    net, x = regression(), torch.randn(20, 5)
    batch = {"x": x, "labels": torch.randn(20)}
    with pytest.raises(KeyboardInterrupt):
        stopped = Interrupted([batch], passes)
        bayesianize(net, stopped, likelihood=Normal(), num_data=20)
    assert not pyro.get_param_store().keys()
    assert hooks(net) == 0
    model, _ = bayesianize(net, [batch], likelihood=Normal(), num_data=20)
    assert pyro.get_param_store().keys()  # the twin: what is left if nothing stops it
    model.release()
    assert not pyro.get_param_store().keys()


def test_a_loader_leaves_the_global_random_state_alone() -> None:
    net, batch = trained_bert()
    rows = [
        {name: value[i] for name, value in batch.items()}
        for i in range(len(batch["labels"]))
    ]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)  # type: ignore[arg-type]
    before = torch.get_rng_state()
    bayesianize(net, loader, likelihood=Categorical(), generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_of_two_adapters_the_active_one_is_taken_and_two_at_once_are_refused() -> None:
    net, batch = perceptron(), {"x": torch.randn(20, 5)}
    net.add_adapter("other", net.peft_config["default"])
    net.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"call net.set_adapter\('default'\)"):
        bayesianize(net, [batch], likelihood=Categorical(), adapter="default")
    net.set_adapter("default")
    model, _ = bayesianize(net, [batch], likelihood=Categorical(), adapter="default")
    assert model.space.adapter == "default"
