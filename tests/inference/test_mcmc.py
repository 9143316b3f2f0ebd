"""The gates by MCMC, and Laplace's approximation where it is exact."""

from typing import Any

import pytest
import torch
from nets import bert, perceptron, regression, tokens
from pyro.infer import MCMC, NUTS, Predictive
from pyro.ops.stats import effective_sample_size
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro import guides, priors
from lrvd_pyro.guides.fisher_laplace import gate_fisher
from lrvd_pyro.likelihoods.normal import Normal
from lrvd_pyro.models import GateLoRA

N, R, SD = 30, 3, 0.7


def nuts(model: GateLoRA, draws: int = 5, warmup: int = 5) -> MCMC:
    options = {"warmup_steps": warmup, "disable_progbar": True}
    return MCMC(NUTS(model), num_samples=draws, **options)


def whole() -> dict[str, Tensor]:
    """The data set of the linear-Gaussian model."""
    x = torch.randn(N, 5)
    return {"x": x, "labels": x[:, 0] + SD * torch.randn(N)}


def linear_gaussian(net: Any, scale: float = 1.5) -> GateLoRA:
    noise = Normal(SD)
    noise.requires_grad_(False)
    prior = priors.Normal(scale)
    return GateLoRA(net, prior=prior, likelihood=noise, num_data=N)


def frozen(net: Any) -> Any:
    return net.requires_grad_(False)


