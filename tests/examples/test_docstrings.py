"""The quickstart's corpus: docstrings of which the library is to be told."""

import importlib
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


NAMES = "numpy scipy torch sklearn scikit-learn pandas matplotlib sympy np. pd. plt."


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def test_corpus_is_disjoint_masked_and_holds_every_label() -> None:
    docstrings = importlib.import_module("docstrings")
    text_data = importlib.import_module("text_data")
    data, held_out = docstrings.corpus(60)
    parts = [part.texts for part in text_data.split(data, 10_000, seed=0)]
    texts = [text.lower() for part in [*parts, held_out] for text in part]
    assert len(texts) == len(set(texts)) == 60 * (len(docstrings.LIBRARIES) + 1)
    assert not [text for text in texts for name in NAMES.split() if is_in(name, text)]
    for part in text_data.split(data, 10_000, seed=0):
        assert set(part.labels) == set(range(len(docstrings.LIBRARIES)))


def is_in(name: str, text: str) -> bool:
    return bool(re.search(rf"\b{re.escape(name)}" if "." in name else name, text))


@pytest.mark.parametrize(
    "text",
    "A NumPy array; see np.where; torch.nn; PyTorch; scikit-learn; to_numpy".split(
        "; "
    ),
)
def test_mask_hides_names_in_any_case(text: str) -> None:
    docstrings = importlib.import_module("docstrings")
    masked = docstrings.mask(text)
    assert docstrings.MASK in masked
    assert not [name for name in NAMES.split() if is_in(name, masked.lower())]


def test_mask_leaves_other_words_alone() -> None:
    docstrings = importlib.import_module("docstrings")
    assert docstrings.mask("clasp. A step, and input.") == "clasp. A step, and input."


def test_a_library_that_is_not_installed_is_named() -> None:
    docstrings = importlib.import_module("docstrings")
    with pytest.raises(ModuleNotFoundError, match="no_such_library is not installed"):
        next(docstrings.first_sentences("no_such_library"))
