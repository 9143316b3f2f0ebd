"""Variational families over the latent variables, one file a family.

`RankGuide` says what a new rank-wise family gives, with an example; a new file here is
imported below, and its class added to ``__all__``. Any other Pyro guide can be used as
it is: start it at ``model.start()``, as `lrvd_pyro.guides.auto` does.
"""

# Imported as plain ``guides`` this folder would load a second copy of every class.
if __name__ != "lrvd_pyro.guides":
    raise ImportError("import lrvd_pyro.guides, not guides")

from lrvd_pyro.guides.auto import (
    delta,
    iaf,
    laplace,
    low_rank_multivariate_normal,
    multivariate_normal,
)
from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.guides.fisher_laplace import FisherLaplace
from lrvd_pyro.guides.rank_diagonal import RankDiagonal
from lrvd_pyro.guides.row_diagonal import RowDiagonal
from lrvd_pyro.guides.tied_diagonal import TiedDiagonal

__all__ = [
    "FisherLaplace",
    "RankDiagonal",
    "RankGuide",
    "RowDiagonal",
    "TiedDiagonal",
    "delta",
    "iaf",
    "laplace",
    "low_rank_multivariate_normal",
    "multivariate_normal",
]
