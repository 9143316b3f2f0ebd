"""Noise by evidence beside early stopping, temperature scaling and Laplace.

`small_task` has the data and the schedule: MiniLM-L6, LoRA of rank 8 on query and
value. 500 texts that are not trained on choose epochs and temperatures; the official
dev or test set (2,000 texts of it at most) is scored, and chooses nothing. Rows of one
seed share texts, initial weights and the order of batches.

    PYTHONPATH=examples python examples/benchmarks/evidence.py \\
        --data data/sst2 --other data/cola --trained runs/evidence

appends a line per seed and row to results/evidence.jsonl, but for parts that the file
has. The folder keeps trained networks, and the probabilities of each text.
`evidence_table.py` makes tables of both.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.evidence_rows import PARTS, Bench, Row
from benchmarks.measuring import append
from safetensors.torch import save_file
from small_task import TRAIN, R, Task, scored
from text_data import Encoded
from torch import Tensor

from lrvd_pyro.diagnostics import calibration_report

RESULTS = Path(__file__).parent / "results" / "evidence.jsonl"
SCORES = ("accuracy", "nll", "brier", "ece", "failure_auroc", "ood_entropy")


def line(row: Row, labels: Tensor) -> dict[str, Any]:
    """The scores of a row."""
    report = calibration_report(
        row.test, labels, out_of_distribution=row.other, num_bootstrap=1
    )
    values = {name: round(getattr(report, name).value, 5) for name in SCORES}
    rest = {"extra": row.extra, "seconds": round(row.seconds, 1)}
    return {"row": row.name} | values | rest


def rows_of(part: str, bench: Bench) -> list[Row]:
    """The rows of a part, up to one without evidence, as after severe pruning."""
    rows = []
    try:
        for row in PARTS[part](bench):
            rows.append(row)
    except ValueError as error:
        if "the evidence has no maximum" not in str(error):
            raise
        print(f"{part} ends after {len(rows)} rows: {error}")
    return rows


def recorded(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines file, none if it does not exist."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(each) for each in text.splitlines()]


def main(argv: list[str] | None = None) -> None:
    """Run the parts of some seeds that the results lack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of texts")
    parser.add_argument("--other", type=Path, required=True, help="of another kind")
    parser.add_argument("--trained", type=Path, required=True, help="where nets lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--count", type=int, default=TRAIN, help="texts to train on")
    parser.add_argument("--r", type=int, default=R, help="the rank of the adapter")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    options.trained.mkdir(parents=True, exist_ok=True)
    other = Encoded(scored(options.other).by_length())
    for seed in options.seeds:
        task = Task(options.data, seed, count=options.count, r=options.r)
        bench = Bench(task, other, options.trained)
        setting = {"data": options.data.name, "count": options.count, "r": options.r}
        for part in options.parts:
            own = setting | {"seed": seed, "part": part}
            if any(own.items() <= each.items() for each in recorded(options.out)):
                continue
            rows = rows_of(part, bench)
            probs = {row.name: row.test.probs.float().contiguous() for row in rows}
            save_file(probs, task.path(options.trained, f"{part}.safetensors"))
            lines = [own | line(row, task.test.labels) for row in rows]
            words = " ".join(f"--{name} {value}" for name, value in setting.items())
            command = f"evidence.py {words} --seeds {seed} --parts {part}"
            append(lines, options.out, command)


if __name__ == "__main__":
    main()
