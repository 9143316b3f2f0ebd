"""KL(guide || model), site by site, in closed form wherever there is one."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Delta, LogNormal, constraints
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from lrvd_pyro.distributions import LogUniform

Site = Any
Unexpanded = Mapping[str, Distribution]

GAUSSIAN = {"Normal", "MultivariateNormal", "LowRankMultivariateNormal"}


def latent_sites(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace that are neither observed nor subsample indices."""
    nodes: dict[str, Site] = trace.nodes
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
    }


def scaled_log_prob(site: Site) -> Tensor:
    """The log density of a site's value under its scale and mask, summed; nats."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    total: Tensor = scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
    return total


def divergence(
    model_trace: Trace,
    guide_trace: Trace,
    once: tuple[Unexpanded, Unexpanded] = ({}, {}),
    copies: int = 1,
    multiplicities: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``KL(guide || model)`` in nats: per site, or joint.

    A guide that draws an auxiliary site ``<name>_unconstrained`` for each latent one
    (Pyro's AutoNormal) is read as drawing the latent itself. Other auxiliary sites
    (Pyro's AutoGuides over one joint latent) make one entry, ``joint``. A Delta site
    counts the log density that it carries.

    Args:
        model_trace: Of the model, replayed against the guide.
        guide_trace: Of the guide.
        once: For model and guide, the distributions before they were expanded over
            ``copies`` examples: where both are there, their KL is computed once.
        copies: How many examples share such a distribution.
        multiplicities: How often the KL of a site counts, if not once.

    Returns:
        The divergences; and for each site whose part is a Monte Carlo estimate, the
        families of guide and model there.

    Raises:
        ValueError: If guide and model do not have the same latent sites, a guide site
            is not reparameterized, the two scale a site differently, a site with the
            log-uniform prior is not drawn from a Gaussian, or a joint guide covers
            sites of different multiplicity.
    """
    model_sites, guide_sites = latent_sites(model_trace), latent_sites(guide_trace)
    guide_sites, unexpanded = _paired(model_sites, guide_sites, once[1])
    once = once[0], unexpanded
    auxiliary = _match(model_sites, guide_sites)
    _refuse_unbounded(model_sites, guide_sites, auxiliary)
    weights = dict.fromkeys(model_sites, 1.0) | dict(multiplicities or {})
    weights |= dict.fromkeys(auxiliary, _common(weights, auxiliary))
    kl: dict[str, Tensor] = {}
    estimated: dict[str, str] = {}
    for name, guide_site in guide_sites.items():
        closed = None
        if name not in auxiliary and not isinstance(guide_site["fn"], Delta):
            closed = _closed_form(name, model_sites[name], guide_site, once, copies)
        if closed is not None:
            kl[name] = weights[name] * closed
            continue
        entry = "joint" if auxiliary else name
        term = weights[name] * scaled_log_prob(guide_site)
        if name not in auxiliary:
            term = term - weights[name] * scaled_log_prob(model_sites[name])
        if family(guide_site["fn"]) != Delta.__name__:
            p = family(model_sites[name]["fn"]) if name in model_sites else "..."
            estimated[name] = f"{family(guide_site['fn'])} || {p}"
        kl[entry] = kl[entry] + term if entry in kl else term
    return kl, estimated


def _paired(
    model_sites: dict[str, Site], guide_sites: dict[str, Site], once: Unexpanded
) -> tuple[dict[str, Site], Unexpanded]:
    """Pairs ``<name>_unconstrained``, ``<name>`` of a guide as one site each."""
    guide_sites, once = dict(guide_sites), dict(once)
    for name in guide_sites.keys() & model_sites.keys():
        given = f"{name}_unconstrained"
        support = model_sites[name]["fn"].support
        if given in guide_sites and _constrained(guide_sites[given]["fn"], support):
            fn = _constrained(guide_sites.pop(given)["fn"], support)
            guide_sites[name] = {**guide_sites[name], "fn": fn}
            if given in once:
                once[name] = _constrained(once[given], support)
    return guide_sites, once


def _constrained(q: Any, support: Any) -> Any:
    """The distribution of ``biject_to(support)(x)``, x ~ q, where it has a name."""
    support = getattr(support, "base_constraint", support)
    if family(q) != "Normal":
        return None
    if support is constraints.real:
        return q
    if support in (constraints.positive, constraints.nonnegative):
        normal, dims = (q.base_dist, q.event_dim) if q.event_dim else (q, 0)
        return LogNormal(normal.loc, normal.scale).to_event(dims)
    return None


