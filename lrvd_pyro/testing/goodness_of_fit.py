"""Whether a sampler follows its own density."""

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

__all__ = ["FAILURE_RATE", "assert_goodness_of_fit"]

# With this probability a statistical assertion of `lrvd_pyro.testing` fails by chance.
FAILURE_RATE = 1e-5


def assert_goodness_of_fit(
    distribution: Distribution,
    num_samples: int = 100_000,
    *,
    failure_rate: float = FAILURE_RATE,
) -> None:
    """Assert that a distribution's samples follow its own ``log_prob``.

    The density, normalization included, turns the samples into uniform variables. For
    each element of a batch or an `Independent`, this is an integral between sorted
    samples. For other vectors it is ``exp(-n p(x) V(r))``, with r the distance to the
    nearest of n others and V the volume of the ball; a fiftieth of the samples is
    compared to the others. The distance of these variables from the uniform
    distribution must stay below the bound of Dvoretzky, Kiefer and Wolfowitz.

    The transforms are those of ``pyro.distributions.testing.gof``, whose chi-squared
    tail returns 1 far out.

    Wrong for atoms, for modes hundreds of scales apart, and for vectors with fewer
    dimensions than elements. Weak for vectors: with two elements it finds a scale 1.5
    times too large, not 1.1; with one element, 1.05.

    Args:
        distribution: The distribution, of any batch shape.
        num_samples: The number of samples n.
        failure_rate: The probability of failing by chance, for all elements together.

    Raises:
        AssertionError: With the element, its distance and the bound.

    Source: Massart (1990, Annals of Probability 18), the bound; Bickel and Breiman
    (1983, Annals of Probability 11), nearest neighbors.

    >>> from pyro import distributions as dist
    >>> assert_goodness_of_fit(dist.Gamma(2.0, 1.0))
    """
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    size = max(distribution.event_shape.numel(), 1)
    with torch.no_grad():
        draws = distribution.sample(torch.Size([num_samples]))
        densities = distribution.log_prob(draws).double().exp()
    draws = draws.double().reshape(num_samples, -1, size)
    densities = densities.reshape(num_samples, -1)
    columns = zip(draws.unbind(1), densities.unbind(1))
    for element, (x, density) in enumerate(columns):
        uniform = _by_integration if size == 1 else _by_nearest_neighbors
        u = uniform(x, density).sort().values
        steps = torch.linspace(0, 1, len(u) + 1, dtype=u.dtype, device=u.device)
        distance = float(torch.maximum(u - steps[:-1], steps[1:] - u).max())
        rate = failure_rate / densities.shape[1]  # Bonferroni
        bound = math.sqrt(math.log(2 / rate) / (2 * len(u)))
        assert distance <= bound, (
            f"element {element}: samples and log_prob are {distance:.3g} apart, where "
            f"chance explains {bound:.3g}"
        )


def _by_integration(x: Tensor, density: Tensor) -> Tensor:
    """The integral of the density up to each sample, in sorted order."""
    x, order = x.squeeze(1).sort()
    # Sorted samples are spaced in proportion to 1 / density, so the trapezoids average
    # the reciprocal, as in Pyro's gof.
    sparsity = 1 / density[order]
    mass = 2 * x.diff() / (sparsity[1:] + sparsity[:-1])
    return torch.cat([mass.new_zeros(1), mass.cumsum(0)])


def _by_nearest_neighbors(x: Tensor, density: Tensor) -> Tensor:
    """Variables for a fiftieth of the samples, uniform if x follows the density."""
    some = len(x) // 50
    others, size = x[some:], x.shape[1]
    # In chunks: all distances at once would be a matrix of n^2 / 50 numbers.
    distance = torch.cat([torch.cdist(q, others).amin(1) for q in x[:some].split(100)])
    ball = math.pi ** (size / 2) / math.gamma(size / 2 + 1)
    return torch.exp(-len(others) * density[:some] * ball * distance**size)
