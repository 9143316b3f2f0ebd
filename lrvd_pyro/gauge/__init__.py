"""The balanced gauge: rank selection that is derived, not tuned.

A LoRA module adds ``s B A x``, and so does ``(B T^-1)(T A)`` for every invertible T:
the likelihood leaves the basis of rank space, the gauge, free. A diagonal posterior
over rank components does not. With h = A x the rank activations and
``g = d log p / d h`` their gradients, `balance` finds the T that makes the second moments
``G = mean h h^T`` and ``M = sum g g^T`` one and the same diagonal matrix diag(t), from
r x r matrices alone. That basis is the singular value decomposition of the whitened
update ``H^1/2 dW S^1/2``, with S the second moments of the module's inputs and H those
of the gradients of its outputs; `hankel_values` are its singular values.

What is proved. Let the expected log-likelihood be quadratic in the gates, with the
factored curvature ``F_i = N (b_i^T H b_i)(a_i^T S a_i) = t_i^2`` (tokens independent,
activations and gradients uncorrelated), let A and B be points, and alpha be at its best
value for each gauge. Then the objective is ``sum_i g(t_i)`` with g increasing and
strictly concave under the log-uniform prior and under ARD, and over all gauges its
minimum is the basis above, unique up to signs where the t differ: for any split of one
matrix into rank-one terms, the tail sums of their norms are at least those of its
singular values. t does not depend on the gauge that one starts from, and `balance`
changes no function.

The mean of h needs no rank: a constant is a bias. Let gates act about it
(`center`, or ``bayesianize(..., centered=True)``) and take covariances for G
(`Gramians.centered`); then all of the above holds with S the covariance of the inputs,
what is removed leaves its mean behind, and on one linear layer the first k components
are the best affine update of rank k in the metric H, as the theorem of Eckart and Young
has it.

What is only seen. That gradient descent hardly moves along the gauge, so that training
alone stays far from that basis; that in the balanced gauge an eighth of the ranks keeps
the accuracy of a real network within a point, which in the gauge of training no order
does, and half a point to one more than the singular vectors of dW do; that hidden
states have large means, on which the first components are spent unless gates are
centered. Of the orders, t and the exact gate Fisher information are those of small
changes: to keep very few ranks, the Fisher information over random subsets of them
(``gates="subsets"``) is better. The tables are in ``examples/``.

What does not follow. The scale of A against B stays free, whatever the directions. For
the weight noise of `FactorLoRA`, whose KL depends on the coordinates of the inputs,
nothing is proved. Nor is it far from the quadratic regime: components of tiny t get an
alpha of thousands, where an expansion at gate 1 says little. A Gaussian over the whole
core has no preferred basis at all.

Source: derived here; whitening and truncation, Moore (1981); the concave penalty is
that of automatic relevance determination, Wipf and Nagarajan (2007).
"""

from lrvd_pyro.gauge.balancing import Change, balance, hankel_values
from lrvd_pyro.gauge.centering import center
from lrvd_pyro.gauge.closed_form_noise import optimal_alpha
from lrvd_pyro.gauge.one_pass import bayesianize
from lrvd_pyro.gauge.schedule import BalanceSchedule
from lrvd_pyro.gauge.second_moments import Gramians, gramians

__all__ = [
    "BalanceSchedule",
    "Change",
    "Gramians",
    "balance",
    "bayesianize",
    "center",
    "gramians",
    "hankel_values",
    "optimal_alpha",
]
