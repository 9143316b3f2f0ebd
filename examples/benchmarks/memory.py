"""The peak memory of every function at 40,000 rank components.

A 7B network with LoRA of rank 160 on 224 modules has R = 35,840. A network of width 8
stands in for it, since what grows with R does not grow with the width. Each row is one
process, forked after the network was made; the table has its largest resident memory,
and what that is beyond the network's own row. The limit is 4,096 MB. A covariance of
all latents is quadratic by nature: the last rows must be refused.

    PYTHONPATH=examples python examples/benchmarks/memory.py

appends a line per row to results/memory.jsonl, prints the table, and ends with an error
if a row needs more than the limit. It needs Linux, whose unit of memory it reads.
"""

import argparse
import multiprocessing
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from benchmarks.measuring import append
from benchmarks.memory_rows import REFUSED, ROWS, Net, Row, adapted

LIMIT = 4096
SHAPES = ((250, 160),)  # modules, and the rank of each
RESULTS = Path(__file__).parent / "results" / "memory.jsonl"


def run(row: Row, net: Net, pipe: Any) -> None:
    """One row, in a process of its own."""
    start, refusal = time.perf_counter(), ""
    try:
        row(net)
    except ValueError as error:
        refusal = str(error)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.send({"peak_mb": peak, "seconds": seconds, "refusal": refusal})


def measure(modules: int, r: int) -> list[dict[str, Any]]:
    """A line per row on one network."""
    net = adapted(modules, r)
    context, lines = multiprocessing.get_context("fork"), []
    for name, row in (ROWS | REFUSED).items():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=run, args=(row, net, sender))
        process.start()
        sender.close()
        # A process that the kernel ends, for want of memory, sends nothing.
        got = receiver.recv()
        process.join()
        if (name in REFUSED) != ("latent components" in got["refusal"]):
            raise RuntimeError(f"{name!r} at R = {modules * r}: {got}")
        lines.append({"row": name, "R": modules * r, "modules": modules, "r": r} | got)
        print(f"{name}: {got['peak_mb']:.0f} MB", file=sys.stderr)
    for line in lines:
        line["over_mb"] = line["peak_mb"] - lines[0]["peak_mb"]
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """The rows of one run, a column of figures per network."""
    shapes = list(dict.fromkeys((line["modules"], line["r"]) for line in lines))
    cells = {(line["row"], line["modules"], line["r"]): line for line in lines}
    heads = [f"{m:,} x {r}: peak, MB | over it, MB | seconds" for m, r in shapes]
    text = [" | ".join(["| ", *heads]) + " |", "|---" * (1 + 3 * len(shapes)) + "|"]
    for row in dict.fromkeys(line["row"] for line in lines):
        each = [cells[row, *shape] for shape in shapes]
        figures = [
            "refused | |"
            if one["refusal"]
            else f"{one['peak_mb']:,.0f} | {one['over_mb']:,.0f} | {one['seconds']:.1f}"
            for one in each
        ]
        text.append(" | ".join([f"| {row}", *figures]) + " |")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = [line for shape in SHAPES for line in measure(*shape)]
    append(lines, options.out, "memory.py")
    print(table(lines))
    if over := [line["row"] for line in lines if line["peak_mb"] > LIMIT]:
        sys.exit(f"more than {LIMIT} MB: {over}")


if __name__ == "__main__":
    main()