def _common(weights: dict[str, float], auxiliary: set[str]) -> float:
    """The multiplicity of what a joint guide covers."""
    if auxiliary and len(set(weights.values())) > 1:
        raise ValueError(
            f"a joint guide covers sites of the multiplicities {weights}, whose terms "
            f"cannot be told apart; use a guide per site, RankDiagonal(model)"
        )
    return max(weights.values(), default=1.0)


def _closed_form(
    name: str,
    model_site: Site,
    guide_site: Site,
    once: tuple[Unexpanded, Unexpanded],
    copies: int,
) -> Tensor | None:
    p, q, scale = model_site["fn"], guide_site["fn"], guide_site["scale"]
    if name in once[0] and name in once[1]:
        p, q, scale = once[0][name], once[1][name], scale * copies
    try:
        kl = kl_divergence(q, p)
    except NotImplementedError:
        return None
    total: Tensor = scale_and_mask(kl, scale, guide_site["mask"]).sum()
    return total


def _match(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> set[str]:
    """Check that the sites pair up; returns the guide's auxiliary ones."""
    auxiliary = {n for n, s in guide_sites.items() if s["infer"].get("is_auxiliary")}
    if model_sites.keys() != guide_sites.keys() - auxiliary:
        raise ValueError(
            f"the model has the latent sites {sorted(model_sites)} but the guide draws "
            f"{sorted(guide_sites.keys() - auxiliary)}; build the guide on this model, "
            f"RankDiagonal(model), and give the batch its labels"
        )
    for name, site in guide_sites.items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"guide site {name!r} draws from {family(site['fn'])}, which is not "
                f"reparameterized; use a relaxation, or pyro.infer.Trace_ELBO"
            )
        if name not in auxiliary:
            _match_pair(name, model_sites[name], site)
    return auxiliary


def _match_pair(name: str, model_site: Site, guide_site: Site) -> None:
    p, q = model_site["fn"], guide_site["fn"]
    if p.event_dim != q.event_dim:
        raise ValueError(
            f"site {name!r} has {q.event_dim} event dimensions in the guide and "
            f"{p.event_dim} in the model; write .to_event({p.event_dim}) in the guide"
        )
    for what in ("scale", "mask"):
        ours, theirs = guide_site[what], model_site[what]
        if ours is not theirs and not _equal(ours, theirs):
            raise ValueError(
                f"site {name!r} has {what} {ours} in the guide and {theirs} in the "
                f"model; wrap both, or temper with RankELBO(kl_weight=...)"
            )


def _equal(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return False
    if isinstance(one, float) and isinstance(other, float):
        return one == other
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.shape == other.shape and bool((one == other).all())


def _refuse_unbounded(
    model_sites: dict[str, Site], guide_sites: dict[str, Site], auxiliary: set[str]
) -> None:
    """Raise for pairs whose KL has no minimum.

    KL(q || 1/|z|) falls without bound for a point mass, or a positive q near 0; so does
    that of a point mass from a density whose scale can shrink with it.
    """
    for name, site in model_sites.items():
        drawn = {name}
        if auxiliary and isinstance(guide_sites[name]["fn"], Delta):
            drawn = auxiliary
        families = {family(guide_sites[n]["fn"]) for n in drawn}
        if drawn == auxiliary and _point_masses(guide_sites, auxiliary):
            families.add("Delta")
        reason = ""
        if family(site["fn"]) == LogUniform.__name__ and families - GAUSSIAN:
            reason = "a log-uniform prior"
        elif families == {"Delta"} and _shrinks(site["fn"], in_logs=drawn == auxiliary):
            reason = "a prior with a learned or latent scale"
        if reason:
            raise ValueError(
                f"site {name!r} has {reason}, under which the KL of "
                f"{sorted(families - GAUSSIAN)} has no minimum; use a Gaussian guide, "
                f"RankDiagonal(model), or another proper prior"
            )


def _shrinks(p: Any, *, in_logs: bool) -> bool:
    """Whether a density grows without bound as its scale and a point fall to 0.

    In the logarithm of a positive site it does not.
    """
    base = p.base_dist if isinstance(p, Independent) else p
    scale = getattr(base, "scale", None)
    if in_logs and base.support is not constraints.real:
        return False
    return isinstance(scale, Tensor) and scale.requires_grad


def _point_masses(guide_sites: dict[str, Site], auxiliary: set[str]) -> bool:
    """Whether the Delta sites have more components than auxiliary sites give them."""
    deltas = [s for s in guide_sites.values() if isinstance(s["fn"], Delta)]
    given = sum(guide_sites[name]["value"].numel() for name in auxiliary)
    return bool(sum(site["value"].numel() for site in deltas) > given)


def family(fn: Any) -> str:
    """The name of a distribution's class, whatever its event dimensions."""
    return family(fn.base_dist) if isinstance(fn, Independent) else type(fn).__name__
