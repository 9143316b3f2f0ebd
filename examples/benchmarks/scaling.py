"""How the cost of a Bayesian step grows: modules, rank, batch, draws.

A stack of residual linear layers of width 256, each with LoRA, on texts of 32 random
"tokens"; around 24 modules, rank 8, 16 texts and 1 draw, one of the four is varied at
a time. A step is forward, backward and optimizer; GateLoRA by ``SVI.step`` is timed in
turn with a plain LoRA step of the same batch, 1 thread, and the table has medians: the
time over that of LoRA in per cent and in milliseconds. S draws are compared with S LoRA
steps. "A/A" is a second LoRA at the center.

    PYTHONPATH=examples python examples/benchmarks/scaling.py

appends a line per point to results/scaling.jsonl and prints the table.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import peft
import pyro
import torch
from benchmarks.measuring import append
from benchmarks.step_time import LR, Step, in_turn, ratios
from pyro.infer import SVI
from torch import Tensor, nn
from torch.nn import functional as F

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.optim import AdamW

WIDTH, LENGTH = 256, 32
CENTER = {"modules": 24, "r": 8, "batch": 16, "draws": 1}
SWEEPS = {
    "modules": (6, 24, 72, 224),
    "r": (4, 16, 64),
    "batch": (4, 64),
    "draws": (2, 4),
}
RESULTS = Path(__file__).parent / "results" / "scaling.jsonl"
Point = dict[str, int]


class Stack(nn.Module):
    """Residual linear layers and a head."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(modules))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        logits: Tensor = self.head(x.mean(1))
        return logits


def adapted(point: Point) -> Any:
    """A fresh copy with LoRA, always of the same weights."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=point["r"], target_modules=r"layers\.\d+", modules_to_save=["head"]
    )
    return peft.get_peft_model(Stack(point["modules"]), config)


def lora_step(point: Point, x: Tensor, labels: Tensor) -> Step:
    """As many plain LoRA steps as there are draws."""
    net = adapted(point)
    trained = [p for p in net.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def step() -> None:
        for _ in range(point["draws"]):
            F.cross_entropy(net(x), labels).backward()
            optim.step()
            optim.zero_grad()

    return step


def gate_step(point: Point, x: Tensor, labels: Tensor) -> Step:
    """GateLoRA by Pyro's driver."""
    model = GateLoRA(adapted(point), num_data=1000)
    loss = lrvd.RankELBO(num_particles=point["draws"])
    svi = SVI(model, RankDiagonal(model), AdamW(lr=LR), loss=loss)
    return lambda: svi.step(x=x, labels=labels)


def measure(point: Point, rounds: int, *, control: bool = False) -> dict[str, Any]:
    """One line; of two LoRA steps if it is the control."""
    x = torch.randn(point["batch"], LENGTH, WIDTH)
    labels = torch.randint(0, 2, (point["batch"],))
    other = lora_step if control else gate_step
    steps = {"LoRA": lora_step(point, x, labels), "other": other(point, x, labels)}
    times = in_turn(steps, rounds)
    pyro.clear_param_store()
    over = [t - one for t, one in zip(times["other"], times["LoRA"], strict=True)]
    line: dict[str, Any] = {"row": "A/A" if control else "GateLoRA, SVI"}
    line |= point | ratios(times["other"], times["LoRA"]) | {"rounds": rounds}
    return line | {
        "over_ms": 1e3 * median(over),
        "lora_ms": 1e3 * median(times["LoRA"]),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The lines of one run."""
    columns = ["", *CENTER, "LoRA, ms", "over it, ms", "over it, %", "quartiles"]
    text = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for line in lines:
        low, high = (100 * (q - 1) for q in line["quartiles"])
        cells = [line["row"], *(str(line[name]) for name in CENTER)]
        cells += [f"{line['lora_ms']:.1f}", f"{line['over_ms']:.1f}"]
        cells += [f"{100 * (line['ratio'] - 1):.1f}", f"{low:.1f} to {high:.1f}"]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    points = [CENTER | {name: n} for name, sweep in SWEEPS.items() for n in sweep]
    lines = [measure(CENTER, options.rounds, control=True)]
    lines += [measure(point, options.rounds) for point in points]
    append(lines, options.out, f"scaling.py --rounds {options.rounds}")
    print(table(lines))


if __name__ == "__main__":
    main()
