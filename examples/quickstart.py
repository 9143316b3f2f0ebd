"""Plain LoRA and low-rank variational dropout (LRVD) side by side, in minutes on a CPU.

MiniLM-L6 learns which library a docstring's first sentence comes from (names masked;
see docstrings.py), once as PEFT makes it and once with a posterior over its rank
components; epochs, batches, learning rate and schedule are the same. Then come the
docstrings of a library that neither has seen: is the network less certain there?

    python examples/quickstart.py
    python examples/quickstart.py --data reviews.csv --test unseen.csv --epochs 2
    python examples/quickstart.py --model microsoft/deberta-v3-base \\
        --targets query_proj,value_proj --data glue:sst2 --device cuda

LRVD predicts at its mean, with draws, and with its noise by evidence, which training
finds too small. Prints a table of scores on test, the effective rank of every LoRA
module as a picture, and the uncertainty on test beside that on the unseen library.
Options may be chosen by
the column "dev nll"; test is for the report. Writes to runs/quickstart, or --out: the
scores with intervals, two pictures, the adapter with its posterior, draws for ArviZ.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docstrings
import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pyro.infer import SVI
from quickstart_task import Task, load_task, options
from run_folder import Posterior, Result, write
from sklearn.metrics import roc_auc_score
from text_data import Batch, Encoded
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging

import lrvd_pyro as lrvd
from lrvd_pyro.diagnostics.calibration import scores
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.categorical import Categorical, CategoricalPrediction
from lrvd_pyro.models import GateLoRA


def lora_network(task: Task, args: argparse.Namespace) -> PeftModel:
    """The pretrained network with an adapter and a head, the same for the same seed."""
    torch.manual_seed(args.seed)
    config = AutoConfig.from_pretrained(args.model, num_labels=task.classes)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)  # the posterior is to be the only noise
    base = AutoModelForSequenceClassification.from_pretrained(args.model, config=config)
    targets = args.targets.split(",")
    check_targets(base, targets)
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=args.r,
        lora_alpha=2 * args.r,
        target_modules=targets,
    )
    with warnings.catch_warnings():
        # PEFT reads a property that Transformers has deprecated.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(base, lora).to(args.device)


def check_targets(base: torch.nn.Module, targets: list[str]) -> None:
    """Refuse names that no layer with a matrix has."""
    layers = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    }
    if unknown := [name for name in targets if name not in layers]:
        raise ValueError(f"--targets {unknown}; expected some of {sorted(layers)}")


def linear_decay(task: Task, args: argparse.Namespace) -> Callable[[int], float]:
    """The schedule of the learning rates, from 1 to 0 at the last step."""
    steps = args.epochs * -(-len(task.train) // args.batch)
    return lambda step: 1 - step / steps


def train(
    name: str, step: Callable[[Batch], float], task: Task, args: argparse.Namespace
) -> float:
    """Take one step on each batch of each epoch; returns the seconds."""
    generator = torch.Generator().manual_seed(args.seed)
    began = time.perf_counter()
    for epoch in range(args.epochs):
        batches = list(task.train.batches(args.batch, generator))
        bar = tqdm(batches, desc=f"{name}, epoch {epoch + 1} of {args.epochs}")
        for batch in bar:
            bar.set_postfix(loss=f"{step(batch):.2f}", refresh=False)
    return time.perf_counter() - began


def run_lora(task: Task, args: argparse.Namespace) -> list[Result]:
    """Plain LoRA, trained by a plain torch loop."""
    net = lora_network(task, args)
    weights = [p for p in net.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optim, linear_decay(task, args))

    def step(batch: Batch) -> float:
        loss = net(**batch).loss
        loss.backward()
        optim.step()
        schedule.step()
        optim.zero_grad()
        return float(loss.detach())

    seconds = train("LoRA", step, task, args)
    cost = {
        "parameters": num_trainable(net),
        "rank": lrvd.RankSpace(net).size,
        "seconds": seconds,
    }
    return [Result("LoRA", cost, *(at_a_point(net, data) for data in task.predicted()))]


def run_lrvd(task: Task, args: argparse.Namespace) -> tuple[list[Result], Posterior]:
    """LRVD, trained by Pyro's SVI; predicts at the mean, with draws and linearized."""
    model = GateLoRA(lora_network(task, args), num_data=len(task.train))
    guide = RankDiagonal(model)
    optim = lrvd.optim.AdamW(lr=args.lr, schedule=linear_decay(task, args))
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    history = lrvd.RankHistory(guide)
    history.record(0)

    def step(batch: Batch) -> float:
        loss = float(svi.step(**batch))
        history.record(len(history.steps))
        return loss / len(task.train)

    seconds = train("LRVD", step, task, args)
    cost = {
        "parameters": num_trainable(model) + num_trainable(guide),
        "rank": float(guide.effective_rank),
        "seconds": seconds,
    }
    with lrvd.posterior_mean(model, guide) as net:
        mean = [at_a_point(net, data) for data in task.predicted()]
    sampled = [
        lrvd.predict(model, guide, data.in_order(), args.samples, progress=True)
        for data in task.predicted()
    ]
    results = [
        Result("LRVD, posterior mean", cost, *mean),
        Result(f"LRVD, {args.samples} samples", cost, *sampled),
    ]
    noisy, evident = with_noise_by_evidence(model, guide, task, args.batch, cost)
    return results + evident, Posterior(model, guide, history, noisy)


