"""What Pyro's MCMC needs of a model that it runs."""

from torch import nn

__all__ = ["check"]

_DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def check(net: nn.Module, size: int, num_data: int) -> None:
    """Raise where MCMC would sample another posterior without a word.

    Args:
        net: The network that the model runs.
        size: The number of labels in the batch; 0 where there are none.
        num_data: The number of training examples N.

    Raises:
        ValueError: If the batch is not the whole data set, or dropout is on.
    """
    if size != num_data:
        raise ValueError(
            f"MCMC runs the model on {size} labels out of num_data={num_data}, which "
            f"would sample another posterior (of none, the prior); pass all data: "
            f"MCMC(NUTS(model), ...).run(**whole), num_data=len(whole['labels'])"
        )
    dropout = (m for m in net.modules() if isinstance(m, _DROPOUT) and m.training)
    if any(m.p > 0 for m in dropout):
        raise ValueError(
            "MCMC runs a network whose dropout is on, so that its density is random; "
            "call net.eval() first"
        )
