"""The examples run on two layers of MiniLM-L6."""

import importlib
from pathlib import Path

import pytest
import short_minilm

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the network."""
    folder = tmp_path_factory.mktemp("minilm")
    short_minilm.write(folder)
    return str(folder)


@pytest.fixture
def short_task(minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts take that network."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("quickstart_task", "small_task", "benchmarks.predict_time"):
        monkeypatch.setattr(importlib.import_module(name), "MINILM", minilm)
