"""Try the recipes on 64 examples and one linear layer, in seconds: a line for each.

    PYTHONPATH=examples python -m recipes

The fifth, add_benchmark_row.py, trains MiniLM for minutes and runs by itself.
"""

import copy
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
    net = nn.Sequential(nn.Linear(8, outputs, bias=False))
    return get_peft_model(net, LoraConfig(target_modules="0", **options))


def two_classes() -> dict[str, Tensor]:
    """The first of eight coordinates tells the class: one rank is enough."""
    x = torch.randn(N, 8)
    return {"input": x, "labels": (x[:, 0] > 0).long()}


def train(model: Any, guide: Any, batch: dict[str, Tensor], optim: Any = None) -> str:
    """Take 300 steps; returns what became of the loss."""
    optim = optim or lrvd.optim.AdamW(lr=0.02)
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    losses = [float(svi.step(**batch)) for _ in range(300)]
    return f"loss {losses[0]:.0f} -> {losses[-1]:.0f} nats"


def add_prior() -> str:
    """The prior's peak at 0 turns off ranks that the data do not need."""
    weight_prior = dist.Normal(0.0, 1.0)  # without it b -> b s undoes any scale
    model = GateLoRA(network(), prior=laplace, weight_prior=weight_prior, num_data=N)
    guide = RankDiagonal(model, learn_mean=True)
    loss = train(model, guide, two_classes())
    return f"{loss}; effective rank {guide.effective_rank:.1f} of 8"


def add_guide() -> str:
    """The noisiest ranks are removed, and training goes on."""
    model = GateLoRA(network(), prior=lrvd.priors.ARD(), num_data=N)
    guide, optim, batch = LaplaceGates(model), lrvd.optim.AdamW(lr=0.02), two_classes()
    before = train(model, guide, batch, optim)
    keep = lrvd.prune(model, guide, optim, log_alpha_threshold=0.0)
    after = train(model, guide, batch, optim)
    return f"{before}; pruned to {int(keep.sum())} of 8 ranks; {after}"


def add_likelihood() -> str:
    """The first coordinate is the log of the rate."""
    x = torch.randn(N, 8)
    rate = x[:, 0].exp()
    model = GateLoRA(network(outputs=1), likelihood=Poisson(), num_data=N)
    guide = RankDiagonal(model)
    loss = train(model, guide, {"input": x, "labels": dist.Poisson(rate).sample()})
    error = lrvd.predict(model, guide, [{"input": x}]).rate - rate
    spread = rate - rate.mean()
    return f"{loss}; rates off by {error.abs().mean():.2f} of {spread.abs().mean():.2f}"


def add_model() -> str:
    """What plain PEFT loads computes with the mean of C A."""
    net = network(init_lora_weights=False).requires_grad_(False)
    model = CoreLoRA(net, num_data=N)
    guide = AutoNormal(model, init_loc_fn=init_to_mean, init_scale=0.1)
    batch = two_classes()
    loss = train(model, guide, batch)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        lrvd.export_peft(f"{folder}/mean", model, guide)
        plain = PeftModel.from_pretrained(copy.deepcopy(net).unload(), f"{folder}/mean")
        with lrvd.posterior_mean(model, guide) as bound:
            error = (plain(batch["input"]) - bound(batch["input"])).abs().max()
    return f"{loss}; exported, its logits are off by {error:.0e}"


if __name__ == "__main__":
    torch.set_num_threads(1)  # on tensors this small, threads wait for each other
    for recipe in (add_prior, add_guide, add_likelihood, add_model):
        pyro.set_rng_seed(0)
        print(f"{recipe.__name__}: {recipe()}")
