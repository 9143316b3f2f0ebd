"""Assertions that prove a prior, a guide or an objective right, for users' tests."""

from lrvd_pyro.testing.assertions import assert_error, assert_ok, assert_unbiased_elbo
from lrvd_pyro.testing.goodness_of_fit import FAILURE_RATE, assert_goodness_of_fit
from lrvd_pyro.testing.sbc import assert_uniform_ranks, sbc_ranks

__all__ = [
    "FAILURE_RATE",
    "assert_error",
    "assert_goodness_of_fit",
    "assert_ok",
    "assert_unbiased_elbo",
    "assert_uniform_ranks",
    "sbc_ranks",
]