def with_noise_by_evidence(
    model: GateLoRA, guide: RankDiagonal, task: Task, size: int, cost: dict[str, float]
) -> tuple[RankDiagonal, list[Result]]:
    """A second guide of more noise, and what it predicts; else the first guide."""
    began = time.perf_counter()
    noisy = RankDiagonal(model)
    noisy.load_state_dict(guide.state_dict())
    batches = task.train.grouped(size)
    try:
        lrvd.gauge.noise_by_evidence(model, noisy, batches, progress=True)
    except ValueError as error:
        print(f"LRVD keeps the noise of training: {error}\n")
        return guide, []
    seconds = cost["seconds"] + time.perf_counter() - began
    linearized = [
        lrvd.predict(model, noisy, data.in_order(), method="linearized", progress=True)
        for data in task.predicted()
    ]
    cost = cost | {"rank": float(noisy.effective_rank), "seconds": seconds}
    return noisy, [Result("LRVD, noise by evidence", cost, *linearized)]


@torch.no_grad()
def at_a_point(net: PeftModel, data: Encoded) -> CategoricalPrediction:
    """What the network says with one setting of its weights."""
    net.eval()
    logits = torch.cat([net(**batch).logits for batch in data.in_order()])
    likelihood = Categorical()
    return likelihood.collect(likelihood.summarize(logits[None]))


def num_trainable(module: torch.nn.Module) -> int:
    """The number of parameters that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def score_row(task: Task, result: Result) -> dict[str, Any]:
    """Scores on test, and the one on dev."""
    on_dev = scores(result.dev.probs, task.dev.labels)["nll"]
    on_test = scores(result.test.probs, task.test.labels)
    return {"": result.name, "dev nll": on_dev} | on_test | result.cost


def uncertainty_row(result: Result) -> dict[str, Any]:
    """Mean uncertainty in nats, and the AUROC of telling the held-out library by it."""
    row: dict[str, Any] = {"": result.name}
    for label, field in [("entropy", "entropy"), ("MI", "mutual_information")]:
        known = getattr(result.test, field).cpu()
        unseen = getattr(result.held_out, field).cpu()
        is_unseen = [0] * len(known) + [1] * len(unseen)
        row[f"{label}, test"] = float(known.mean())
        row[f"{label}, {docstrings.HELD_OUT}"] = float(unseen.mean())
        row[f"{label}, AUROC"] = roc_auc_score(is_unseen, torch.cat([known, unseen]))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text."""
    return pd.DataFrame(rows).round(3).to_string(index=False)


def rank_picture(guide: RankDiagonal, r: int) -> str:
    """The effective rank of each LoRA module, layers down and module types across."""
    frame = pd.DataFrame(guide.space.coordinates)
    frame["kept"] = torch.sigmoid(-guide.log_alpha).cpu().numpy()
    grid = frame.pivot_table("kept", index="layer", columns="type", aggfunc="sum")
    bars = grid.map(
        lambda rank: f"{'█' * round(8 * rank / r):·<8} {rank:4.1f}", na_action="ignore"
    )
    return bars.to_string()


def run(args: argparse.Namespace) -> None:
    """Train both ways, print what came of it and write the run folder."""
    task = load_task(args)
    results = run_lora(task, args)
    of_lrvd, posterior = run_lrvd(task, args)
    results += of_lrvd
    print(table([score_row(task, result) for result in results]))
    print(f"\nEffective rank of each LoRA module, of {args.r}:\n")
    print(rank_picture(posterior.guide, args.r))
    print("\nEntropy and mutual information (MI) in nats:\n")
    print(table([uncertainty_row(result) for result in results]))
    print()
    for line in write(args.out, posterior, results, task, args.draws):
        print(line)


def main(argv: list[str] | None = None) -> None:
    """Run with the options given; end with one line if they do not work."""
    parser = options(__doc__)
    out = Path("runs", "quickstart")
    parser.add_argument("--out", type=Path, default=out, help=f"run folder; {out}")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()  # every run has a new head
    logging.disable_progress_bar()
    try:
        run(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"quickstart: {error}") from error


if __name__ == "__main__":
    main()
