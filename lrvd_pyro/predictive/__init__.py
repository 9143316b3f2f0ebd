"""The posterior predictive of a trained model and its guide.

`predict` averages over draws of the adapter, or linearizes the network in its gates.
`posterior_sample` and `posterior_mean` run the network under one adapter.

`FanOut` and `Linearized` map a batch to ``S x B x ...`` predictions. Another way to
predict is a class with the same call, in a file of its own; `predict` picks it by
``method``.
"""

from lrvd_pyro.predictive.predictive import posterior_mean, posterior_sample, predict

__all__ = ["posterior_mean", "posterior_sample", "predict"]
