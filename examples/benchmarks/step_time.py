"""What a Bayesian training step costs, in units of a plain LoRA step.

A step is forward pass, backward pass and optimizer. Three networks, LoRA of rank 8,
64 tokens a text, float32, no dropout, 1 thread: a random 4-layer RoBERTa of width 256
with all six linear layers of a block (24 modules, 16 texts), MiniLM-L6 with query and
value (12 modules, 16 texts), a random 12-layer RoBERTa of width 768 with all six (72
modules, 8 texts). Each row has its own copy of the same weights and trains the same
head; LoRA has torch's fused AdamW. Rows run in turn, in a new order every round, in one
process; each time is divided by LoRA's of the same round, and the table has medians.
"A/A" is a second LoRA. Pyro's validation is off.

"bytes" is what autograd keeps for the backward pass: the distinct storages it saves,
those of parameters left out.

Re-balancing is `BalanceSchedule(every=200, gather_every=4)`: with g the time of a step
that gathers and b that of one balancing, both in units of a GateLoRA step without
either, the amortized cost is 1 + (g - 1)/4 + b/200.

    PYTHONPATH=examples python examples/benchmarks/step_time.py

appends a line per network and row to results/step_time.jsonl and prints the table.
"""

import argparse
import random
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import peft
import pyro
import torch
import transformers
from benchmarks.measuring import append, bytes_kept
from benchmarks.predict_time import (
    ALL_SIX,
    ATTENTION,
    minilm,
    roberta,
    seconds_of,
)
from pyro import distributions as dist
from pyro.infer import SVI
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import BalanceSchedule
from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.optim import AdamW, parameter_groups
from lrvd_pyro.rank_space.center import center_at

LENGTH, R, LR, EVERY, GATHER_EVERY = 64, 8, 1e-3, 200, 4
RESULTS = Path(__file__).parent / "results" / "step_time.jsonl"
Batch = dict[str, Tensor]
Step = Callable[[], Any]


def wide(classes: int) -> Any:
    """Twelve layers of width 768, at random."""
    sizes: dict[str, Any] = {"vocab_size": 30000, "num_labels": classes}
    config = RobertaConfig(**sizes, max_position_embeddings=LENGTH + 2)
    return RobertaForSequenceClassification(config)


@dataclass(frozen=True)
class Network:
    """How to build one, what LoRA adapts in it, and the examples of a batch."""

    build: Callable[[int], Any]
    targets: list[str]
    size: int


SMALL, GATE = "RoBERTa-like, 4 layers", "GateLoRA, SVI"
NETS = {
    SMALL: Network(roberta, ALL_SIX, 16),
    "MiniLM-L6": Network(minilm, ATTENTION, 16),
    "RoBERTa-like, 12 layers": Network(wide, ALL_SIX, 8),
}
BOUNDS = {  # on the first network, on the others
    GATE: (1.05, 1.03),
    "GateLoRA about a center, SVI": (1.05, 1.03),
    "GateLoRA, torch driver": (1.04, 1.02),
    "FactorLoRA, SVI": (1.25, 1.15),
    "horseshoe, SVI": (1.08, 1.04),
    "bytes, GateLoRA": (1.02, 1.02),
    "bytes, horseshoe": (1.02, 1.02),
    "re-balancing, amortized": (1.03, 1.03),
}


def adapted(network: Network) -> Any:
    """A fresh copy of the network with LoRA, always of the same weights."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=R, target_modules=network.targets, task_type="SEQ_CLS", lora_dropout=0.0
    )
    return peft.get_peft_model(network.build(2), config).eval()


def lora_step(net: Any, batch: Batch) -> Step:
    """Plain LoRA."""
    trained = [p for p in net.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def step() -> None:
        net(**batch).loss.backward()
        optim.step()
        optim.zero_grad()

    return step


def torch_step(model: Any, batch: Batch) -> Step:
    """RankELBO as a module with a torch optimizer."""
    guide = RankDiagonal(model)
    loss = lrvd.RankELBO()(model, guide)
    groups = parameter_groups(model, guide, lr=LR)
    optim = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def step() -> None:
        loss(**batch).backward()
        optim.step()
        optim.zero_grad()

    return step


def svi_of(model: GateLoRA) -> tuple[SVI, RankDiagonal]:
    """As the quickstart has it."""
    guide = RankDiagonal(model)
    return SVI(model, guide, AdamW(lr=LR), loss=lrvd.RankELBO()), guide


def svi_step(model: Any, batch: Batch) -> Step:
    """Pyro's own driver."""
    guide = TiedDiagonal(model) if model.binds == "weights" else RankDiagonal(model)
    svi = SVI(model, guide, AdamW(lr=LR), loss=lrvd.RankELBO())
    return lambda: svi.step(**batch)


def gate(network: Network) -> GateLoRA:
    """The rank gate under its default prior."""
    return GateLoRA(adapted(network), num_data=1000)


