"""A small labeled corpus that every installation has: its libraries' docstrings.

The label of a sentence is the library it documents. The installed sources are parsed,
not imported, so reading has no side effects; the sentences vary with the versions
installed.
"""

import ast
import random
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from text_data import Text

LIBRARIES = ("numpy", "scipy", "torch", "sklearn", "pandas", "matplotlib")
HELD_OUT = "sympy"  # a requirement of torch, so it is always there
MASK = "[library]"
NAMES = re.compile(
    r"numpy|scipy|(py)?torch|sklearn|scikit[- ]?learn|pandas|matplotlib|sympy"
    r"|\b(np|sp|pd|plt|mpl)\.",
    re.IGNORECASE,
)
# Tests document nothing, and bundled copies belong to another library.
SKIPPED = {"test", "tests", "testing", "conftest.py", "externals", "_vendor"}
WORDS = range(4, 41)


def corpus(count: int) -> tuple[Text, list[str]]:
    """``count`` sentences of each of `LIBRARIES`, and as many of the held-out library.

    No sentence occurs twice: one that several libraries share is kept for the first of
    them. Libraries with fewer sentences give what they have.
    """
    seen: set[str] = set()
    found = [_take(library, count, seen) for library in (*LIBRARIES, HELD_OUT)]
    *known, held_out = found
    labels = [label for label, texts in enumerate(known) for _ in texts]
    return Text(sum(known, []), labels, classes=LIBRARIES), held_out


def first_sentences(library: str) -> Iterator[str]:
    """The masked first sentence of every public docstring, files in shuffled order.

    Raises:
        ModuleNotFoundError: If the library is not installed.
    """
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{library} is not installed, and its docstrings are part of the corpus; "
            f"pip install lrvd_pyro[examples]"
        )
    root = Path(spec.submodule_search_locations[0])
    files = sorted(root.rglob("*.py"))
    random.Random(0).shuffle(files)
    for file in files:
        if SKIPPED.isdisjoint(file.relative_to(root).parts):
            yield from _of_file(file)


def mask(text: str) -> str:
    """The text with every library name and import alias replaced."""
    return NAMES.sub(MASK, text)


def _of_file(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring and not node.name.startswith("_"):
            paragraph = " ".join(docstring.split("\n\n")[0].split())
            sentence = re.split(r"(?<=[.!?]) ", paragraph)[0]
            if len(sentence.split()) in WORDS:
                yield mask(sentence)


def _take(library: str, count: int, seen: set[str]) -> list[str]:
    """``count`` sentences that were not seen before; they are added to ``seen``."""
    taken: list[str] = []
    for sentence in first_sentences(library):
        if len(taken) == count:
            break
        if sentence.lower() not in seen:
            seen.add(sentence.lower())
            taken.append(sentence)
    return taken
