"""The rank-wise diagonal guide."""

from collections.abc import Collection
from itertools import accumulate
from typing import final

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro._numbers import check_number
from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.guides.families import Noise, family_of
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.models.checks import check_gates
from lrvd_pyro.rank_space.removal import Cuts, slice_tensors

__all__ = ["RankDiagonal"]

# For mean and variance of a gate that is not a product of latent sites: draws in all,
# and draws at once, since the memory is theirs times R.
_DRAWS, _CHUNK = 4096, 256


@final
class RankDiagonal(RankGuide):
    """Independent noise on every latent component: one variance per rank component.

    The family is Normal on real sites and LogNormal (truncated where the prior is) on
    positive ones; all latent levels of the prior are included. Under the `LogUniform`
    prior this is ``gate ~ Normal(1, alpha)``.

    One site's mean is fixed at 1: the lowest one-per-rank site that the gate is
    proportional to. All other means (shared scales, logits) are learned. Under a
    scale-free prior (`LogUniform`, `ARD`) this loses nothing while B trains, since B
    absorbs the mean; about a center (`gauge.center`), all but a constant of it.

    Under a prior with a scale the fixed mean is a choice. Ranks that the data do not
    constrain then settle where the KL is least at mean 1: at ``alpha = s^2`` under
    ``Normal(s)``. So effective ranks do not compare across priors. With
    ``learn_mean=True`` such gates can fall to 0.

    The log alpha of each site starts at -4, a noise of 14%. Log variances stay within
    [-10, 8] on real sites, and within [-10, 2] on the logarithm of positive ones.

    Wrong when rank components are strongly dependent under the posterior: the guide
    then understates the uncertainty. Under another gauge of A and B it is another
    posterior.

    Example::

        model = GateLoRA(net, num_data=len(train))
        svi = SVI(model, RankDiagonal(model), AdamW(lr=1e-3), loss=RankELBO())

    Args:
        model: A `GateLoRA`, or another model of gates.
        learn_mean: Learn all means: where A and B are frozen, or a prior has a scale.
        init_log_alpha: Where log alpha starts.
        linearized_scale: See `RankGuide`.

    Attributes:
        log_variance: The log variances of all sites, one after another.
        loc: The learned locations of all sites, None if there are none.
        families: The one-dimensional family of each latent site, by name.

    Raises:
        TypeError: If ``model`` draws no gates, or a latent site of its prior is neither
            real nor positive.
        ValueError: If ``init_log_alpha`` is not finite.
    """

    def __init__(
        self,
        model: RankModel,
        *,
        learn_mean: bool = False,
        init_log_alpha: float = -4.0,
        linearized_scale: float = 1.0,
    ) -> None:
        way_out = "FactorLoRA takes guides.TiedDiagonal(model), other models take"
        way_out += " pyro.infer.autoguide.AutoNormal(model)"
        check_gates(model, "RankDiagonal", way_out)
        check_number("init_log_alpha", init_log_alpha, "a finite number: -4.0")
        super().__init__(model, linearized_scale=linearized_scale)
        # A bound method: as a child, the model would share its parameters.
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
        """The latent sites whose mean is fixed."""
        return tuple(self._held)

    def hold(self, sites: Collection[str], start: dict[str, Tensor]) -> None:
        """Fix the means of some sites; learn the others.

        Args:
            sites: The sites to fix.
            start: For each latent site the mean that it has, or starts from.
        """
        self._held = {name: start[name] for name in sites}
        families = self.families.items()
        locs = [f.to_loc(start[n]) for n, f in families if n not in self._held]
        self.loc = nn.Parameter(torch.cat(locs)) if locs else None

    def forward(self, *args: object, **batch: object) -> dict[str, Tensor]:
        """Draw the latent sites, whatever the batch; returns their values."""
        return self.draw_independent(self.distributions())

    def distributions(self) -> dict[str, dist.TorchDistribution]:
        """The elementwise posterior of each latent site, by name."""
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

        Exact where the gate is a product of latent sites; elsewhere of 4,096 draws.
        """
        if not self._is_product:
            return self._moments()[0]
        return self._gate_at({n: q.mean for n, q in self.distributions().items()})

    @property
    def log_alpha(self) -> Tensor:
        """Log noise-to-signal ratio ``Var[gate] / E[gate]^2`` of each component, (R,).

        Exact where the gate is a product of latent sites; elsewhere of 4,096 draws.
        """
        with torch.no_grad():
            if not self._is_product:
                mean, variance = self._moments()
                return (variance / mean.square()).log()
            return self.noise_ratio().log().to(self.log_variance.dtype)

    def noise_ratio(self) -> Tensor:
        """Alpha of each rank component with its graph, (R,).

        Raises:
            TypeError: If the gate is not a product of latent sites.
        """
        if not self._is_product:
            raise TypeError(
                f"the gate is not a product of the latent sites "
                f"{sorted(self.families)}, so its noise has no closed form; prune by "
                f'criterion="log_alpha"'
            )
        # 1 + alpha of a product is the product of the sites' 1 + alpha, which the gate
        # itself forms. In double, since a small alpha is lost beside the 1.
        spread, one = {}, {}
        for name, q in self.distributions().items():
            mean, variance = q.mean.double(), q.variance.double()
            spread[name] = 1 + variance / mean.square()
            one[name] = torch.ones_like(mean)
        return self._gate_at(spread) / self._gate_at(one) - 1

    def by_site(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Cut a vector laid out as ``log_variance`` into latent sites."""
        return torch.split(vector, [f.size for f in self.families.values()])

    def cuts(self, keep: Tensor) -> Cuts:
        """What `select` would slice, checked, without doing it."""
        rows = self._rows(keep)
        cuts: Cuts = {self.log_variance: (0, _joined(rows, self.families))}
        if self.loc is not None:
            learned = {n: f for n, f in self.families.items() if n not in self._held}
            cuts[self.loc] = 0, _joined(rows, learned)
        return cuts

    def select(self, keep: Tensor) -> None:
        """Drop the rank components where ``keep`` (R,) is False, in place.

        Raises:
            TypeError: If a latent site has neither one component, nor R, nor one per
                module, layer or type under a name that says so.
        """
        # Of the present sizes, so before anything is sliced.
        rows = self._rows(keep)
        slice_tensors(self.cuts(keep))
        self.families = {n: f.select(rows[n]) for n, f in self.families.items()}
        self._held = {n: v[rows[n].to(v.device)] for n, v in self._held.items()}

    def _rows(self, keep: Tensor) -> dict[str, Tensor]:
        """For each latent site the indices that stay."""
        return {
            name: self.space.indices_kept(keep, name, family.size)
            for name, family in self.families.items()
        }

    def _powers(self, start: dict[str, Tensor]) -> dict[str, int | None]:
        """The power, 0 or 1, of each site in the gate; None where it has none."""
        gate = self._gate_at(start)
        power_of: dict[str, int | None] = {}
        for name, value in start.items():
            # Two factors, since a clamp may agree with a power at one of them.
            scaled = {c: self._gate_at({**start, name: c * value}) for c in (0.5, 2.0)}
            powers = [
                power
                for power in (0, 1)
                if all(torch.allclose(scaled[c], c**power * gate) for c in scaled)
            ]
            power_of[name] = powers[0] if powers else None
        return power_of

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the gate over the same draws at each call, (R,) each."""
        # The random state of a run must not depend on who looks at log alpha.
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            posteriors = self.distributions().items()
            means, variances = [], []
            for _ in range(_DRAWS // _CHUNK):
                latents = {name: q.sample((_CHUNK,)) for name, q in posteriors}
                gate = self._gate_at(latents)
                means.append(gate.mean(0))
                variances.append(gate.var(0, correction=0))
        of_chunks = torch.stack(means)
        between = of_chunks.var(0, correction=0)
        spread = torch.stack(variances).mean(0) + between
        return of_chunks.mean(0), spread * _DRAWS / (_DRAWS - 1)


def _joined(rows: dict[str, Tensor], families: dict[str, Noise]) -> Tensor:
    """Indices into the vectors of sites as indices into all of them joined."""
    starts = accumulate((f.size for f in families.values()), initial=0)
    return torch.cat([start + rows[name] for name, start in zip(families, starts)])
