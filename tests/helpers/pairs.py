"""The rank-wise guide of either model, for tests that take both."""

from typing import Any

from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.models import FactorLoRA


def rank_guide(model: Any, **options: Any) -> Any:
    """`TiedDiagonal` for weights, `RankDiagonal` for gates."""
    make: Any = TiedDiagonal if isinstance(model, FactorLoRA) else RankDiagonal
    return make(model, **options)
