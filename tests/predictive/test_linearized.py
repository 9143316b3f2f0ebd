"""The predictive of the network linearized in its gates."""

from typing import Any

import pytest
import torch
from nets import bert, lora, regression, tokens
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro import guides, priors
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.categorical import Categorical, CategoricalPrediction
from lrvd_pyro.likelihoods.normal import Normal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.predictive.linearized import (
    Linearized,
    gate_gaussian,
    normal_nodes,
)

close = torch.testing.assert_close
FEATURES, R, CLASSES = 5, 3, 4


def flat(outputs: int) -> GateLoRA:
    """A network whose predictions are linear in the gates."""
    likelihood = Categorical() if outputs > 1 else Normal(0.5)
    net = regression(FEATURES, R, outputs)
    net.base_model.model.linear.lora_B.default.weight.data *= 10
    return GateLoRA(
        net,
        num_data=9,
        likelihood=likelihood,
        prior=priors.Normal(1.0),
    )


def effects(model: GateLoRA, x: Tensor) -> Tensor:
    """The derivative of each prediction in each gate, ``B x outputs x R``."""
    layer = model.base_net.base_model.model.linear
    signal = x @ layer.lora_A.default.weight.T
    return (signal[:, None] * layer.lora_B.default.weight).detach()


def at_gate(model: GateLoRA, gate: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad(), model.bind(gate):
        return model.predictions(x=x)


def gaussian(model: GateLoRA) -> tuple[Any, Tensor, Tensor]:
    """A full-covariance guide in a general position, its mean and covariance."""
    guide = guides.multivariate_normal(model)
    labels = torch.zeros(2) if isinstance(model.likelihood, Normal) else [0, 1]
    guide(x=torch.randn(2, FEATURES), labels=torch.as_tensor(labels))
    with torch.no_grad():
        guide.loc.copy_(1 + 0.5 * torch.randn(R))
        guide.scale = torch.tensor([0.3, 0.6, 0.9])
        guide.scale_tril = torch.eye(R) + torch.randn(R, R).tril(-1)
    root = guide.scale.detach()[:, None] * guide.scale_tril.detach()
    return guide, guide.loc.detach(), root @ root.T


def test_mean_and_variance_are_exact_where_the_network_is_linear() -> None:
    model, x = flat(1), torch.randn(6, FEATURES)
    guide, loc, covariance = gaussian(model)
    p = lrvd.predict(model, guide, [{"x": x}], method="linearized")
    J = effects(model, x).squeeze(1)
    close(p.mean, at_gate(model, loc, x).squeeze(1))
    close(p.variance, 0.25 + ((J @ covariance) * J).sum(1))
    wrong = 0.25 + (J.square() * covariance.diagonal()).sum(1)
    assert ((p.variance / wrong).log().abs() > 0.05).any()


def test_logit_differences_are_exact_where_the_network_is_linear() -> None:
    model, x = flat(CLASSES), torch.randn(6, FEATURES)
    guide, loc, covariance = gaussian(model)
    gate = gate_gaussian(model, guide, {"x": x})
    mean, spread = Linearized(model, gate).contrasts({"x": x})
    logits, J = at_gate(model, loc, x), effects(model, x)
    close(mean, logits[:, 1:] - logits[:, :1])
    J = J[:, 1:] - J[:, :1]
    close(spread, J @ covariance @ J.mT)
    drawn = Linearized(model, gate)({"x": x})
    close(drawn.mean(0)[:, 1:], mean)
    centered = drawn[..., 1:] - mean
    close(torch.einsum("sbj,sbk->bjk", centered, centered) / len(drawn), spread)


def test_class_probabilities_are_those_of_many_samples() -> None:
    model, x = flat(CLASSES), torch.randn(6, FEATURES)
    guide, _, _ = gaussian(model)
    p = lrvd.predict(model, guide, [{"x": x}], method="linearized")
    many = lrvd.predict(model, guide, [{"x": x}], 4_000, max_batch=10_000)
    assert isinstance(p, CategoricalPrediction)
    close(p.probs, many.probs, rtol=0, atol=0.02)
    close(p.entropy, many.entropy, rtol=0, atol=0.03)
    close(p.mutual_information, many.mutual_information, rtol=0, atol=0.03)
    at_mean = at_gate(model, guide.loc.detach(), x).softmax(-1)
    assert (at_mean - many.probs).abs().max() > 0.03


def test_two_classes_are_near_the_probit_approximation() -> None:
    """MacKay (1992): ``sigmoid(m / sqrt(1 + pi v / 8))``, within 0.02."""
    model, x = flat(2), torch.randn(50, FEATURES)
    guide, _, _ = gaussian(model)
    gate = gate_gaussian(model, guide, {"x": x})
    mean, spread = Linearized(model, gate).contrasts({"x": x})
    mean, variance = mean.squeeze(1), spread.reshape(-1)
    p = lrvd.predict(model, guide, [{"x": x}], method="linearized").probs[:, 1]
    probit = (mean / (1 + torch.pi * variance / 8).sqrt()).sigmoid()
    close(p, probit, rtol=0, atol=0.02)
    draws = mean + variance.sqrt() * torch.randn(200_000, 1)
    close(p, draws.sigmoid().mean(0), rtol=0, atol=0.004)
    assert (p - mean.sigmoid()).abs().max() > 0.03


def test_the_jacobian_is_each_examples_own() -> None:
    model, batch = GateLoRA(bert(), num_data=60), tokens(labels=False)
    guide = RankDiagonal(model, init_log_alpha=-1.0)
    gate = gate_gaussian(model, guide, batch)
    with lrvd.posterior_mean(model, guide):
        mean, spread = Linearized(model, gate).contrasts(batch)
    variance = guide.distributions()["gate"].variance.detach()
    for i in range(6):
        row = {name: value[i : i + 1] for name, value in batch.items()}

        def contrasts(gate: Tensor, row: Any = row) -> Tensor:
            with model.bind(gate):
                logits = model.predictions(**row)[0]
            return logits[1:] - logits[0]

        J = torch.autograd.functional.jacobian(contrasts, torch.ones(16))
        close(mean[i], contrasts(torch.ones(16)).detach())
        close(spread[i], (J * variance) @ J.T)


def test_its_variance_follows_that_of_samples_in_a_real_network() -> None:
    model, batch = GateLoRA(bert(), num_data=60), tokens(40, labels=False)
    guide = RankDiagonal(model, init_log_alpha=-2.0)
    options: dict[str, Any] = {"return_samples": True}
    p = lrvd.predict(model, guide, [batch], method="linearized", **options)
    many = lrvd.predict(model, guide, [batch], 256, **options)
    logs = [q.samples.logit().var(0).log() for q in (p, many)]
    correlation = torch.corrcoef(torch.stack([log.flatten() for log in logs]))[0, 1]
    assert correlation > 0.95
    close(p.probs, many.probs, rtol=0, atol=0.03)


def test_it_takes_one_forward_pass_and_no_gradient_of_a_parameter() -> None:
    model, batch = GateLoRA(bert(), num_data=60), tokens(labels=False)
    passes: list[int] = []
    model.base_net.register_forward_pre_hook(lambda *args: passes.append(1))
    guide = RankDiagonal(model)
    asked: list[str] = []
    for name, parameter in model.base_net.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: asked.append(name))
    for expected in (3, 4):  # two show that rows are the examples' own
        lrvd.predict(model, guide, [batch], method="linearized")
        assert len(passes) == expected and asked == []
    model.base_net(**batch).logits.sum().backward()
    assert asked


