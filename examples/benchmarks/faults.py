"""What storage does with hostile files, kills, full disks, and rivals for a path.

`load` and `resume` get files that were damaged, and files that a stranger edited and
sealed again; `export_peft` reads no file and gets a run whose state is spoiled. Every
input is tried in a process of its own. Writes are killed, run out of disk, and meet
other writers and readers. The classes are explained in `fault_trials`.

    PYTHONPATH=examples python examples/benchmarks/faults.py --seeds 0 --count 500

writes results/faults.md: a row per function and kind, a column per class. With --log,
every outcome is written to a file, with its input and its error. It needs Linux; the
rows of read-only folders need root, who then gives up its rights, or any other user.
"""

import argparse
import collections
import shlex
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from benchmarks import fault_exports, fault_writes
from benchmarks.fault_sweep import swept
from benchmarks.fault_trials import CLASSES, KINDS, Bench, Outcome
from benchmarks.measuring import versions

RESULTS = Path(__file__).parent / "results" / "faults.md"
NEVER = (
    "state changed",
    "silently wrong",
    "code executed",
    "crashed",
    "hung",
    "memory",
)
SWEPT = "gates"  # the run whose every entry is changed
POOR = 0.02  # the largest share of poor errors


def outcomes(
    seed: int, count: int, kills: int, others: int, sweeps: bool
) -> list[Outcome]:
    """All trials of a seed.

    Args:
        seed: The seed.
        count: Hostile inputs of each function.
        kills: Kills of each writer.
        others: Trials of each other situation of each writer.
        sweeps: Also change every entry of the formats.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        found = [each for f in KINDS for each in bench.trials(f, count, seed)]
        found += fault_exports.trials(bench, count, seed)
        if sweeps:
            found += swept(bench, SWEPT)
        return found + fault_writes.trials(bench, kills, others, seed)


def table(found: list[Outcome]) -> str:
    """A row per function and kind, and the sum of each function."""
    counts = collections.Counter((o.function, o.kind, o.label) for o in found)
    counts.update((o.function, "**all**", o.label) for o in found)
    rows = dict.fromkeys((o.function, o.kind) for o in found)
    rows |= dict.fromkeys((o.function, "**all**") for o in found)
    lines = ["| " + " | ".join(["function", "input", *CLASSES]) + " |"]
    lines += ["|---" * 2 + "|--:" * len(CLASSES) + "|"]
    functions = [*dict.fromkeys(function for function, _ in rows)]
    for function, kind in sorted(rows, key=lambda row: functions.index(row[0])):
        cells = [str(counts[function, kind, label] or "") for label in CLASSES]
        lines.append(f"| {function} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def failures(found: list[Outcome]) -> list[str]:
    """Where the outcomes are not what the library promises."""
    bad = [f"{o.function}, {o.kind}: {o.label}" for o in found if o.label in NEVER]
    poor = sum(o.label == "poor error" for o in found) / len(found)
    return bad + ([f"{poor:.1%} poor errors"] if poor >= POOR else [])


def main(argv: list[str] | None = None) -> None:
    """Run all trials and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--count", type=int, default=500, help="inputs a function")
    parser.add_argument("--kills", type=int, default=60, help="kills a function")
    parser.add_argument("--others", type=int, default=10, help="of other situations")
    parser.add_argument("--sweep", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a Markdown file")
    parser.add_argument("--log", type=Path, help="a file for every outcome")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    numbers = options.count, options.kills, options.others
    found = []
    for number, seed in enumerate(options.seeds):
        # A sweep is the same for every seed.
        found += outcomes(seed, *numbers, sweeps=options.sweep and not number)
    given = [*(sys.argv[1:] if argv is None else argv)]
    if "--log" in given:  # a place on one machine
        at = given.index("--log")
        del given[at : at + 2]
    known = ", ".join(f"{name} {value}" for name, value in versions().items())
    text = [
        f"# {__doc__.splitlines()[0]}",
        f"By `faults.py {shlex.join(given)}`; {known}.",
    ]
    text += ["The columns are explained in `fault_trials.py`.", table(found)]
    options.out.write_text("\n\n".join(text) + "\n")
    if options.log:
        lines = "".join(f"{' | '.join(each)}\n" for each in found)
        options.log.write_text(lines, errors="backslashreplace")
    print(table(found))
    if bad := collections.Counter(failures(found)):
        sys.exit("\n".join(f"{count} x {each}" for each, count in bad.items()))


if __name__ == "__main__":
    main()
