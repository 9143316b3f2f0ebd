"""Predictions under the posterior."""

from typing import Any

import pyro
import pytest
import torch
from nets import bert, lora, regression, tokens
from pairs import rank_guide
from pyro import distributions as dist
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from transformers import GPT2Config, GPT2LMHeadModel

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.categorical import CategoricalPrediction
from lrvd_pyro.likelihoods.normal import Normal
from lrvd_pyro.models import FactorLoRA, GateLoRA


@pytest.fixture(params=[GateLoRA, FactorLoRA])
def pair(request: Any) -> Any:
    model = request.param(bert(), num_data=60)
    return model, rank_guide(model, init_log_alpha=1.0)


def test_it_agrees_with_pyros_predictive_at_equal_draws(pair: Any) -> None:
    model, guide = pair
    batch = tokens(labels=False)
    (site,) = model.latent_sites()
    sites = (site, "_RETURN")
    drawn = Predictive(model, guide=guide, num_samples=7, return_sites=sites)(**batch)
    ours = lrvd.predict(
        model, None, [batch], posterior_samples={site: drawn[site]}, return_samples=True
    )
    theirs = drawn["_RETURN"].softmax(-1)
    torch.testing.assert_close(ours.samples, theirs.detach())
    torch.testing.assert_close(ours.probs, theirs.mean(0).detach())


def test_one_draw_serves_all_batches(pair: Any) -> None:
    model, guide = pair
    batch = tokens(labels=False)
    halves = [{k: v[i : i + 3] for k, v in batch.items()} for i in (0, 3)]
    whole = lrvd.predict(model, guide, [batch], 5, return_samples=True)
    parts = lrvd.predict(model, guide, halves, 5, return_samples=True)
    torch.testing.assert_close(whole.samples, parts.samples)
    assert whole.samples.shape == (5, 6, 3)
    assert lrvd.predict(model, guide, [batch], 2).samples is None


def test_uncertainty_splits_into_data_and_model(pair: Any) -> None:
    model, guide = pair
    p = lrvd.predict(model, guide, [tokens()], 16, return_samples=True)
    assert isinstance(p, CategoricalPrediction)
    torch.testing.assert_close(p.entropy, -(p.probs * p.probs.log()).sum(-1))
    aleatoric = -(p.samples * p.samples.log()).sum(-1).mean(0)
    torch.testing.assert_close(p.mutual_information, p.entropy - aleatoric)
    assert (p.mutual_information > 0).all()
    once = lrvd.predict(model, guide, [tokens()], 1)
    assert once.mutual_information.abs().max() < 1e-6


def test_mode_and_random_state_are_restored(pair: Any) -> None:
    model, guide = pair
    model.base_net.train()
    model.base_net.base_model.model.bert.eval()
    modes = [m.training for m in model.modules()]
    before = torch.get_rng_state()
    first = lrvd.predict(model, guide, [tokens(labels=False)][:1], 3, seed=5)
    assert [m.training for m in model.modules()] == modes
    torch.manual_seed(0)
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    again = lrvd.predict(model, guide, [tokens(labels=False)], 3, seed=5)
    torch.testing.assert_close(first.probs, again.probs)
    with pytest.raises(ZeroDivisionError):
        model.base_net.base_model.model.classifier.register_forward_hook(
            lambda *a: 1 / 0
        )
        lrvd.predict(model, guide, [tokens()], 1)
    assert [m.training for m in model.modules()] == modes


def test_regression_variance_is_noise_plus_spread() -> None:
    net = regression(features=5, r=3)
    model = GateLoRA(net, num_data=9, likelihood=Normal(0.5))
    guide = RankDiagonal(model, init_log_alpha=0.0)
    x = torch.randn(4, 5)
    p = lrvd.predict(model, guide, [{"x": x}], 4000)
    layer = net.base_model.model.linear
    signal = (x @ layer.lora_A.default.weight.T) * layer.lora_B.default.weight
    torch.testing.assert_close(p.mean, net(x).squeeze(1).detach(), rtol=0, atol=0.1)
    law = 0.25 + signal.square().sum(1).detach()
    torch.testing.assert_close(p.variance, law, rtol=0.1, atol=0.0)
    torch.testing.assert_close(p.mutual_information, 0.5 * (p.variance / 0.25).log())


