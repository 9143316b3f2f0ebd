"""The balanced gauge: rank selection that is derived, not tuned.

A LoRA module adds ``s B A x``, and so does ``(B T^-1)(T A)`` for every invertible T.
The likelihood therefore leaves the basis of rank space, the gauge, free. A diagonal
posterior over rank components does not.

Let h = A x be the rank activations and ``g = d log p / d h`` their gradients. Their
second moments are ``G = mean h h^T`` and ``M = sum g g^T``. `balance` finds the T that
makes both one and the same diagonal matrix diag(t), from r x r matrices alone. That
basis is the singular value decomposition of the whitened update ``H^1/2 dW S^1/2``.
Here S are the second moments of the module's inputs, and H those of the gradients of
its outputs. `hankel_values` are the singular values.

What is proved. Let the expected log-likelihood be quadratic in the gates, with the
factored curvature ``F_i = N (b_i^T H b_i)(a_i^T S a_i) = t_i^2``: tokens are
independent, and activations and gradients uncorrelated. Let A and B be points, and let
alpha have its best value for each gauge. Then the objective is ``sum_i g(t_i)``. The
function g is increasing and strictly concave, under the log-uniform prior and under
ARD. Over all gauges, the minimum is the basis above, unique up to signs where the t
differ. The reason: for any split of one matrix into rank-one terms, the tail sums of
their norms are at least those of its singular values. t does not depend on the gauge
that one starts from, and `balance` changes no function.

The mean of h needs no rank, since a constant is a bias. Let gates act about the mean
(`center`, or ``bayesianize(..., centered=True)``), and take covariances for G
(`Gramians.centered`). All of the above then holds with S the covariance of the inputs,
and what is removed leaves its mean behind. On one linear layer, the first k components
are then the best affine update of rank k in the metric H. This is the theorem of Eckart
and Young.

What is only seen (see examples/results/README.md). Gradient descent hardly moves along
the gauge, so that training alone stays far from that basis. In the balanced gauge a
small part of the ranks nearly keeps the accuracy of a real network. In the gauge of
training no order of the ranks does, and the singular vectors of dW lose more. Hidden
states have large means, and the leading components are used up representing them unless
gates are centered. The orders by t and by the exact gate Fisher information are those
of small changes. To keep very few ranks, the Fisher information over random subsets of
them (``gates="subsets"``) is better.

How much noise. The KL of a gate counts 1, where its rank has d_in + d_out weights. The
noise that it allows is therefore too small, however the gauge lies. `noise_by_evidence`
sets it by the evidence about A and B.

What does not follow. The scale of A against B stays free, whatever the directions.
Nothing is proved for the weight noise of `FactorLoRA`, whose KL depends on the
coordinates of the inputs. Nothing is proved far from the quadratic regime. Components
of tiny t get an alpha of thousands, where an expansion at gate 1 says little. A
Gaussian over the whole core has no preferred basis at all.

Source: derived here; whitening and truncation, Moore (1981); the concave penalty is
that of automatic relevance determination, Wipf and Nagarajan (2007).
"""

from lrvd_pyro.gauge.balancing import Change, balance, hankel_values
from lrvd_pyro.gauge.centering import center
from lrvd_pyro.gauge.closed_form_noise import optimal_alpha
from lrvd_pyro.gauge.evidence_noise import noise_by_evidence
from lrvd_pyro.gauge.marginal_likelihood import Evidence
from lrvd_pyro.gauge.one_pass import bayesianize
from lrvd_pyro.gauge.schedule import BalanceSchedule
from lrvd_pyro.gauge.second_moments import Gramians, gramians
from lrvd_pyro.gauge.weight_curvature import evidence

__all__ = [
    "BalanceSchedule",
    "Change",
    "Evidence",
    "Gramians",
    "balance",
    "bayesianize",
    "center",
    "evidence",
    "gramians",
    "hankel_values",
    "noise_by_evidence",
    "optimal_alpha",
]