def test_draws_of_a_sampler_give_their_mean_and_covariance() -> None:
    model, x = flat(1), torch.randn(6, FEATURES)
    gates = 1 + torch.randn(50, R)
    p = lrvd.predict(
        model,
        None,
        [{"x": x}],
        method="linearized",
        posterior_samples={"gate": gates},
    )
    J = effects(model, x).squeeze(1)
    close(p.variance, 0.25 + ((J @ gates.T.cov()) * J).sum(1))


def test_batches_and_seeds_do_not_change_it() -> None:
    model, batch = GateLoRA(bert(), num_data=60), tokens(labels=False)
    guide = RankDiagonal(model, init_log_alpha=0.0)
    halves = [{k: v[i : i + 3] for k, v in batch.items()} for i in (0, 3)]
    whole = lrvd.predict(model, guide, [batch], method="linearized")
    parts = lrvd.predict(model, guide, halves, method="linearized", seed=3)
    close(whole.probs, parts.probs)
    close(whole.mutual_information, parts.mutual_information)
    assert whole.samples is None


@pytest.mark.parametrize("size", [1, 2, 9])
def test_nodes_have_mean_zero_and_covariance_one(size: int) -> None:
    nodes = normal_nodes(1024, size)
    close(nodes.mean(0), torch.zeros(size), rtol=0, atol=1e-12)
    close(nodes.T @ nodes / 1024, torch.eye(size), rtol=0, atol=1e-9)
    quartiles = (nodes.abs() < 0.6744897501960817).double().mean(0)
    close(quartiles, torch.full((size,), 0.5), rtol=0, atol=0.01)