@pytest.mark.filterwarnings("ignore:no closed form")
@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
def test_pyros_autoguides_predict_once_they_are_set_up(auto: Any) -> None:
    model = GateLoRA(bert(), num_data=60)
    guide = auto(model)
    with pytest.raises(
        ValueError, match=r"Auto\w+ has no parameters yet; train it first"
    ):
        lrvd.predict(model, guide, [tokens()], 2)
    lrvd.RankELBO().loss(model, guide, **tokens())
    assert lrvd.predict(model, guide, [tokens()], 2).probs.shape == (6, 3)


def test_posterior_mean_is_exact_for_rank_diagonal_and_estimated_for_others() -> None:
    model = GateLoRA(bert(), num_data=60)
    batch = tokens(labels=False)
    plain = model.base_net(**batch).logits
    with lrvd.posterior_mean(model, RankDiagonal(model)) as net:
        torch.testing.assert_close(net(**batch).logits, plain)

    def guide(**batch: Any) -> None:
        fn = pyro.distributions.Normal(torch.full((16,), 2.0), 0.1)
        pyro.sample("gate", fn.to_event(1))

    with model.space.bind(torch.full((16,), 2.0)):
        doubled = model.base_net(**batch).logits
    with lrvd.posterior_mean(model, guide) as net:
        torch.testing.assert_close(net(**batch).logits, doubled, rtol=0, atol=0.05)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_generate_runs_under_one_draw() -> None:
    sizes = GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=None
    )
    gpt = GPT2LMHeadModel(sizes).eval()
    net = lora(gpt, target_modules=["c_attn"], task_type="CAUSAL_LM")
    model = GateLoRA(net, num_data=9)
    guide = RankDiagonal(model, init_log_alpha=3.0)
    prompt = {
        "input_ids": torch.tensor([[1, 2, 3]]),
        "attention_mask": torch.ones(1, 3),
    }
    texts = {}
    for seed in (0, 0, 1, 2, 3):
        with lrvd.posterior_sample(model, guide, seed=seed) as bound:
            options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            text = tuple(bound.generate(**prompt, **options)[0].tolist())
        assert texts.setdefault(seed, text) == text
    assert len(set(texts.values())) > 1


def test_nothing_to_predict_is_refused() -> None:
    model = GateLoRA(bert(), num_data=60)
    guide = RankDiagonal(model)
    with pytest.raises(
        ValueError, match="got no batches; expected at least one: predict"
    ):
        lrvd.predict(model, guide, [])
    with pytest.raises(
        ValueError, match="num_samples=0; expected a whole number, 1 or more"
    ):
        lrvd.predict(model, guide, [tokens()], 0)
    with pytest.raises(ValueError, match="guide is None; give a guide or"):
        lrvd.predict(model, None, [tokens()])


def hierarchical(space: Any) -> Any:
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(1), 0.5).to_event(1))
    z = pyro.sample("z", dist.Normal(torch.ones(space.size), 1.0).to_event(1))
    return scale * z


def test_draws_that_lack_a_site_or_differ_in_number_are_refused() -> None:
    model = GateLoRA(bert(), prior=hierarchical, num_data=60)
    z, scale = torch.ones(4, 16), torch.ones(4, 1)
    both = {"z": z, "scale": scale}
    assert lrvd.predict(model, None, [tokens()], posterior_samples=both).probs.shape
    with pytest.raises(ValueError, match=r"no draws of the latent sites \['scale'\]"):
        lrvd.predict(model, None, [tokens()], posterior_samples={"z": z, "sale": scale})
    for bad in ({"z": z, "scale": scale[:2]}, {}, {"z": z[None], "scale": scale[None]}):
        with pytest.raises(ValueError, match="expected draws x size for every latent"):
            lrvd.predict(model, None, [tokens()], posterior_samples=bad)
    with pytest.raises(ValueError, match="sites {} and the model {'scale': .*'z': "):
        lrvd.predict(model, lambda **batch: None, [tokens()], 2)


def test_batches_are_read_as_they_come() -> None:
    model = GateLoRA(bert(), num_data=60)
    seen: list[int] = []

    def batches() -> Any:
        for i in range(3):
            seen.append(i)
            yield tokens(2)

    progress: list[int] = []
    model.base_net.register_forward_pre_hook(lambda *args: progress.append(len(seen)))
    lrvd.predict(model, RankDiagonal(model), batches(), 1)
    assert progress == [1, 2, 3]


def test_one_batch_instead_of_several_is_refused() -> None:
    model = GateLoRA(bert(), num_data=60)
    with pytest.raises(TypeError, match=r"batches is one batch; expected several"):
        lrvd.predict(model, RankDiagonal(model), tokens())  # type: ignore[arg-type]
