"""Distributions over gates and scales, and the KL divergences between them in nats.

Importing the package registers every divergence with ``torch.distributions``. A new
distribution gets a file of its own; its KL divergences go into ``closed_forms.py``.
"""

from lrvd_pyro.distributions.closed_forms import expected_softplus
from lrvd_pyro.distributions.log_uniform import (
    LOG_UNIFORM_CONSTANT,
    LogUniform,
    dawson,
    dawson_integral,
    log_uniform_kl,
    molchanov_kl,
)
from lrvd_pyro.distributions.truncated import TruncatedLogNormal, TruncatedLogUniform

__all__ = [
    "LOG_UNIFORM_CONSTANT",
    "LogUniform",
    "TruncatedLogNormal",
    "TruncatedLogUniform",
    "dawson",
    "dawson_integral",
    "expected_softplus",
    "log_uniform_kl",
    "molchanov_kl",
]
