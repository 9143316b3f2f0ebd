"""The quickstart's options, and the data that they ask for."""

import argparse
import math
from typing import NamedTuple

import docstrings
import torch
from text_data import MINILM, Encoded, Text, split, unique
from text_files import read

PER_LIBRARY = 290  # sentences of each library, and of the held-out one
DOCSTRING_LENGTH, LENGTH = 32, 128  # tokens, by default: of docstrings, of your data


class Task(NamedTuple):
    """The data of one run."""

    train: Encoded
    dev: Encoded
    test: Encoded
    held_out: Encoded
    classes: int

    def predicted(self) -> tuple[Encoded, Encoded, Encoded]:
        """What is not trained on."""
        return self.dev, self.test, self.held_out


def options(description: str) -> argparse.ArgumentParser:
    """The options of data, network and training."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=MINILM, help="hub name or folder; MiniLM-L6")
    add(
        "--data",
        help=".tsv or .csv with columns text (or text_a, text_b) and label, or the "
        "hub's name[:config[:split]]; docstrings",
    )
    add("--test", help="labeled test data of the same kind; a quarter of --data")
    add("--rows", type=whole, help="rows of --data to use, at most; all")
    add(
        "--max-length",
        type=whole,
        help=f"tokens of a text to use; {LENGTH} ({DOCSTRING_LENGTH} of docstrings)",
    )
    add("--r", type=whole, default=8, help="rank of each LoRA module; 8")
    add("--targets", default="query,value", help="layers to adapt; query,value")
    add("--epochs", type=whole, default=6, help="passes over the training data; 6")
    add("--batch", type=whole, default=32, help="examples a step; 32")
    add("--lr", type=rate, default=4e-3, help="learning rate, falling to 0; 0.004")
    add("--samples", type=whole, default=8, help="draws of a prediction; 8")
    add("--draws", type=draws, default=1000, help="draws for ArviZ; 1,000")
    add("--seed", type=int, default=0, help="of split, head and noise; 0")
    add("--device", type=device, default="cpu", help="torch device; cpu")
    return parser


def load_task(args: argparse.Namespace) -> Task:
    """Read, split and tokenize the data; the held-out docstrings have no label."""
    data, held_out = docstrings.corpus(PER_LIBRARY)
    if args.data:
        data = read(args.data)
        if len(data.classes) < 2:
            raise ValueError(f"{args.data} has only the label {data.classes[0]!r}")
    given = read(args.test, data.classes) if args.test else None
    once = unique(data, seen=given)
    count = min(args.rows or len(once), len(once))
    shares = (60, 15, 25) if given is None else (80, 20)
    parts = split(once, count, seed=args.seed, shares=shares)
    parts += [] if given is None else [given]
    parts.append(Text(held_out, [0] * len(held_out)))
    length = args.max_length or (LENGTH if args.data else DOCSTRING_LENGTH)
    train, dev, test, unseen = encoded = [
        Encoded(part.by_length(), args.model, max_length=length).to(args.device)
        for part in parts
    ]
    print(
        f"{len(train)} sentences to train on, {len(dev)} dev, {len(test)} test, "
        f"{len(unseen)} of the held-out library {docstrings.HELD_OUT}"
    )
    untrained = set(range(len(data.classes))) - set(parts[0].labels)
    report = {
        "left out, repeated or in --test": len(data) - len(once),
        "left out by --rows": len(once) - count,
        f"cut at {length} tokens": sum(each.num_cut for each in encoded),
        "without a text to train on": [data.classes[i] for i in sorted(untrained)],
    }
    print(
        "".join(f"{what}: {which}\n" for what, which in report.items() if which), end=""
    )
    if args.data:
        print(f"{len(data.classes)} classes: {', '.join(data.classes)}")
    return Task(train, dev, test, unseen, classes=len(data.classes))


def whole(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number above 0")
    return int(text)


def draws(text: str) -> int:
    """A number of draws of which ArviZ can judge the tail."""
    if whole(text) < 25:
        raise argparse.ArgumentTypeError(f"{text!r}; az.loo needs 25 or more")
    return int(text)


def rate(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number above 0")
    return number


def device(text: str) -> str:
    """A device that torch has here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r}; {reason}") from error
    return text
