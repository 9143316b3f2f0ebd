"""A Gaussian truncated to an interval: its mass and quantiles, exact in the tails."""

import math

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.special import erfcx, ndtr, ndtri

__all__ = ["quantile", "relative_mass"]


def relative_mass(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The mass of ``N(loc, scale^2)`` in [low, high], relative to its largest density.

    ``Z / phi(c)``: Z is the mass, phi the standard density, and c the point of the
    interval next to loc, in scales from loc. The ratio neither underflows in the tails
    nor loses digits there.

    Args:
        loc: The mean before truncation, any shape.
        scale: The standard deviation before truncation.
        low: The lower end of the interval.
        high: The upper end of the interval.
    """
    a, b, width = (low - loc) / scale, (high - loc) / scale, (high - low) / scale
    # By symmetry a tail on either side is one on the right, which starts at `near`.
    near, far = torch.maximum(a, -b), torch.maximum(-a, b)
    center = (near / -math.sqrt(2)).erf() + (far / math.sqrt(2)).erf()
    # In a tail, Phi(B) - Phi(A) is a difference of two numbers near 1. Mills' ratio
    # divides the density out, and the exponent from `width` avoids the difference of
    # two large squares.
    outside = near.clamp(min=0)
    tail = _mills(outside) - _mills(far) * (-width * (outside + far) / 2).exp()
    return torch.where(near < 0, math.sqrt(math.pi / 2) * center, tail)


def quantile(
    u: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """The ``u``-quantile of ``N(loc, scale^2)`` truncated to [low, high].

    It is differentiable once in all arguments, which broadcast.

    Args:
        u: The probabilities, in (0, 1).
        loc: The mean before truncation.
        scale: The standard deviation before truncation.
        low: The lower end of the interval.
        high: The upper end of the interval.
    """
    arguments = torch.broadcast_tensors(u, loc, scale, low, high)
    x: Tensor = _Quantile.apply(*arguments)  # type: ignore[no-untyped-call]
    return x


def _mills(x: Tensor) -> Tensor:
    """Mills' ratio ``(1 - Phi(x)) / phi(x)`` for ``x >= 0``."""
    ratio: Tensor = math.sqrt(math.pi / 2) * erfcx(x / math.sqrt(2))
    return ratio


class _Quantile(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        u: Tensor,
        loc: Tensor,
        scale: Tensor,
        low: Tensor,
        high: Tensor,
    ) -> Tensor:
        mass = relative_mass(loc, scale, low, high)
        a, b = (low - loc) / scale, (high - loc) / scale
        # Where the interval contains loc, invert Phi on the side with less mass below
        # or above: near 1 the other side has no digits left.
        density = mass / math.sqrt(2 * math.pi)
        below, above = ndtr(a) + u * density, ndtr(-b) + (1 - u) * density
        inner = torch.where(below < above, ndtri(below), -ndtri(above))
        # Where it lies in a tail, measure from its end next to loc: Phi underflows.
        rightwards = a >= 0
        start = torch.where(rightwards, a, -b).clamp(min=0)
        offset = scale * _tail_offset(torch.where(rightwards, u, 1 - u), start, mass)
        tail = torch.where(rightwards, low + offset, high - offset)
        x = torch.where(torch.maximum(a, -b) < 0, loc + scale * inner, tail)
        x = x.clamp(low, high)
        ctx.save_for_backward(u, loc, scale, low, high, mass, x)
        return x

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, ...]:
        """From ``d Phi(t) = (1 - u) d Phi(A) + u d Phi(B) + Z du``, t = F^-1(u)."""
        # By hand: through `forward`, autograd would follow Newton's iteration.
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        u, loc, scale, low, high, mass, x = saved

        def ratio(end: Tensor) -> Tensor:
            """``phi(end) / phi(x)``, both in log units."""
            # factored, since a difference of squares loses its digits in a tail
            exponent: Tensor = (x - end) * (x + end - 2 * loc) / (2 * scale.square())
            return exponent.exp()

        to_low, to_high = (1 - u) * ratio(low), u * ratio(high)
        to_loc = 1 - to_low - to_high
        to_scale = (x - loc - to_low * (low - loc) - to_high * (high - loc)) / scale
        to_u = scale * mass * ratio(loc.clamp(low, high))
        return (
            grad * to_u,
            grad * to_loc,
            grad * to_scale,
            grad * to_low,
            grad * to_high,
        )


def _tail_offset(u: Tensor, start: Tensor, mass: Tensor) -> Tensor:
    """The distance beyond ``start >= 0`` within which a share ``u`` of the mass lies.

    Newton's method on the log of the Gaussian survival function S, which is concave.
    The first guess is exact up to Mills' ratio and never too small, so the iteration
    falls monotonically to the solution.
    """
    log_survival = torch.log1p(-u * mass / _mills(start))
    drop = -2 * log_survival
    offset = drop / ((start.square() + drop).sqrt() + start)
    for _ in range(5):
        mills = _mills(start + offset)
        missing = offset * (2 * start + offset) / 2 + log_survival
        missing = missing + (_mills(start) / mills).log()
        offset = (offset - missing * mills).clamp(min=0)
    return offset