def centered(network: Network) -> GateLoRA:
    """Rank gates about a center, as after `gauge.center`."""
    model = gate(network)
    center_at(model.space, torch.randn(model.space.size))
    return model


def horseshoe(network: Network) -> GateLoRA:
    """The rank gate under global, module and rank scales."""
    prior, weights = lrvd.priors.Horseshoe(), dist.Normal(0.0, 1.0)
    return GateLoRA(adapted(network), num_data=1000, prior=prior, weight_prior=weights)


def scheduled(network: Network, batch: Batch) -> tuple[Step, Callable[[], float]]:
    """A GateLoRA step that gathers, and the seconds that one balancing takes."""
    model = gate(network)
    svi, guide = svi_of(model)
    schedule = BalanceSchedule(model, guide, svi.optim, every=10**9, gather_every=1)

    def gathering() -> None:
        svi.step(**batch)
        schedule.step()

    def balancing() -> float:
        svi.step(**batch)
        schedule.every = 1
        return seconds_of(schedule.step)

    return gathering, balancing


def bytes_of(network: Network, batch: Batch) -> dict[str, float]:
    """Bytes kept, as multiples of LoRA's."""
    net = adapted(network)
    plain = bytes_kept(lambda: net(**batch).loss, net)

    def ratio(model: Any) -> float:
        loss = lrvd.RankELBO()(model, RankDiagonal(model))
        loss(**batch)  # sets up the guide and looks for unreached parameters
        return bytes_kept(lambda: loss(**batch), model) / plain

    return {
        "bytes, GateLoRA": ratio(gate(network)),
        "bytes, horseshoe": ratio(horseshoe(network)),
    }


def in_turn(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    order = random.Random(0)
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {row: [] for row in steps}
    for _ in range(rounds):
        for row in order.sample(list(steps), len(steps)):
            times[row].append(seconds_of(steps[row]))
    return times


def ratios(times: list[float], base: list[float]) -> dict[str, Any]:
    """Median and quartiles of the paired ratios."""
    paired = sorted(t / one for t, one in zip(times, base, strict=True))
    quarter = len(paired) // 4
    middle = [paired[quarter], paired[-1 - quarter]]
    return {"ratio": median(paired), "quartiles": middle}


def batch_of(size: int) -> Batch:
    """Random tokens and labels."""
    torch.manual_seed(0)
    return {
        "input_ids": torch.randint(5, 30000, (size, LENGTH)),
        "attention_mask": torch.ones(size, LENGTH, dtype=torch.long),
        "labels": torch.randint(0, 2, (size,)),
    }


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """One line per row of a network."""
    network = NETS[name]
    batch = batch_of(network.size)
    kept = bytes_of(network, batch)
    gathering, balancing = scheduled(network, batch)
    factor = FactorLoRA(adapted(network), num_data=1000)
    steps = {
        "LoRA": lora_step(adapted(network), batch),
        "A/A": lora_step(adapted(network), batch),
        GATE: svi_step(gate(network), batch),
        "GateLoRA about a center, SVI": svi_step(centered(network), batch),
        "GateLoRA, torch driver": torch_step(gate(network), batch),
        "FactorLoRA, SVI": svi_step(factor, batch),
        "horseshoe, SVI": svi_step(horseshoe(network), batch),
        "gathering": gathering,
    }
    times = in_turn(steps, rounds)
    plain, gathered, gated = times["LoRA"], times.pop("gathering"), times[GATE]
    timed = {row: ratios(t, plain) for row, t in times.items() if row != "LoRA"}
    g = ratios(gathered, gated)["ratio"]
    b = median(balancing() for _ in range(5)) / median(gated)
    balanced = {"ratio": 1 + (g - 1) / GATHER_EVERY + b / EVERY, "g": g, "b": b}
    found = timed | {row: {"ratio": ratio} for row, ratio in kept.items()}
    found["re-balancing, amortized"] = balanced
    common = {"batch": network.size, "lora_seconds": median(plain), "rounds": rounds}
    return [
        {"net": name, "row": row} | line | {"bound": bound(row, name)} | common
        for row, line in found.items()
    ]


def bound(row: str, name: str) -> float | None:
    """What a row of a network is meant to stay below."""
    return BOUNDS[row][name != SMALL] if row in BOUNDS else None


def table(lines: list[dict[str, Any]]) -> str:
    """The lines of one run."""
    text = ["| network | | ratio | quartiles | to stay below |", "|---" * 5 + "|"]
    for line in lines:
        spread = " to ".join(f"{q:.3f}" for q in line.get("quartiles", []))
        limit = "" if line["bound"] is None else f"{line['bound']:.2f}"
        cells = (line["net"], line["row"], f"{line['ratio']:.3f}", spread, limit)
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    lines = [line for net in options.nets for line in measure(net, options.rounds)]
    words = ["--rounds", str(options.rounds), "--nets", *options.nets]
    append(lines, options.out, shlex.join(["step_time.py", *words]))
    print(table(lines))


if __name__ == "__main__":
    main()
