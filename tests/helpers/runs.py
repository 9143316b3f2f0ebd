"""Small training runs that write a checkpoint after every step and can be resumed."""

import hashlib
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.inference.param_store import give_own_name
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.training.checkpoints import checkpoint, resume
from lrvd_pyro.training.sampler import ResumableSampler

STEPS = 12
NOISY = torch.tensor([1, 1, 1, 1, -4, 1, -4, -4])  # the module ``hidden`` will go
DRIVERS = ("svi", "torch")
Run = dict[str, Any]


def halved(step: int) -> float:
    return float(0.5 ** (step / 5))


def fresh(driver: str, net: Any = None) -> Run:
    """The arguments of checkpoint and resume, made as for a new run."""
    torch.manual_seed(0)
    net = nets.perceptron() if net is None else net
    model = GateLoRA(net, prior=lrvd.priors.ARD(), num_data=20)
    guide = RankDiagonal(model)
    elbo = lrvd.RankELBO(kl_weight=lrvd.linear_warmup(2))
    start = torch.cat([torch.full((len(v),), -4.0) for v in model.start().values()])
    start[:8] = NOISY.to(start)[: len(start)]
    guide.log_variance.data = start
    optimizer: Any = lrvd.optim.AdamW(lr=1e-2, schedule=halved, clip_norm=1.0)
    extra = []
    if driver == "torch":
        groups = lrvd.optim.parameter_groups(model, guide, lr=1e-2)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        extra = [torch.optim.lr_scheduler.LambdaLR(optimizer, halved)]
    pruning = lrvd.RankSchedule(
        model,
        guide,
        optimizer,
        start=3,
        every=2,
        checks=2,
        log_alpha_threshold=-1.0,
        elbo=elbo,
    )
    return {
        "model": model,
        "guide": guide,
        "optimizer": optimizer,
        "elbo": elbo,
        "sampler": ResumableSampler(20, seed=1),
        "schedule": [pruning, *extra],
    }


def data() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(20, 5, generator=rng)
    return x, torch.randint(0, 3, (20,), generator=rng)


def train(run: Run, steps: int, after: Callable[[], object] = bool) -> None:
    """Go on until this many steps were taken in all; call ``after`` each."""
    x, labels = data()
    while True:
        for index in run["sampler"].batches(6):
            if run["elbo"].step == steps:
                return
            blur = random.gauss(0, 0.1) + np.random.normal(0, 0.1)
            step(run, x=x[index] + blur, labels=labels[index])
            after()


def step(run: Run, **batch: Tensor) -> None:
    model, guide, optimizer, elbo = list(run.values())[:4]
    if isinstance(optimizer, lrvd.optim.AdamW):
        SVI(model, guide, optimizer, loss=elbo).step(**batch)
    else:
        elbo(model, guide)(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for each in run["schedule"]:
        each.step()


def end(run: Run) -> dict[str, Any]:
    """All that a run leads to, as bits: weights, moments, places, next draws."""
    model, optimizer = run["model"], run["optimizer"]
    optim = getattr(optimizer, "torch_optim", optimizer)
    groups, state = (optim.param_groups, optim.state) if optim else ([], {})
    held = [p for g in groups for p in g["params"]]
    tensors = [*model.parameters(), *run["guide"].parameters()]
    moments = [m for p in held for m in state[p].values()]
    return {
        "weights": bits(tensors),
        "moments": bits(moments),
        "rates": [g["lr"] for g in groups],
        "origin": list(model.space.origin),
        "places": [run["sampler"].state_dict(), run["elbo"].step],
        "schedule": [str(each.state_dict()) for each in run["schedule"]],
        "draws": [torch.rand(()).item(), np.random.rand(), random.random()],
    }


def bits(tensors: list[Tensor]) -> str:
    joined = b"".join(t.detach().numpy().tobytes() for t in tensors)
    return hashlib.sha256(joined).hexdigest()


def complete(folder: Path, driver: str, after: Callable[[], object] = bool) -> None:
    """Begin or resume the run in a folder, and leave its end there."""
    run = fresh(driver)
    path = folder / "run.safetensors"
    seed = random.SystemRandom().randrange(2**31)  # whatever a new process has
    pyro.set_rng_seed(seed if path.exists() else 3)
    if path.exists():
        resume(path, **run)

    def save() -> None:
        checkpoint(path, **run)
        after()

    train(run, STEPS, save)
    (folder / "end").write_text(repr(end(run)))


def begun(path: Path, driver: str = "svi", steps: int = 7) -> Run:
    """A run of this many steps, with its checkpoint; from step 5 on it is pruned."""
    run = fresh(driver)
    pyro.set_rng_seed(3)
    train(run, steps)
    checkpoint(path, **run)
    return run


def started(driver: str) -> Run:
    """A new run after one step."""
    run = fresh(driver)
    train(run, 1)
    return run


def everything(run: Run) -> str:
    """All that resume could change, without changing it."""
    kept = torch.get_rng_state(), random.getstate(), np.random.get_state()
    found = repr({**end(run), "random": bits([kept[0]]), "more": kept[1:]})
    torch.set_rng_state(kept[0])
    random.setstate(kept[1])
    np.random.set_state(kept[2])
    return found


def automatic(family: Any) -> tuple[Any, Any]:
    model = GateLoRA(nets.perceptron(), prior=lrvd.priors.ARD(), num_data=20)
    return model, set_up(family(model))


def set_up(guide: Any) -> Any:
    """An AutoGuide under a name of its own, with its parameters."""
    x, labels = data()
    give_own_name(guide)(x=x, labels=labels)
    return guide


def frozen(net: Any) -> Any:
    """A is random and does not train, as in LoRA-FA."""
    for name, parameter in net.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return net


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    complete(Path(sys.argv[1]), sys.argv[2])