def test_what_takes_no_gate_per_example_is_refused_with_the_way_out() -> None:
    model = FactorLoRA(bert(), num_data=60)
    with pytest.raises(TypeError, match=r"AutoDelta; .*takes RowDiagonal\(model\)"):
        guide = guides.delta(model)
        guide(**tokens())
        lrvd.predict(model, guide, [tokens()], method="linearized")
    dora = GateLoRA(bert(use_dora=True), num_data=60)
    message = r"the DoRA layer 'bert.encoder.layer.0.\S+' does not take; predict.*sampl"
    with pytest.raises(TypeError, match=message):
        lrvd.predict(dora, RankDiagonal(dora), [tokens()], method="linearized")


def test_other_mistakes_are_refused() -> None:
    model = GateLoRA(bert(), num_data=60)
    with pytest.raises(ValueError, match="method='laplace'; expected \"sample\" or"):
        lrvd.predict(model, RankDiagonal(model), [tokens()], method="laplace")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameters yet; train it first"):
        guide = guides.multivariate_normal(model)
        lrvd.predict(model, guide, [tokens()], method="linearized")
    one = GateLoRA(regression(outputs=1), num_data=9)
    with pytest.raises(ValueError, match=r"logits have shape \(6, 1\); the linearized"):
        batch = {"x": torch.randn(6, 5)}
        lrvd.predict(one, RankDiagonal(one), [batch], method="linearized")


def test_it_errs_where_the_posterior_is_wide() -> None:
    model, batch = GateLoRA(bert(), num_data=60), tokens(40, labels=False)
    errors = []
    for log_alpha in (-4.0, 3.0):
        guide = RankDiagonal(model, init_log_alpha=log_alpha)
        p = lrvd.predict(model, guide, [batch], method="linearized")
        many = lrvd.predict(model, guide, [batch], 500)
        errors.append(float((p.probs - many.probs).abs().max()))
    assert errors[0] < 0.01 and errors[1] > 5 * errors[0]


class Mixer(nn.Module):
    """A network whose rows see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.out(x)
        return h - h.mean(0)


def test_rows_that_see_each_other_are_refused() -> None:
    model = GateLoRA(lora(Mixer(), target_modules=["out"]), num_data=9)
    batch = {"x": torch.randn(4, 5)}
    with pytest.raises(ValueError, match="draw of one example moves the predictions"):
        lrvd.predict(model, RankDiagonal(model), [batch], method="linearized")
