"""Try the recipes on 64 examples and a network of one layer: a line for each.

    PYTHONPATH=examples python -m recipes

add_benchmark_row.py trains MiniLM, takes a minute, and runs by itself.
"""

import tempfile
from typing import Any

import pyro
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pyro import distributions as dist
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal, init_to_mean
from recipes.add_guide import LaplaceGates
from recipes.add_likelihood import Poisson
from recipes.add_model import CoreLoRA
from recipes.add_prior import laplace
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA

N = 64


def network(outputs: int = 2, **options: Any) -> PeftModel:
    """A linear layer with LoRA of rank 8."""
    net = nn.Sequential(nn.Linear(8, outputs))
    return get_peft_model(net, LoraConfig(target_modules="0", **options))


def classes() -> dict[str, Tensor]:
    """Two classes, told by the first of eight coordinates: one rank is enough."""
    x = torch.randn(N, 8)
    return {"input": x, "labels": (x[:, 0] > 0).long()}


def fit(model: Any, guide: Any, batch: dict[str, Tensor], optim: Any = None) -> str:
    """Train for 300 steps."""
    optim = optim or lrvd.optim.AdamW(lr=0.02)
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    losses = [float(svi.step(**batch)) for _ in range(300)]
    return f"loss {losses[0]:.0f} -> {losses[-1]:.0f} nats"


def add_prior() -> str:
    """The peak at 0 switches off the ranks that the data do not need."""
    weight_prior = dist.Normal(0.0, 1.0)  # without it the scale would mean nothing
    model = GateLoRA(network(), prior=laplace, weight_prior=weight_prior, num_data=N)
    guide = RankDiagonal(model, learn_mean=True)
    loss = fit(model, guide, classes())
    return f"{loss}; effective rank {guide.effective_rank:.1f} of 8"


def add_guide() -> str:
    """A noisy rank goes, and training goes on."""
    model = GateLoRA(network(), prior=lrvd.priors.ARD(), num_data=N)
    guide, optim, batch = LaplaceGates(model), lrvd.optim.AdamW(lr=0.02), classes()
    fit(model, guide, batch, optim)
    keep = lrvd.prune(model, guide, optim, log_alpha_threshold=0.0)
    loss = fit(model, guide, batch, optim)
    return f"pruned to {int(keep.sum())} of 8 ranks; then {loss}"


def add_likelihood() -> str:
    """The rate is an exponential of the input."""
    x = torch.randn(N, 8)
    rate = (1 + 0.5 * x[:, 0]).exp()
    model = GateLoRA(network(outputs=1), likelihood=Poisson(), num_data=N)
    guide = RankDiagonal(model)
    loss = fit(model, guide, {"input": x, "labels": dist.Poisson(rate).sample()})
    found = lrvd.predict(model, guide, [{"input": x}]).rate
    correlation = torch.stack([found, rate]).corrcoef()[0, 1]
    return f"{loss}; rates correlate {correlation:.2f} with the true ones"


def add_model() -> str:
    """A and B stay as they are; plain PEFT gets the mean of C A."""
    net = network(init_lora_weights=False).requires_grad_(False)
    space = lrvd.RankSpace(net, sides=("lora_A",))
    model = CoreLoRA(space, lrvd.likelihoods.Categorical(), N)
    guide = AutoNormal(model, init_loc_fn=init_to_mean, init_scale=0.1)
    batch = classes()
    loss = fit(model, guide, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = lrvd.export_peft(f"{folder}/mean", model, guide)
        base = nn.Sequential(nn.Linear(8, 2))
        base.load_state_dict(net.unload().state_dict())
        plain = PeftModel.from_pretrained(base, path)
    return "..."


if __name__ == "__main__":
    for recipe in (add_prior, add_guide, add_likelihood, add_model):
        pyro.set_rng_seed(0)
        print(f"{recipe.__name__}: {recipe()}")
