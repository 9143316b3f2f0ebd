"""How much noise the data allow A and B: the evidence, and what noise costs by it."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Evidence"]

_GRID = 1000  # precisions to try, from 1e-16 to 1e4 times the largest eigenvalue
_NEGLIGIBLE = 1e-7  # of the largest eigenvalue: float error
_TOLERATED = 0.05  # of gamma_loo, an error that goes without warning
_ROWS, _AT_ONCE = 4096, 2**24  # rows, and numbers, in double at once


@dataclass(frozen=True)
class Evidence:
    """The curvature of the likelihood about A and B, and the noise that it allows.

    Let theta be the P elements of A and B, which maximize the likelihood, and H its
    generalized Gauss-Newton matrix there. Under a prior ``N(0, 1/delta)`` the log
    evidence is, up to a constant,

    ``-1/2 delta theta^T H (H + delta)^-1 theta - 1/2 log det(1 + H / delta)``.

    At its maximum ``delta |m|^2 = gamma``. Here ``m = H (H + delta)^-1 theta`` is the
    posterior mean, and ``gamma = tr H (H + delta)^-1`` counts the parameters that the
    data determine.

    On the examples of training the posterior's noise costs gamma: twice the nats that
    their log likelihood loses, to second order. An example that was not trained on sees
    more noise. J_n are the gradients of the K roots of example n, and ``L_n = J_n (H +
    delta)^-1 J_n^T`` is its leverage. The other examples leave it the noise ``L_n (1 -
    L_n)^-1``. So ``gamma_loo = sum_n tr L_n (1 - L_n)^-1`` is the cost on examples that
    are left out.

    P x P matrices are never formed: H acts through a sketch of the J_n of q numbers
    each, as `lrvd_pyro.gauge.evidence` takes them. That is exact for q = P. Below, the
    error of gamma_loo is about gamma / q of it (measured: 6% for 7%, .2 to .7% for .5
    to 2%; up to 67% for 110%), and a warning tells it beyond 5%.

    Attributes:
        curvature: The diagonal of H, (P,), as ``RankSpace.flatten("lora_A", "lora_B")``
            lays the elements out; in nats per data set.
        gate_fisher: The Fisher information of each gate at its mean, (R,), in nats per
            data set; None for a model without gates.
        sketch: Of the roots of each example, ``n x K x q``; None where the roots were
            summed by random signs, which give the diagonal alone.
        slopes: The derivative of each root along theta, ``n x K``.
        scale: N/n, where the examples stand for N.

    Raises:
        ValueError: From ``precision`` and what depends on it, if there is no sketch, a
            gradient is not finite, or the evidence has no maximum at a finite delta.
            From ``gamma_loo`` also if the examples stand for fewer than they are.

    Warns:
        UserWarning: From ``gamma_loo``, where the sketch is too short for it.

    The diagonal of H alone would not do: where the gradients of examples are alike, as
    with several classes, its gamma is several times too large, and can exceed n K. Nor
    would ``delta |theta|^2 = gamma``: it takes what no example sees of theta, such as
    the start of A and the optimizer's drift, for evidence of a wide prior.

    Wrong where A and B are far from a maximum of the likelihood, as after few steps or
    under a strong weight decay. Where examples stand for N > n, gamma_loo is too small:
    it leaves out one of the N/n copies of an example.

    Source: MacKay (1992), "The evidence framework applied to classification networks";
    the evidence about a maximum of the likelihood and gamma_loo, derived here; the
    sketch, Weinberger et al. (2009, arXiv 0902.2206).
    """

    curvature: Tensor
    gate_fisher: Tensor | None
    sketch: Tensor | None
    slopes: Tensor
    scale: float

    @cached_property
    def precision(self) -> float:
        """delta, the precision of the prior at which the evidence is greatest."""
        values, _, _ = self._spectrum
        largest = float(values.max()) if len(values) else 0.0
        if largest == 0:
            raise ValueError(
                f"the evidence has no maximum: the largest eigenvalue of the curvature "
                f"is {largest:.3g}; train the adapter first, and pass the batches that "
                f"it was trained on"
            )
        tried = largest * torch.logspace(-16, 4, _GRID, dtype=torch.double)
        best = int(self._log_evidence(tried).argmax())
        if best == _GRID - 1:
            raise ValueError(
                f"the evidence has no maximum: it rises until delta = "
                f"{float(tried[best]):.3g}, as where A and B have learned nothing yet, "
                f"or the network is certain of every example; train the adapter, and "
                f"pass the batches that it was trained on"
            )
        fine = torch.linspace(0, 1, _GRID, dtype=torch.double)
        low, high = tried[max(best - 1, 0)], tried[best + 1]
        tried = low * (high / low) ** fine
        return float(tried[self._log_evidence(tried).argmax()])

    @cached_property
    def gamma(self) -> float:
        """The effective number of parameters."""
        values, _, _ = self._spectrum
        return float((values / (values + self.precision)).sum())

    @cached_property
    def gamma_loo(self) -> float:
        """What the noise costs on examples left out, in nats, as gamma does on all."""
        values, vectors, _ = self._spectrum
        self._check_length()
        # rows of X (H + delta)^-1/2, for X the sketch
        shrunk = (values / (values + self.precision) / self.scale).sqrt()
        rows = vectors.unflatten(0, self.slopes.shape)
        total = 0.0
        for some in rows.split(max(1, _AT_ONCE // rows.shape[1:].numel())):
            leverage = (some * shrunk) @ (some * shrunk).mT
            rest = torch.eye(leverage.shape[-1], dtype=torch.double) - leverage
            factor, failed = torch.linalg.cholesky_ex(rest)
            if failed.any():
                raise ValueError(
                    f"an example has a leverage of {float(leverage.max()):.3g}; "
                    f"expected less than 1. The examples stand for {self.scale:.3g} "
                    f"times their number: GateLoRA(..., num_data=len(train))"
                )
            left_out = torch.cholesky_solve(leverage, factor)
            total += float(left_out.diagonal(dim1=1, dim2=2).sum())
        return self.scale * total

    def _check_length(self) -> None:
        assert self.sketch is not None
        size = self.sketch.shape[-1]
        if size < len(self.curvature) and self.gamma > _TOLERATED * size:
            warnings.warn(
                f"gamma_loo may be wrong by {self.gamma / size:.0%}: gamma = "
                f"{self.gamma:.3g}, and a sketch of {size} numbers stands for the "
                f"gradient of each root; pass a part of the training set to look, or "
                f"take fewer ranks or classes",
                stacklevel=3,
            )

    def _log_evidence(self, precision: Tensor) -> Tensor:
        values, _, energy = self._spectrum
        values, precision = values[:, None], precision[None]
        fit = energy[:, None] * values * precision / (values + precision)
        return -0.5 * (fit + torch.log1p(values / precision)).sum(0)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues of H, their left singular vectors, and theta's squares there.

        The singular vectors are those of the sketch X, ``n K x q``. Directions without
        curvature are left out.
        """
        if self.sketch is None:
            raise ValueError(
                "the roots were summed by random signs, which give the diagonal of the "
                "curvature alone; for the evidence take evidence(..., sampled=False)"
            )
        if not (self.sketch.isfinite().all() and self.slopes.isfinite().all()):
            raise ValueError(
                "the evidence has no maximum: gradients about A and B are not finite; "
                "look for NaN in the adapter and in the batches"
            )
        rows, slopes = self.sketch.flatten(0, 1), self.slopes.flatten().double()
        # X X^T and X^T X have the same eigenvalues; the smaller is cheaper.
        wide = rows.shape[0] <= rows.shape[1]
        gram = _gram(rows.T if wide else rows)
        values, vectors = torch.linalg.eigh(self.scale * gram)
        kept = values > _NEGLIGIBLE * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        if not wide:
            vectors = rows.double() @ (vectors * (self.scale / values).sqrt())
        return values, vectors, self.scale * (slopes @ vectors).square() / values


def _gram(rows: Tensor) -> Tensor:
    """``X^T X`` in double, to which the rows are brought a few at a time."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.double)
    for some in rows.split(_ROWS):
        total += some.double().T @ some.double()
    return total
