"""Tables of `evidence.py`: means over seeds, and paired intervals over texts.

    PYTHONPATH=examples python examples/benchmarks/evidence_table.py \\
        --data data/sst2 --trained runs/evidence

prints a table of the data set's lines in results/evidence.jsonl. Below it are the
differences of NLL of the default, GateLoRA scaled and linearized, to each other row.
The NLL of a text is averaged over the seeds that both rows have, and texts are
resampled 10,000 times. The intervals hold 95% of these; they know of the test set's
chance, not of training's.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from benchmarks.evidence import RESULTS, SCORES, recorded
from safetensors.torch import load_file
from small_task import TRAIN, R, scored
from torch import Tensor

from lrvd_pyro.diagnostics.scores import per_datum

DEFAULT = "GateLoRA, scaled, linearized"
RESAMPLES = 10_000
COLUMNS = [*SCORES, "extra", "seconds"]


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, one row per method."""
    groups = pd.DataFrame(lines).groupby("row", sort=False)[COLUMNS]
    mean, sd, count = groups.mean(), groups.std(), groups.size()
    text = ["| | seeds | " + " | ".join(COLUMNS) + " |"]
    text.append("|---" * (len(COLUMNS) + 2) + "|")
    for row in mean.index:
        values = [cell(mean.loc[row, c], sd.loc[row, c]) for c in SCORES]
        values += [f"{mean.loc[row, c]:.0f}" for c in COLUMNS[len(SCORES) :]]
        text.append(f"| {row} | {count[row]} | " + " | ".join(values) + " |")
    return "\n".join(text)


def cell(mean: float, sd: float) -> str:
    """A mean, and the standard deviation if there are several seeds."""
    return f"{mean:.3f}" if pd.isna(sd) else f"{mean:.3f} ± {sd:.3f}"


def nlls(files: Iterable[Path], labels: Tensor) -> dict[str, dict[str, Tensor]]:
    """The NLL of each text under each row, by seed."""
    found: dict[str, dict[str, Tensor]] = {}
    for file in files:
        seed = file.name.split("-")[3]
        for row, probs in load_file(file).items():
            found.setdefault(row, {})[seed] = per_datum(probs, labels)["nll"]
    return found


def interval(differences: Tensor) -> tuple[float, float, float]:
    """A mean over texts, and the ends of its bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    size = len(differences)
    means = [
        differences[torch.randint(size, (size,), generator=generator)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975]).to(means[0]))
    return float(differences.mean()), float(low), float(high)


def differences(files: Iterable[Path], labels: Tensor) -> str:
    """The NLL of the default less that of each other row."""
    rows = nlls(files, labels)
    ours = rows.pop(DEFAULT)
    text = [f"| NLL of {DEFAULT}, less that of | seeds | mean | 95% interval |"]
    text.append("|---" * 4 + "|")
    for row, theirs in rows.items():
        if both := sorted(ours.keys() & theirs.keys()):
            each = torch.stack([ours[seed] - theirs[seed] for seed in both])
            mean, low, high = interval(each.mean(0))
            ends = f"[{low:+.3f}, {high:+.3f}]"
            text.append(f"| {row} | {len(both)} | {mean:+.3f} | {ends} |")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Print the table and the differences of one data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of texts")
    parser.add_argument("--trained", type=Path, required=True, help="where nets lie")
    parser.add_argument("--count", type=int, default=TRAIN, help="texts trained on")
    parser.add_argument("--r", type=int, default=R, help="the rank of the adapter")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    setting = {"data": options.data.name, "count": options.count, "r": options.r}
    lines = [each for each in recorded(options.out) if setting.items() <= each.items()]
    print(table(lines), end="\n\n")
    labels = torch.tensor(scored(options.data).by_length().labels)
    name = f"{options.data.name}-{options.count}-{options.r}-*.safetensors"
    print(differences(sorted(options.trained.glob(name)), labels))


if __name__ == "__main__":
    main()
