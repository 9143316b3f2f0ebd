"""The observed terms of a loss, and their means over particles."""

from typing import Any

from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from lrvd_pyro.inference.kl import scaled_log_prob
from lrvd_pyro.inference.programs import Site

__all__ = ["add_mean", "log_prob_by_datum", "observed_terms"]


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


def log_prob_by_datum(site: Site, size: int) -> Tensor:
    """The log density of each datum's labels under the site's mask, ``B``, in nats.

    It is not scaled to the data set. Several labels of one datum count together.

    Args:
        site: The site ``labels`` of a likelihood.
        size: The number B of data.

    Raises:
        ValueError: If the densities have another first axis than the data.
    """
    log_prob = site["fn"].log_prob(site["value"].detach())
    # By the mask, and not by the plate's scale.
    each: Tensor = scale_and_mask(log_prob, mask=site["mask"])
    if each.dim() == 0 or len(each) != size:
        raise ValueError(
            f"the log density of the labels has shape {tuple(each.shape)} for {size} "
            f"data; expected one row per datum: in the likelihood, "
            f"pyro.sample('labels', fn.to_event(labels.dim() - 1), obs=labels)"
        )
    return each.flatten(1).sum(1) if each.dim() > 1 else each


def add_mean(totals: dict[str, Tensor], terms: dict[str, Tensor], count: int) -> None:
    for name, term in terms.items():
        totals[name] = totals.get(name, 0.0) + term.detach() / count
