"""Pairs of model and guide, moving averages of them, and what reads a pair."""

from collections.abc import Callable
from typing import Any

import nets
import pyro
import torch
from pairs import rank_guide
from pyro import distributions as dist
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal, RankGuide
from lrvd_pyro.inference import give_own_name
from lrvd_pyro.models import FactorLoRA, GateLoRA

X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
INPUTS = {"x": X}
BATCH = {"x": X, "labels": torch.arange(6) % 3}


class Scaled(pyro.nn.PyroModule):
    """A prior whose gate depends on a parameter that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(1.0))

    def __call__(self, space: Any) -> Tensor:
        unit = dist.Normal(space.ones(), 1.0).to_event(1)
        return pyro.sample("unit", unit) * self.size.to(space.device)


class Own(RankGuide):
    """A user's guide, whose draws read its model in three ways."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.log_scale = nn.Parameter(self.space.ones() - 3)
        self.kept = [model.start, {"model": (model,)}]

    def forward(self, *args: object, **batch: object) -> dict[str, Tensor]:
        gate = dist.Normal(self.mean(), self.log_scale.exp())
        return self.draw_independent({"gate": gate})

    def mean(self) -> Tensor:
        first, rest = self.kept
        gate: Tensor = first()["gate"]
        (model,) = rest["model"]
        sizes = [w.detach().mean() for w in model.space.weights("lora_B")]
        return gate + sum(sizes) + self.space.flatten("lora_A").detach().mean()

    @property
    def log_alpha(self) -> Tensor:
        return 2 * self.log_scale.detach()


def gates() -> tuple[Any, Any]:
    model = GateLoRA(nets.perceptron(), num_data=6)
    return model, RankDiagonal(model)


def scaled() -> tuple[Any, Any]:
    model = GateLoRA(nets.perceptron(), num_data=6, prior=Scaled())
    return model, RankDiagonal(model, learn_mean=True)


def factors() -> tuple[Any, Any]:
    model = FactorLoRA(nets.perceptron(), num_data=6, sides=("lora_A", "lora_B"))
    return model, rank_guide(model)


def own() -> tuple[Any, Any]:
    model = GateLoRA(nets.perceptron(), num_data=6, prior=lrvd.priors.ARD())
    return model, Own(model)


def automatic(prior: Any = None, net: Any = None) -> tuple[Any, Any]:
    prior = prior or lrvd.priors.Normal()
    model = GateLoRA(net or nets.perceptron(), num_data=6, prior=prior)
    start = init_to_value(values=model.start())
    guide = give_own_name(AutoNormal(model, init_loc_fn=start))
    SVI(model, guide, lrvd.optim.AdamW(), lrvd.RankELBO()).step(**BATCH)
    return model, guide


PAIRS = [gates, scaled, factors, own]


def moved(model: Any, guide: Any, steps: int = 8) -> tuple[Any, Any]:
    """Moving averages of both over some steps, each copied by itself."""
    average = get_ema_multi_avg_fn(0.5)
    both = [AveragedModel(m, multi_avg_fn=average) for m in (model, guide)]
    svi = SVI(model, guide, lrvd.optim.AdamW(lr=0.05), lrvd.RankELBO(kl_weight=0.1))
    for _ in range(steps):
        svi.step(**BATCH)
        for mean, live in zip(both, (model, guide)):
            mean.update_parameters(live)
    return both[0].module, both[1].module


@torch.no_grad()
def write(source: Any, target: Any) -> None:
    pairs = zip(source.parameters(), target.parameters(), strict=True)
    for value, parameter in pairs:
        parameter.copy_(value)


def predicted(model: Any, guide: Any) -> Tensor:
    probs: Tensor = lrvd.predict(model, guide, [INPUTS], 8).probs
    return probs


def mean_logits(model: Any, guide: Any) -> Tensor:
    with lrvd.posterior_mean(model, guide) as net, torch.no_grad():
        logits: Tensor = net(**INPUTS)
    return logits


def drawn_logits(model: Any, guide: Any) -> Tensor:
    with lrvd.posterior_sample(model, guide, seed=1) as net, torch.no_grad():
        logits: Tensor = net(**INPUTS)
    return logits


def constants(model: Any, guide: Any) -> Tensor:
    data = lrvd.to_arviz(model, guide, [BATCH], 3)
    return torch.as_tensor(data.constant_data.log_alpha.values)


def objective(model: Any, guide: Any) -> Tensor:
    pyro.set_rng_seed(1)
    with torch.no_grad():
        return lrvd.RankELBO().differentiable_loss(model, guide, **BATCH)


READERS: list[Callable[[Any, Any], Tensor]]
READERS = [predicted, mean_logits, drawn_logits, constants, objective]
