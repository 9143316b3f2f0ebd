"""Every prior and every guide by name: a new one of either joins by one line here."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pyro
from pyro import distributions as dist
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGaussian,
    AutoNormal,
    AutoStructured,
    init_to_value,
)
from torch import Tensor

from lrvd_pyro import guides
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.priors import (
    ARD,
    Hierarchical,
    Horseshoe,
    LogUniform,
    Normal,
    SpikeSlab,
    TruncatedLogUniform,
)


def own(space: Any) -> Tensor:
    """A prior as a user writes it."""
    scale = pyro.sample("scale", dist.HalfCauchy(space.ones(1)).to_event(1))
    z = pyro.sample("z", dist.Normal(space.ones(), 1.0).to_event(1))
    return scale * z


def auto(kind: Any, **options: Any) -> Callable[[Any], Any]:
    """One of Pyro's guides, passed directly."""
    return lambda m: kind(m, init_loc_fn=init_to_value(values=m.start()), **options)


GAUSSIAN_SCALE = 'Hierarchical(partial(Normal, 0.0), "layer")'
PRIORS: dict[str, Callable[[], Any]] = {
    "LogUniform()": LogUniform,
    "LogUniform(8.0)": lambda: LogUniform(8.0),
    "TruncatedLogUniform()": TruncatedLogUniform,
    "Normal()": Normal,
    "ARD()": ARD,
    "Horseshoe()": Horseshoe,
    "Horseshoe(slab=2.0)": lambda: Horseshoe(slab=2.0),
    "Hierarchical()": Hierarchical,
    GAUSSIAN_SCALE: lambda: Hierarchical(partial(dist.Normal, 0.0), "layer"),
    "SpikeSlab()": SpikeSlab,
    "your own": lambda: own,
}
GUIDES: dict[str, Callable[[Any], Any]] = {
    "RankDiagonal": RankDiagonal,
    "RankDiagonal(learn_mean=True)": partial(RankDiagonal, learn_mean=True),
    "delta": guides.delta,
    "multivariate_normal": guides.multivariate_normal,
    "low_rank_multivariate_normal": guides.low_rank_multivariate_normal,
    "iaf": guides.iaf,
    "laplace": guides.laplace,
    "AutoNormal": auto(AutoNormal),
    "AutoDiagonalNormal": auto(AutoDiagonalNormal),
    "AutoStructured": auto(
        AutoStructured, conditionals="normal", dependencies="linear"
    ),
    "AutoGaussian": auto(AutoGaussian),
}
# Pairs whose objective has no minimum.
REFUSED = {
    *product(["LogUniform()", "LogUniform(8.0)"], ["delta", "iaf", "laplace"]),
    *product(["ARD()", GAUSSIAN_SCALE], ["delta", "laplace"]),
    ("Hierarchical()", "delta"),
}
