"""KL(guide || model), site by site, in closed form wherever there is one."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Delta, LogNormal, constraints
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence
from torch.distributions.constraints import Constraint

from lrvd_pyro.distributions import LogUniform
from lrvd_pyro.inference.programs import Site, is_latent

__all__ = ["divergence", "family", "latent_sites", "scaled_log_prob"]

_Unexpanded = Mapping[str, Distribution]
_Factor = float | Tensor | None  # a site's scale or mask

_GAUSSIAN = {"Normal", "MultivariateNormal", "LowRankMultivariateNormal"}


def latent_sites(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace that are neither observed nor subsample indices."""
    nodes: dict[str, Any] = trace.nodes
    samples = {name: site for name, site in nodes.items() if site["type"] == "sample"}
    return {name: site for name, site in samples.items() if is_latent(site)}


def scaled_log_prob(site: Site) -> Tensor:
    """The log density of a site's value under its scale and mask, summed, in nats."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    total: Tensor = scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
    return total


def divergence(
    model_trace: Trace,
    guide_trace: Trace,
    once: tuple[_Unexpanded, _Unexpanded] = ({}, {}),
    copies: int = 1,
    multiplicities: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``KL(guide || model)`` in nats: per site, or joint.

    A guide may draw an auxiliary site ``<name>_unconstrained`` for each latent site, as
    Pyro's AutoNormal does. Such a pair is read as a draw of the latent site itself. All
    other auxiliary sites, as of AutoGuides over one joint latent, share one entry,
    ``joint``. A Delta site counts the log density that it carries.

    Args:
        model_trace: A run of the model, replayed against the guide.
        guide_trace: A run of the guide.
        once: For model and guide, the distributions before they were expanded over
            ``copies`` examples. A site in both has its KL computed once.
        copies: The number of examples that share such a distribution.
        multiplicities: How often the KL of a site counts; 1 where none is given.

    Returns:
        The divergences; and for each site whose part is a Monte Carlo estimate, the
        families of guide and model there.

    Raises:
        ValueError: If guide and model do not have the same latent sites, or scale a
            site differently. If a guide site is not reparameterized. If a site with the
            log-uniform prior is not drawn from a Gaussian. If a joint guide covers
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
        # Pyro's KL of a Delta drops its log density, and with it the Jacobian by which
        # AutoGuides map to a positive site. So a Delta is estimated from its draw.
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
    model_sites: dict[str, Site], guide_sites: dict[str, Site], once: _Unexpanded
) -> tuple[dict[str, Site], _Unexpanded]:
    """The guide's sites, each pair ``<name>_unconstrained``, ``<name>`` made one."""
    guide_sites, unexpanded = dict(guide_sites), dict(once)
    for name in guide_sites.keys() & model_sites.keys():
        auxiliary = f"{name}_unconstrained"
        support = model_sites[name]["fn"].support
        if auxiliary not in guide_sites:
            continue
        if fn := _constrained(guide_sites[auxiliary]["fn"], support):
            del guide_sites[auxiliary]
            guide_sites[name] = {**guide_sites[name], "fn": fn}
            if before := _constrained(unexpanded.get(auxiliary), support):
                unexpanded[name] = before
    return guide_sites, unexpanded


def _constrained(q: Distribution | None, support: Constraint) -> Distribution | None:
    """The distribution of ``biject_to(support)(x)``, x ~ q, if it has a name."""
    support = getattr(support, "base_constraint", support)
    if q is None or family(q) != "Normal":
        return None
    if support is constraints.real:
        return q
    if support in (constraints.positive, constraints.nonnegative):
        # Closed forms are registered by class, and none for a TransformedDistribution.
        base: Any = q.base_dist if isinstance(q, Independent) else q
        dims = len(q.event_shape)
        positive: Distribution = LogNormal(base.loc, base.scale).to_event(dims)
        return positive
    return None


def _common(weights: dict[str, float], auxiliary: set[str]) -> float:
    """The multiplicity of all sites that a joint guide covers."""
    if auxiliary and len(set(weights.values())) > 1:
        raise ValueError(
            f"a joint guide covers sites of the multiplicities {weights}, but its one "
            f"density has no part for each site; use RankDiagonal(model)"
        )
    return max(weights.values(), default=1.0)


