"""What `memory.py` measures: every function of the library, on one network each."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pyro
import torch
from pyro import distributions as dist
from pyro.infer import SVI
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro import gauge, guides, priors
from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.likelihoods import Categorical
from lrvd_pyro.models import FactorLoRA, GateLoRA

WIDTH, BATCH, DATA = 8, 4, 64
Net = Any
Pair = tuple[Any, Any]
Row = Callable[[Net], object]


class Stack(nn.Module):
    """Linear layers side by side, and a head."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(modules))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        # A graph 5,000 layers deep would overflow the stack of torch's autograd.
        outputs = torch.stack([layer(x).tanh() for layer in self.layers])
        logits: Tensor = self.head(outputs.mean(0))
        return logits


def adapted(modules: int, r: int) -> Net:
    """The network with LoRA whose B is not 0."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=r, target_modules=r"layers\.\d+\.0", lora_alpha=1)
    net = peft.get_peft_model(Stack(modules), config)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    return net


def batch() -> dict[str, Tensor]:
    """The same few examples at each call."""
    inputs = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))
    return {"x": inputs, "labels": torch.arange(BATCH) % 2}


def gated(net: Net, prior: Any = None) -> Pair:
    """A GateLoRA and its guide."""
    model = GateLoRA(net, prior=prior, num_data=DATA)
    return model, RankDiagonal(model)


def tied(net: Net) -> Pair:
    """A FactorLoRA and its guide."""
    model = FactorLoRA(net, num_data=DATA)
    return model, TiedDiagonal(model)


def centered(space: Any) -> Tensor:
    """A prior whose gate is not a product of sites: noise is known by draws alone."""
    shift = pyro.sample("shift", dist.Normal(space.ones(1), 1.0).to_event(1))
    each = pyro.sample("each", dist.Normal(space.ones(), 1.0).to_event(1))
    return each + shift


def step(pair: Pair, guide: Any = None, **options: Any) -> None:
    """One step of SVI."""
    model, own = pair
    guide = guide(model) if guide else own
    loss = lrvd.RankELBO(**options)
    SVI(model, guide, lrvd.optim.AdamW(), loss=loss).step(**batch())


def predicted(pair: Pair, **options: Any) -> None:
    """A prediction for one batch."""
    lrvd.predict(*pair, [batch()], **options)


def predicted_by(mode: dict[str, Any], net: Net) -> None:
    """A prediction by gates, by one method."""
    predicted(gated(net), **mode)


def noise_under(prior: Callable[[], Any], net: Net) -> object:
    """The noise of each rank, with model and guide made for it."""
    return gated(net, prior())[1].log_alpha


def pruned(pair: Pair, **options: Any) -> None:
    """Half of the ranks are noise, and go."""
    model, guide = pair
    with torch.no_grad():
        guide.log_variance[::2] = 7.0
    lrvd.prune(model, guide, min_rank=1, **options)


def recorded(pair: Pair) -> None:
    """A history, and all that it tells."""
    history = lrvd.RankHistory(pair[1])
    for step in range(3):
        history.record(step)
    history.effective_ranks, history.frame(), history.state_dict()  # noqa: B018


def stored(pair: Pair) -> None:
    """To disk and back."""
    model, guide = pair
    modules = len(model.space.modules)
    with tempfile.TemporaryDirectory() as folder:
        lrvd.save(Path(folder) / "posterior", model, guide)
        torch.manual_seed(0)
        lrvd.load(Path(folder) / "posterior", Stack(modules))


def checkpointed(pair: Pair) -> None:
    """A checkpoint, and the run resumed."""
    model, guide = pair
    optim, loss = lrvd.optim.AdamW(), lrvd.RankELBO()
    SVI(model, guide, optim, loss=loss).step(**batch())
    run: Any = {"model": model, "guide": guide, "optimizer": optim, "elbo": loss}
    with tempfile.TemporaryDirectory() as folder:
        lrvd.checkpoint(Path(folder) / "run.safetensors", **run)
        lrvd.resume(Path(folder) / "run.safetensors", **run)


def exported(pair: Pair) -> None:
    """To plain PEFT, with a trial."""
    with tempfile.TemporaryDirectory() as folder:
        lrvd.export_peft(Path(folder) / "adapter", *pair, probe=batch())


def scheduled(pair: Pair) -> None:
    """A look of each schedule."""
    model, guide = pair
    optim = lrvd.optim.AdamW()
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    ranks = lrvd.RankSchedule(model, guide, optim, start=1, every=1)
    balancing = gauge.BalanceSchedule(model, guide, optim, every=2, gather_every=1)
    for _ in range(2):
        svi.step(**batch())
        balancing.step()
        ranks.step()


def grouped(net: Net) -> None:
    """What the space tells of its components."""
    space = lrvd.RankSpace(net)
    for level in ("global", "module", "layer", "type", "rank"):
        space.group(level), space.count(level)  # noqa: B018
    keep = torch.arange(space.size) % 2 == 0
    space.coordinates, space.after(keep), space.cuts(keep)  # noqa: B018


def freed(pair: Pair) -> None:
    """The lowest layers without ranks."""
    lrvd.free_lower_layers(*pair, layers=1)


def bayesianized(net: Net, **options: Any) -> None:
    """Two passes."""
    kind = Categorical()
    gauge.bayesianize(net, [batch()], likelihood=kind, num_data=DATA, **options)


def to_gaussian(net: Net) -> None:
    """Laplace's approximation."""
    guides.laplace(GateLoRA(net, prior=priors.Normal(), num_data=DATA))


