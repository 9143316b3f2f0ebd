"""Scale-invariant gates: log-uniform on the line, or on an interval."""

import math
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from lrvd_pyro import distributions
from lrvd_pyro.priors.base import positive, sample_site
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["LogUniform", "TruncatedLogUniform"]


class LogUniform:
    """Scale-invariant gates: log-uniform on the whole line.

    ``p(gate_i) = 1 / |gate_i|``, independently for each rank component. The prior is
    improper and has no scale. Under a Gaussian guide, its KL depends on the
    noise-to-signal ratio alone. Site: ``gate``, event shape (R,).

    Wrong with guides that are not Gaussian: their KL has no minimum, and `RankELBO`
    refuses them. Wrong with MCMC too, as the prior has neither draws nor a posterior.

    Example::

        model = GateLoRA(net, prior=LogUniform(), num_data=len(train))   # the default

    Args:
        multiplicity: Count each gate as this many tied copies. `RankELBO` multiplies
            the site's log densities in model and guide, and therefore its KL. The
            number of elements of A and B that a gate scales gives the strength of the
            published code's prior.

    Raises:
        ValueError: If ``multiplicity`` is not positive. Also where the prior itself
            would be sampled, by MCMC or by `pyro.infer.Predictive` without guide.

    Source: Kingma, Salimans and Welling (2015, arXiv 1506.02557); Molchanov, Ashukha
    and Vetrov (2017, arXiv 1701.05369).
    """

    def __init__(self, multiplicity: float = 1.0) -> None:
        self.multiplicity = positive("multiplicity", multiplicity)

    def __call__(self, space: RankSpace) -> Tensor:
        return self.sample("gate", space.size, space.device)

    def sample(
        self, site: str, size: int, device: torch.device | None = None
    ) -> Tensor:
        """Draw a vector of ``size`` components as one site.

        Args:
            site: The site's name.
            size: The number of components.
            device: Where a draw without guide is made; None takes torch's default.
        """
        prior = distributions.LogUniform(device=device).expand([size])
        independent: dist.TorchDistribution = prior.to_event(1)  # type: ignore[no-untyped-call]
        # The multiplicity is a mark: a scale in the model alone would not reach the KL.
        infer: Any = {"multiplicity": self.multiplicity}
        value: Tensor = pyro.sample(site, independent, infer=infer)
        return value


class TruncatedLogUniform:
    """Log-uniform gates on ``[exp(low), exp(high)]``, positive and proper.

    ``p(gate_i) = 1 / (gate_i (high - low))`` within the bounds, where it is invariant
    to scale. Site: ``gate``, event shape (R,).

    Example::

        model = GateLoRA(net, prior=TruncatedLogUniform(), num_data=len(train))

    Args:
        low: The lower bound of log z.
        high: The upper bound of log z.

    Raises:
        ValueError: If the interval does not hold log z = 0, where guides start.

    Source: Neklyudov, Molchanov, Ashukha and Vetrov (2017, arXiv 1705.07283).
    """

    def __init__(self, low: float = -20.0, high: float = 2.0) -> None:
        if not -math.inf < low < 0 < high < math.inf:
            raise ValueError(
                f"low={low}, high={high}; expected bounds of log z around 0, where "
                f"guides start: TruncatedLogUniform(-20.0, 2.0)"
            )
        self.low, self.high = low, high

    def __call__(self, space: RankSpace) -> Tensor:
        low, high, device = self.low, self.high, space.device
        prior = distributions.TruncatedLogUniform(low, high, device=device)
        return sample_site("gate", prior.expand([space.size]))
