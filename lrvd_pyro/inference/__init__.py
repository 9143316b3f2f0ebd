"""The true evidence lower bound, and what it needs of programs and parameters.

The package knows neither PEFT nor the network. A new estimator is a subclass of Pyro's
``ELBO``, as `RankELBO` is. A new closed-form KL goes to `lrvd_pyro.distributions`.
"""

from lrvd_pyro.inference.elbo import RankELBO
from lrvd_pyro.inference.param_store import give_own_name
from lrvd_pyro.inference.per_example import PerExample
from lrvd_pyro.inference.programs import Guide
from lrvd_pyro.inference.warmup import linear_warmup

__all__ = ["Guide", "PerExample", "RankELBO", "give_own_name", "linear_warmup"]