def _closed_form(
    name: str,
    model_site: Site,
    guide_site: Site,
    once: tuple[_Unexpanded, _Unexpanded],
    copies: int,
) -> Tensor | None:
    """The KL of one site in nats; None if no closed form is registered."""
    p, q, scale = model_site["fn"], guide_site["fn"], guide_site["scale"]
    # One copy instead of B equal ones, each of scale 1/B: over all weights of an
    # adapter the expanded KL would take most of a step.
    if name in once[0] and name in once[1]:
        p, q, scale = once[0][name], once[1][name], scale * copies
    try:
        kl = kl_divergence(q, p)
    except NotImplementedError:
        return None
    total: Tensor = scale_and_mask(kl, scale, guide_site["mask"]).sum()
    return total


def _match(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> set[str]:
    """Check that the sites pair up; returns the names of the auxiliary sites."""
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
    if p.event_shape != q.event_shape:
        # A KL would broadcast one component over several.
        raise ValueError(
            f"site {name!r} has the event shape {tuple(q.event_shape)} in the guide "
            f"and {tuple(p.event_shape)} in the model; build the guide on this model, "
            f"RankDiagonal(model)"
        )
    for what in ("scale", "mask"):
        # A closed-form KL takes these from the guide alone, so that a scale in the
        # model alone would change nothing. Identity first: values wait for the device.
        in_guide, in_model = guide_site[what], model_site[what]
        if in_guide is not in_model and not _equal(in_guide, in_model):
            raise ValueError(
                f"site {name!r} has {what} {in_guide} in the guide and {in_model} in "
                f"the model; wrap both, or temper with RankELBO(kl_weight=...)"
            )


def _equal(one: _Factor, other: _Factor) -> bool:
    """Whether two scales, or two masks, have the same values."""
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

    ``KL(q || 1/|z|)`` falls without bound for a point mass, or for a positive q near 0.
    The KL of a point mass also does, from a density whose scale can shrink with it.
    """
    for name, site in model_sites.items():
        # Joint AutoGuides draw their auxiliary sites and put a Delta at each latent.
        drawn = {name}
        if auxiliary and isinstance(guide_sites[name]["fn"], Delta):
            drawn = auxiliary
        families = {family(guide_sites[n]["fn"]) for n in drawn}
        if drawn == auxiliary and _point_masses(guide_sites, auxiliary):
            families.add("Delta")
        reason = ""
        if family(site["fn"]) == LogUniform.__name__ and families - _GAUSSIAN:
            reason = "a log-uniform prior"
        elif families == {"Delta"} and _shrinks(site["fn"], in_logs=drawn == auxiliary):
            reason = "a prior with a learned or latent scale"
        if reason:
            raise ValueError(
                f"site {name!r} has {reason}, under which the KL of "
                f"{sorted(families - _GAUSSIAN)} has no minimum; use a Gaussian guide, "
                f"RankDiagonal(model), or another proper prior"
            )


def _shrinks(p: Distribution, *, in_logs: bool) -> bool:
    """Whether a density grows without bound as its scale and a point fall to 0.

    The density of the logarithm of a positive site does not.
    """
    base = p.base_dist if isinstance(p, Independent) else p
    scale = getattr(base, "scale", None)
    if in_logs and base.support is not constraints.real:
        return False
    return isinstance(scale, Tensor) and scale.requires_grad


def _point_masses(guide_sites: dict[str, Site], auxiliary: set[str]) -> bool:
    """Whether Delta sites have more components than the auxiliary sites have.

    Some Delta is then a point estimate, and not a function of an auxiliary draw.
    """
    deltas = [s for s in guide_sites.values() if isinstance(s["fn"], Delta)]
    drawn = sum(guide_sites[name]["value"].numel() for name in auxiliary)
    return bool(sum(site["value"].numel() for site in deltas) > drawn)


def family(fn: Distribution) -> str:
    """The name of a distribution's class, whatever its event dimensions."""
    return family(fn.base_dist) if isinstance(fn, Independent) else type(fn).__name__
