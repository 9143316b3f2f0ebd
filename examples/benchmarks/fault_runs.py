"""Tiny training runs that the fault harness stores, damages and restores.

Every run is made the same way each time, so two runs of one name differ only by what
they were trained on. `state_of` has all that `load` and `resume` could change.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pyro
import torch
from peft import LoraConfig, get_peft_model
from pyro import distributions as dist
from pyro.infer import SVI
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.rank_space.find import plain_net
from lrvd_pyro.storage.peft_files import plain_name

DATA = 24
STEPS = 5  # of a stored run; "pruned" loses ranks after 3
Run = dict[str, Any]


class Net(nn.Module):
    """Two linear layers, a normalization between them, and a buffer."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm = nn.Linear(5, 12), nn.LayerNorm(12)
        self.out = nn.Linear(12, 3)
        self.register_buffer("shift", torch.full((12,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.norm(self.hidden(x)).tanh() + self.shift)
        return logits


def bert() -> nn.Module:
    """A classifier of two layers, whose names and layers PEFT knows."""
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_labels": 3}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(max_position_embeddings=8, **sizes)
    return BertForSequenceClassification(config)


def base(name: str) -> nn.Module:
    """The base of a run, always of the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return bert() if name == "factors" else Net()


def batch(name: str, index: Tensor | None = None) -> dict[str, Tensor]:
    """Some data of a run, by default the first six."""
    index = torch.arange(6) if index is None else index
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(DATA, 5, generator=rng)[index]
    labels = torch.randint(0, 3, (DATA,), generator=rng)[index]
    if name == "factors":
        return {"input_ids": (x * 5).long() % 20, "labels": labels}
    return {"x": x, "labels": labels}


def gates(name: str, net: nn.Module) -> tuple[Any, Any]:
    """GateLoRA, whose prior depends on the run."""
    prior: Any = {"horseshoe": lrvd.priors.Horseshoe, "pruned": lrvd.priors.ARD}
    options = {"prior": prior[name]()} if name in prior else {}
    weights = dist.Normal(0.0, 1.0) if name == "gates" else None
    model = GateLoRA(net, num_data=DATA, weight_prior=weights, **options)
    return model, RankDiagonal(model)


def factors(name: str, net: nn.Module) -> tuple[Any, Any]:
    """FactorLoRA and its guide."""
    model = FactorLoRA(net, num_data=DATA)
    return model, TiedDiagonal(model)


def _decay(step: int) -> float:
    return float(0.9**step)


def _schedules(name: str, run: Run) -> list[Any]:
    model, guide, optimizer = run["model"], run["guide"], run["optimizer"]
    if name == "torch":
        return [torch.optim.lr_scheduler.LambdaLR(optimizer, _decay)]
    start = 3 if name == "pruned" else 1000
    schedule = lrvd.RankSchedule(
        model,
        guide,
        optimizer,
        start=start,
        every=2,
        log_alpha_threshold=-1.0,
        elbo=run["elbo"],
    )
    return [schedule, lrvd.RankHistory(guide)]


RUNS: dict[str, Callable[[str, nn.Module], tuple[Any, Any]]] = {
    "gates": gates,
    "factors": factors,
    "torch": gates,
    "pruned": gates,
    "horseshoe": gates,
}


def fresh(name: str) -> Run:
    """The arguments of checkpoint and resume, made as for a new run."""
    seed(0)
    config: dict[str, Any] = {"target_modules": ["hidden", "out"]}
    if name == "factors":
        config = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    net = get_peft_model(base(name), LoraConfig(r=4, lora_alpha=8, **config))
    for key, parameter in net.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)
    model, guide = RUNS[name](name, net)
    if name == "pruned":
        guide.log_variance.data[:3] = 2.0
        guide.log_variance.data[4:8] = 2.0
    optimizer: Any = lrvd.optim.AdamW(lr=1e-2, schedule=_decay)
    if name == "torch":
        groups = lrvd.optim.parameter_groups(model, guide, lr=1e-2)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    elbo = lrvd.RankELBO(kl_weight=lrvd.linear_warmup(2))
    run: Run = {"model": model, "guide": guide, "optimizer": optimizer, "elbo": elbo}
    run["sampler"] = lrvd.ResumableSampler(DATA, seed=1)
    return run | {"schedule": _schedules(name, run)}


def trained(name: str, number: int, steps: int = STEPS) -> Run:
    """A new run, after some steps under a seed."""
    run = fresh(name)
    seed(number)
    for _ in range(steps):
        step(name, run)
    return run


def step(name: str, run: Run) -> float:
    """Take the next step; its loss."""
    index = next(run["sampler"].batches(6))
    model, guide, optimizer, elbo = [*run.values()][:4]
    data = batch(name, index)
    if isinstance(optimizer, torch.optim.Optimizer):
        loss = elbo(model, guide)(**data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result = float(loss.detach())
    else:
        result = float(SVI(model, guide, optimizer, loss=elbo).step(**data))
    for each in run["schedule"]:
        arguments = [elbo.step] if isinstance(each, lrvd.RankHistory) else []
        getattr(each, "record" if arguments else "step")(*arguments)
    return result


def loaded_run(model: Any, guide: Any) -> Run:
    """What a loaded pair needs for a step."""
    run: Run = {"model": model, "guide": guide, "optimizer": lrvd.optim.AdamW()}
    run |= {"elbo": lrvd.RankELBO(), "sampler": lrvd.ResumableSampler(DATA, seed=1)}
    return run | {"schedule": []}


def predictions(name: str, run: Run) -> dict[str, Any]:
    """What a run predicts at a seed."""
    inputs = {k: v for k, v in batch(name).items() if k != "labels"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = lrvd.predict(run["model"], run["guide"], [inputs], num_samples=3)
    return {"probs": found.probs}


def seed(number: int) -> None:
    """Of every generator."""
    pyro.set_rng_seed(number)


def module_state(root: nn.Module) -> dict[str, Any]:
    """Structure, flags, parameters and buffers of a network."""
    tensors = [*root.named_parameters(), *root.named_buffers()]
    return {
        "modules": {
            name: [type(m).__name__, m.training, sorted(vars(m))]
            for name, m in root.named_modules()
        },
        "tensors": {name: [t, t.requires_grad] for name, t in tensors},
    }


def base_state(net: nn.Module) -> dict[str, str]:
    """The parameters that no adapter has, by their names without PEFT."""
    own = ("lora_", "modules_to_save", "trainable_tokens_")
    return {
        plain_name(name): _text(parameter)
        for name, parameter in plain_net(net).named_parameters(remove_duplicate=False)
        if not any(part.startswith(own) for part in name.split("."))
    }


def pair_state(model: Any, guide: Any) -> dict[str, Any]:
    """All of a model and its guide."""
    space = model.space
    return {
        "model": module_state(model),
        "guide": module_state(guide),
        "num_data": model.num_data,
        "ranks": [space.modules, space.ranks, space.origin],
        "scalings": [layer.scaling.get(space.adapter) for layer in space.layers],
        "held": getattr(guide, "held", None),
    }


def state_of(run: Run) -> dict[str, Any]:
    """All that `resume` could change."""
    optimizer = run["optimizer"]
    optim: Any = getattr(optimizer, "torch_optim", optimizer)
    groups = [] if optim is None else optim.param_groups
    held = [p for group in groups for p in group["params"]]
    rest = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    return pair_state(run["model"], run["guide"]) | {
        "groups": [rest, held, getattr(optimizer, "steps", None)],
        "moments": [optim.state[p] for p in held if p in optim.state],
        "elbo": run["elbo"].step,
        "sampler": run["sampler"].state_dict(),
        "schedule": [each.state_dict() for each in run["schedule"]],
        "random": random_state(),
    }


def random_state() -> list[Any]:
    """Every global generator."""
    numpy: Any = np.random.get_state()
    return [torch.get_rng_state(), str(numpy[1].tolist()), numpy[2:], random.getstate()]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors, numbers and texts of a tree, by path."""
    if isinstance(value, dict):
        yield path, sorted(map(str, value))
        for key, each in value.items():
            yield from leaves(each, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        yield path, len(value)
        for number, each in enumerate(value):
            yield from leaves(each, f"{path}/{number}")
    else:
        yield path, value


def bits(value: Any) -> dict[str, str]:
    """Each leaf of a tree, bit for bit."""
    return {path: _text(leaf) for path, leaf in leaves(value)}


def structure(found: dict[str, str], parts: tuple[str, ...]) -> dict[str, str]:
    """Of `bits` below some paths: keys, types and shapes, without the values."""
    return {path: _kind(text) for path, text in found.items() if path.startswith(parts)}


def _kind(text: str) -> str:
    if text.startswith("list "):  # the keys of a dict
        return text
    return text.rpartition(" ")[0] if text[:6] == "torch." else text.partition(" ")[0]


def not_finite(value: Any) -> set[str]:
    """The paths of leaves that are NaN or infinite."""
    found = {p: v for p, v in leaves(value) if isinstance(v, float | Tensor)}
    return {p for p, v in found.items() if not torch.as_tensor(v).isfinite().all()}


def _text(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return f"{type(leaf).__name__} {leaf!r}"
    flat = leaf.detach().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return f"{leaf.dtype} {tuple(leaf.shape)} {hashlib.sha256(raw).hexdigest()}"


@cache
def reference(name: str, number: int = 1, steps: int = STEPS) -> Run:
    """A run that is trained once; a process that changes it does so for itself."""
    return trained(name, number, steps)
