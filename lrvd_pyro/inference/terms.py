"""The observed terms of a loss, and their means over particles."""

from typing import Any

from pyro.poutine import Trace
from torch import Tensor

from lrvd_pyro.inference.kl import scaled_log_prob

__all__ = ["add_mean", "observed_terms"]


def observed_terms(trace: Trace) -> dict[str, Tensor]:
    """The log likelihood, and the weight prior if there is one, in nats."""
    terms: dict[str, Any] = {}
    nodes: dict[str, Any] = trace.nodes
    for site in nodes.values():
        if site["type"] != "sample" or not site["is_observed"]:
            continue
        # pyro.deterministic is an observed Delta, of log density 0.
        if site["infer"].get("_deterministic"):
            continue
        is_prior = site["infer"].get("is_weight_prior")
        entry = "weight_prior" if is_prior else "log_likelihood"
        terms[entry] = terms.get(entry, 0.0) + scaled_log_prob(site)
    return terms


def add_mean(totals: dict[str, Tensor], terms: dict[str, Tensor], count: int) -> None:
    for name, term in terms.items():
        totals[name] = totals.get(name, 0.0) + term.detach() / count