_PRIORS: dict[str, Callable[[], Any]] = {
    "LogUniform": priors.LogUniform,
    "TruncatedLogUniform": priors.TruncatedLogUniform,
    "Normal": priors.Normal,
    "ARD": priors.ARD,
    "Horseshoe": priors.Horseshoe,
    "Horseshoe, slab": partial(priors.Horseshoe, slab=2.0),
    "Hierarchical": priors.Hierarchical,
    "SpikeSlab": priors.SpikeSlab,
    "one of a user": lambda: centered,
}
_LOW_RANK = guides.low_rank_multivariate_normal
_MODES: dict[str, dict[str, Any]] = {
    "sample": {},
    "linearized": {"method": "linearized"},
}
# From a network to nothing: what is measured.
ROWS: dict[str, Row] = {
    "the network alone": lambda net: net(batch()["x"]).sum().backward(),
    "RankSpace: coordinates, groups, cuts": grouped,
    **{
        f"GateLoRA, RankDiagonal, log alpha: {name}": partial(noise_under, prior)
        for name, prior in _PRIORS.items()
    },
    "SVI.step, noise per example": lambda net: step(gated(net)),
    "SVI.step, noise per batch": lambda net: step(gated(net), noise="batch"),
    "SVI.step, Horseshoe": lambda net: step(gated(net, priors.Horseshoe())),
    "SVI.step, FactorLoRA": lambda net: step(tied(net)),
    "SVI.step, low_rank_multivariate_normal": lambda net: step(
        gated(net, priors.Normal()), _LOW_RANK
    ),
    "SVI.step, delta": lambda net: step(gated(net, priors.Normal()), guides.delta),
    **{
        f"predict, {name}": partial(predicted_by, mode) for name, mode in _MODES.items()
    },
    "predict, linearized, by draws": lambda net: predicted(
        gated(net, priors.Horseshoe(slab=2.0)), **_MODES["linearized"]
    ),
    "predict, FactorLoRA": lambda net: predicted(tied(net)),
    "gramians": lambda net: gauge.gramians(gated(net)[0], [batch()]),
    "gramians, subsets": lambda net: gauge.gramians(
        gated(net)[0], [batch()], gates="subsets"
    ),
    "bayesianize": bayesianized,
    "bayesianize, centered": lambda net: bayesianized(net, centered=True),
    "prune, log alpha": lambda net: pruned(gated(net)),
    "prune, ELBO drop": lambda net: pruned(gated(net), criterion="elbo_drop"),
    "prune, ELBO drop, Horseshoe": lambda net: pruned(
        gated(net, priors.Horseshoe()), criterion="elbo_drop"
    ),
    "prune, FactorLoRA": lambda net: pruned(tied(net), criterion="elbo_drop"),
    "free_lower_layers": lambda net: freed(gated(net)),
    "RankSchedule, BalanceSchedule": lambda net: scheduled(gated(net)),
    "RankHistory": lambda net: recorded(gated(net)),
    "save, load": lambda net: stored(gated(net)),
    "checkpoint, resume": lambda net: checkpointed(gated(net)),
    "export_peft": lambda net: exported(gated(net)),
    "to_arviz": lambda net: lrvd.to_arviz(*gated(net), [batch()]),
}
# What is quadratic by nature, and refused.
REFUSED: dict[str, Row] = {
    "multivariate_normal": lambda net: guides.multivariate_normal(gated(net)[0]),
    "iaf": lambda net: guides.iaf(gated(net)[0]),
    "laplace": to_gaussian,
}
