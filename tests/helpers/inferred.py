"""What the tests of ArviZ share: ArviZ, imported quietly, and posteriors to show it."""

import warnings
from typing import Any

import pytest
from nets import bert

from lrvd_pyro import priors
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA

QUIET = [
    pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:pandas.errors.Pandas4Warning"),
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # once a day ArviZ announces itself
    az = pytest.importorskip("arviz", reason="needs the arviz extra")

OLD = int(az.__version__.split(".")[0]) < 1
RAGGED = {"layer.0.attention.self.query": 2}
QUERY, VALUE = "attention.self.query", "attention.self.value"


def pair(**options: Any) -> tuple[GateLoRA, RankDiagonal]:
    """A ragged model of 14 rank components, and its guide."""
    model = GateLoRA(bert(rank_pattern=RAGGED), num_data=60, **options)
    return model, RankDiagonal(model, init_log_alpha=-1.0)


def hierarchical() -> tuple[GateLoRA, RankDiagonal]:
    """The same under a prior with scales above the ranks."""
    return pair(prior=priors.Horseshoe(slab=2.0))


def names(group: Any) -> set[str]:
    """The groups, in the ArviZ at hand."""
    return set(group.groups() if OLD else group.children)
