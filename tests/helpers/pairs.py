"""The rank-wise guide of either model, and the state of a run."""

from typing import Any

from pyro.infer import SVI
from torch import Tensor

from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.models import FactorLoRA


def rank_guide(model: Any, **options: Any) -> Any:
    """`TiedDiagonal` for weights, `RankDiagonal` for gates."""
    make: Any = TiedDiagonal if isinstance(model, FactorLoRA) else RankDiagonal
    return make(model, **options)


def state(svi: SVI) -> list[Tensor]:
    """Copies of all parameters and moments of a run."""
    trained = [p for m in (svi.model, svi.guide) for p in m.parameters()]
    optim: Any = svi.optim
    owners = getattr(optim, "optim_objs", {}).values() or [optim.torch_optim]
    states = [s for owner in owners for s in owner.state.values()]
    moments = [s[key] for s in states for key in ("step", "exp_avg", "exp_avg_sq")]
    return [tensor.detach().clone() for tensor in trained + moments]
