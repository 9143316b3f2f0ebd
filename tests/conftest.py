"""Every test starts alone: double precision, an empty store, its own seed."""

import os
import zlib
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyro
import pytest
import torch

torch.set_num_threads(1)  # the networks are tiny


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Float64, a cleared store, validation on, a seed drawn from the test's name."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(zlib.crc32(request.node.name.encode()))
    yield
    torch.set_default_dtype(before)