def conjugate(
    net: Any, batch: dict[str, Tensor], scale: float = 1.5
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the gates: predictions are linear in them."""
    layer = net.base_model.model.linear
    A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
    design = (batch["x"] @ A.T * B[0]).detach()
    target = batch["labels"] - batch["x"] @ layer.base_layer.weight[0].detach()
    precision = design.T @ design / SD**2 + torch.eye(R) / scale**2
    covariance = torch.linalg.inv(precision)
    return covariance @ design.T @ target / SD**2, covariance


def errors(draws: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """Errors of mean and standard deviation, in Monte Carlo standard errors."""
    off, square = draws - mean, (draws - mean).square()
    z = []
    for values, truth in [(off, torch.zeros(R)), (square, sd**2)]:
        count = effective_sample_size(values[None], chain_dim=0, sample_dim=1)
        z.append((values.mean(0) - truth).abs() / (values.std(0) / count.sqrt()))
    return torch.stack(z)


def test_nuts_recovers_the_conjugate_posterior_and_moves_nothing_else() -> None:
    net = frozen(regression(r=R))
    model, batch = linear_gaussian(net), whole()
    before = {name: p.clone() for name, p in model.named_parameters()}
    mcmc = nuts(model, 500, 100)
    mcmc.run(**batch)
    assert mcmc.get_samples().keys() == {"gate"}
    draws = mcmc.get_samples()["gate"]
    mean, covariance = conjugate(net, batch)
    assert errors(draws, mean, covariance.diagonal().sqrt()).max() < 5
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name
    # the twin: the posterior under another prior is not what was sampled
    mean, covariance = conjugate(net, batch, scale=0.15)
    assert errors(draws, mean, covariance.diagonal().sqrt()).max() > 10


def test_trainable_weights_are_held_too() -> None:
    """MCMC draws latent sites; parameters of the network stay as they are."""
    net = regression(r=R)
    model, batch = linear_gaussian(net), whole()
    before = {name: p.clone() for name, p in model.named_parameters()}
    nuts(model).run(**batch)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name


def test_a_minibatch_is_refused() -> None:
    model = GateLoRA(frozen(bert()), prior=priors.Normal(), num_data=60)
    with pytest.raises(ValueError, match="on 6 labels out of num_data=60"):
        nuts(model).run(**tokens())


def test_a_run_without_labels_is_refused() -> None:
    model = GateLoRA(bert(), prior=priors.Normal(), num_data=6)
    mcmc = MCMC(NUTS(model), num_samples=1, warmup_steps=1, disable_progbar=True)
    with pytest.raises(ValueError, match="on 0 labels out of num_data=6"):
        mcmc.run(**tokens(labels=False))


def test_laplace_takes_no_notice_of_dropout_and_needs_training() -> None:
    net = bert()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model = GateLoRA(net, prior=priors.Normal(), num_data=6)
    ones, batch = torch.ones(model.space.size), tokens()
    expected = gate_fisher(model, ones, [batch])
    net.train()
    torch.testing.assert_close(gate_fisher(model, ones, [batch]), expected)
    assert net.training
    with pytest.raises(ValueError, match="FisherLaplace has no parameters yet; train"):
        guides.laplace(model).laplace_approximation([batch])


def test_laplace_by_fisher_names_the_way_out_for_dora() -> None:
    model = GateLoRA(bert(use_dora=True), prior=priors.Normal(), num_data=6)
    guide = guides.laplace(model)
    guide(**tokens())
    with pytest.raises(ValueError, match="takes one draw for the whole") as error:
        guide.laplace_approximation([tokens()])
    assert "laplace(model, curvature='hessian')" in error.value.__notes__[0]


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout])
def test_dropout_is_refused(kind: Any) -> None:
    net = frozen(bert())
    net.base_model.model.dropout = kind(0.1)
    model = GateLoRA(net.train(), prior=priors.Normal(), num_data=6)
    with pytest.raises(ValueError, match=r"dropout is on.*call net.eval\(\) first"):
        nuts(model).run(**tokens())
    net.eval()
    nuts(model, 1, 1).run(**tokens())  # now there is nothing to refuse


def test_dropout_by_a_function_is_refused_as_dropout_by_a_module_is() -> None:
    net = frozen(bert())
    net.base_model.model.bert.encoder.attention_dropout = 0.1  # as Llama's layers have
    model = GateLoRA(net.train(), prior=priors.Normal(), num_data=6)
    with pytest.raises(ValueError, match=r"dropout is on.*call net.eval\(\) first"):
        nuts(model).run(**tokens())


def test_the_log_uniform_has_neither_posterior_nor_prior_predictive() -> None:
    model, batch = GateLoRA(perceptron(), num_data=N), whole()
    batch["labels"] = torch.randint(0, 3, (N,))
    with pytest.raises(ValueError, match="LogUniform is improper.* no posterior"):
        nuts(model).run(**batch)
    with pytest.raises(ValueError, match="has no prior predictive; pass Predictive"):
        Predictive(model, num_samples=3)(**batch)
    gaussian = lrvd.guides.multivariate_normal(model)
    gaussian(**batch)
    for guide in (lrvd.guides.RankDiagonal(model), gaussian):
        draws = Predictive(model, guide=guide, num_samples=3)(x=batch["x"])
        assert draws["labels"].shape == (3, N)
    proper = GateLoRA(perceptron(), prior=priors.Normal(), num_data=N)
    assert Predictive(proper, num_samples=3)(x=batch["x"])["labels"].shape == (3, N)


@pytest.mark.parametrize("prior", [priors.Normal(), priors.Horseshoe(slab=2.0)])
def test_predictions_under_the_draws_of_nuts(prior: Any) -> None:
    net = frozen(perceptron())
    model, x = GateLoRA(net, prior=prior, num_data=N), torch.randn(N, 5)
    mcmc = nuts(model, 8)
    mcmc.run(x=x, labels=torch.randint(0, 3, (N,)))
    draws = mcmc.get_samples()
    batches = [{"x": x[:9]}, {"x": x[9:]}]
    ours = lrvd.predict(
        model, None, batches, posterior_samples=draws, return_samples=True
    )
    theirs = []
    for i in range(8):
        gate = model.value_at({site: value[i] for site, value in draws.items()})
        with model.bind(gate):
            theirs.append(net(x=x).softmax(-1))
    torch.testing.assert_close(ours.samples, torch.stack(theirs))
    torch.testing.assert_close(ours.probs, torch.stack(theirs).mean(0))


def test_laplace_is_exact_on_the_linear_gaussian_model() -> None:
    """Its mode is the mean, and Fisher and Hessian are the same matrix."""
    net = frozen(regression(r=R))
    model, batch = linear_gaussian(net), whole()
    mean, covariance = conjugate(net, batch)
    halves = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
    found = {}
    for curvature, args, kwargs in [("fisher", (halves,), {}), ("hessian", (), batch)]:
        point = lrvd.guides.laplace(model, curvature=curvature)  # type: ignore[arg-type]
        point(**batch)
        point.loc.data.copy_(mean)
        gaussian = point.laplace_approximation(*args, **kwargs)
        found[curvature] = gaussian.get_posterior()
    for posterior in found.values():
        torch.testing.assert_close(posterior.mean, mean)
        torch.testing.assert_close(
            posterior.covariance_matrix, covariance, rtol=1e-6, atol=1e-6
        )


def brute_force(model: GateLoRA, gate: Tensor, x: Tensor) -> Tensor:
    """``sum_i sum_y p(y) g g^T``, g by autograd, one example and label at a time."""
    total = torch.zeros(len(gate), len(gate))
    for row in x:

        def log_probs(z: Tensor, row: Tensor = row) -> Tensor:
            with model.bind(z):
                return model.predictions(x=row[None]).log_softmax(-1)[0]

        gradients = torch.autograd.functional.jacobian(log_probs, gate)
        total += gradients.T @ (log_probs(gate).exp()[:, None] * gradients).detach()
    return total


def test_gate_fisher_is_the_expected_square_of_the_gradient() -> None:
    model = GateLoRA(frozen(perceptron()), num_data=9)
    gate, x = torch.randn(model.space.size), torch.randn(9, 5)
    batches = [{"x": x[:4], "labels": torch.zeros(4).long()}, {"x": x[4:]}]
    fisher = gate_fisher(model, gate, batches)
    torch.testing.assert_close(
        fisher, brute_force(model, gate, x), rtol=1e-8, atol=1e-8
    )
    # a part of the data stands for all of it
    part = gate_fisher(model, gate, batches[:1])
    torch.testing.assert_close(part * 4 / 9, brute_force(model, gate, x[:4]))


def test_gate_fisher_is_the_hessian_where_logits_are_linear_in_the_gates() -> None:
    """Logistic regression: the curvature does not depend on the labels."""
    model = GateLoRA(frozen(regression(r=R, outputs=4)), num_data=N)
    gate, x = torch.randn(R), torch.randn(N, 5)
    labels = torch.randint(0, 4, (N,))

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        with model.bind(z):
            logits = model.predictions(x=x)
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    fisher = gate_fisher(model, gate, [{"x": x}])
    for y in (labels, labels.flip(0)):
        hessian = torch.autograd.functional.hessian(lambda z, y=y: loss(z, y), gate)
        torch.testing.assert_close(fisher, hessian, rtol=1e-8, atol=1e-8)
    # the twin: one tanh in between, and it does
    curved = GateLoRA(frozen(perceptron()), num_data=N)
    gate = torch.randn(curved.space.size)

    def curved_loss(z: Tensor) -> Tensor:
        with curved.bind(z):
            logits = curved.predictions(x=x)
        return nn.functional.cross_entropy(logits, labels % 3, reduction="sum")

    hessian = torch.autograd.functional.hessian(curved_loss, gate)
    assert (gate_fisher(curved, gate, [{"x": x}]) - hessian).abs().max() > 0.1


def test_laplace_refuses_what_gives_no_gaussian() -> None:
    net = frozen(regression(r=R))
    model, batch = linear_gaussian(net), whole()
    with pytest.raises(ValueError, match="got no batches; expected the training set"):
        gate_fisher(model, torch.ones(R), [])
    with pytest.raises(ValueError, match=r"curvature='ggn'; expected \"fisher\" or"):
        lrvd.guides.laplace(model, curvature="ggn")  # type: ignore[arg-type]
    point = lrvd.guides.laplace(model)
    point(**batch)
    with pytest.raises(ValueError, match="got no batches; expected the training set"):
        point.laplace_approximation([])
    with pytest.raises(TypeError, match="batches is one batch; expected several"):
        point.laplace_approximation(batch)
    pole = GateLoRA(net, likelihood=model.likelihood, num_data=N)
    point = lrvd.guides.laplace(pole)
    point(**batch)
    point.loc.data.fill_(0.01)
    with pytest.raises(ValueError, match=r"not positive definite \(least eigenvalue -"):
        point.laplace_approximation([batch])
