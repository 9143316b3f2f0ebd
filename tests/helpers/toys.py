"""Linear regression on gates: programs whose ELBO is known in closed form."""

import math
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

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
