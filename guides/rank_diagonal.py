"""The rank-wise diagonal guide."""

from collections.abc import Collection
from dataclasses import replace
from itertools import accumulate
from typing import Any, final

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.guides.families import Noise, PositiveNoise, family_of
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.rank_space.removal import Cuts, slice_tensors

DRAWS = 4096  # for moments of gates that are no product of latent sites


@final
class RankDiagonal(RankGuide):
    """Independent noise on every latent component: one variance per rank component.

    For `GateLoRA`: Normal on the real line, LogNormal (truncated where the prior is)
    on positive sites, all latent levels of the prior included. Under the `LogUniform`
    prior this is ``gate ~ Normal(1, alpha)``. The mean of the lowest site of R
    components with which the gate scales is held at 1, the others are learned: of a
    scale shared by several ranks, of a logit. Under a scale-free prior (`LogUniform`,
    `ARD`) that loses nothing while B trains, since B absorbs the mean (about a center,
    `gauge.center`, all but a constant of it). Under a prior with a scale it is a
    choice: a rank that no datum wants rests where the KL is least at mean 1 (at
    alpha = s^2 under ``Normal(s)``), so that effective ranks do not compare across
    priors; ``learn_mean=True`` lets such gates fall to 0.

    The log alpha of each site starts at -4, a noise of 14%; log variances stay within
    [-10, 8] on real sites, [-10, 2] on the logarithm of positive ones.

    Wrong when rank components are strongly dependent under the posterior: it then
    understates the uncertainty. Under another gauge of A and B it is another posterior.

    Args:
        model: A `GateLoRA`; `TiedDiagonal` guides `FactorLoRA`.
        learn_mean: Learn all means: where A and B are frozen, or a prior has a scale.
        init_log_alpha: Where log alpha starts.

    Raises:
        TypeError: If ``model`` is another one, or a latent site of its prior is neither
            real nor positive.
    """

    def __init__(
        self,
        model: GateLoRA,
        *,
        learn_mean: bool = False,
        init_log_alpha: float = -4.0,
    ) -> None:
        if not isinstance(model, GateLoRA):
            raise TypeError(
                f"model is a {type(model).__name__}; RankDiagonal guides GateLoRA. "
                f"FactorLoRA takes guides.TiedDiagonal(model), other programs take "
                f"pyro.infer.autoguide.AutoNormal(model)"
            )
        super().__init__(model)
        self._gate_at = model.value_at
        sites = model.latent_sites().items()
        self.families = {name: family_of(name, fn) for name, fn in sites}
        start = model.start()
        powers = self._powers(start)
        self._is_product = None not in powers.values()
        self.learn_mean, self.init_log_alpha = learn_mean, init_log_alpha
        families = self.families.items()
        noise = [f.start_log_variance(init_log_alpha, start[n]) for n, f in families]
        self.log_variance = nn.Parameter(torch.cat(noise))
        size = self.space.size
        each = [n for n in start if powers[n] == 1 and len(start[n]) == size]
        self.hold([] if learn_mean else each[-1:], start)

    @property
    def held(self) -> tuple[str, ...]:
        """The latent sites whose mean stays where it started."""
        return tuple(self._held)

    def hold(self, sites: Collection[str], start: dict[str, Tensor]) -> None:
        """Hold the means of these sites at ``start``; learn the others, from there."""
        self._held = {name: start[name] for name in sites}
        families = self.families.items()
        locs = [f.to_loc(start[n]) for n, f in families if n not in self._held]
        self.loc = nn.Parameter(torch.cat(locs)) if locs else None

    def forward(self, *args: Any, **batch: Any) -> dict[str, Tensor]:
        """Draw the latent sites, whatever the batch; returns their values."""
        return self.draw_independent(self.distributions())

    def distributions(self) -> dict[str, dist.TorchDistribution]:
        """The posterior of each latent site, elementwise."""
        families, noise = self.families.items(), self.by_site(self.log_variance)
        learned = [f.size for name, f in families if name not in self._held]
        locs = iter(() if self.loc is None else torch.split(self.loc, learned))
        posteriors = {}
        for (name, family), log_variance in zip(families, noise):
            if name in self._held:
                loc = family.to_loc(self._held[name].to(log_variance.device))
            else:
                loc = next(locs)
            posteriors[name] = family.posterior(loc, log_variance)
        return posteriors

    def mean(self) -> Tensor:
        """The posterior mean of the gate, (R,).

        Exact where the gate is a product of latent sites; of 4,096 draws elsewhere.
        """
        if not self._is_product:
            return self._draws().mean(0)
        return self._gate_at({n: q.mean for n, q in self.distributions().items()})

    @property
    def log_alpha(self) -> Tensor:
        """Log noise-to-signal ratio ``Var[gate] / E[gate]^2`` of each component, (R,).

        Exact where the gate is a product of latent sites; of 4,096 draws elsewhere.
        """
        with torch.no_grad():
            if not self._is_product:
                gate = self._draws()
                return (gate.var(0) / gate.mean(0).square()).log()
            return self.noise_ratio().log().to(self.log_variance.dtype)

    def noise_ratio(self) -> Tensor:
        """Alpha with its graph, (R,).

        Raises:
            TypeError: If the gate is no product of latent sites.
        """
        if not self._is_product:
            raise TypeError(
                f"the gate is no product of the latent sites {sorted(self.families)}, "
                f'so that its noise has no closed form; prune by criterion="log_alpha"'
            )
        spread, one = {}, {}
        for name, q in self.distributions().items():
            mean, variance = q.mean.double(), q.variance.double()
            spread[name] = 1 + variance / mean.square()
            one[name] = torch.ones_like(mean)
        return self._gate_at(spread) / self._gate_at(one) - 1

    def by_site(self, vector: Tensor) -> tuple[Tensor, ...]:
        """A vector laid out as ``log_variance``, cut into latent sites."""
        return torch.split(vector, [f.size for f in self.families.values()])

    def cuts(self, keep: Tensor) -> Cuts:
        """What `select` would slice, all checked and nothing done."""
        rows = self._rows(keep)
        cuts: Cuts = {self.log_variance: (0, _joined(rows, self.families))}
        if self.loc is not None:
            learned = {n: f for n, f in self.families.items() if n not in self._held}
            cuts[self.loc] = 0, _joined(rows, learned)
        return cuts

    def select(self, keep: Tensor) -> None:
        """Forget the rank components where ``keep`` (R,) is False, in place.

        Raises:
            TypeError: If a latent site has neither one component, nor R, nor one per
                module, layer or type under a name that says so.
        """
        rows = self._rows(keep)
        slice_tensors(self.cuts(keep))
        self.families = {n: _narrowed(f, rows[n]) for n, f in self.families.items()}
        self._held = {n: v[rows[n].to(v.device)] for n, v in self._held.items()}

    def _rows(self, keep: Tensor) -> dict[str, Tensor]:
        return {
            name: self.space.indices_kept(keep, name, family.size)
            for name, family in self.families.items()
        }

    def _powers(self, start: dict[str, Tensor]) -> dict[str, int | None]:
        """The power, 0 or 1, of each site in the gate; None where it has none."""
        gate = self._gate_at(start)
        found: dict[str, int | None] = {}
        for name, value in start.items():
            scaled = {c: self._gate_at({**start, name: c * value}) for c in (0.5, 2.0)}
            powers = [
                power
                for power in (0, 1)
                if all(torch.allclose(scaled[c], c**power * gate) for c in scaled)
            ]
            found[name] = powers[0] if powers else None
        return found

    def _draws(self) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            posteriors = self.distributions().items()
            return self._gate_at({n: q.sample((DRAWS,)) for n, q in posteriors})


def _joined(rows: dict[str, Tensor], families: dict[str, Noise]) -> Tensor:
    """Indices into the vectors of sites as indices into all of them joined."""
    starts = accumulate((f.size for f in families.values()), initial=0)
    return torch.cat([start + rows[name] for name, start in zip(families, starts)])


def _narrowed(family: Noise, index: Tensor) -> Noise:
    if not isinstance(family, PositiveNoise) or family.bounds is None:
        return replace(family, size=len(index))
    index = index.to(family.bounds[0].device)
    low, high = (bound.expand(family.size)[index] for bound in family.bounds)
    return replace(family, size=len(index), bounds=(low, high))
