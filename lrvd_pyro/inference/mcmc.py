"""What Pyro's MCMC needs of a model that it runs."""

from torch import nn

from lrvd_pyro.inference.dropout import active_dropout

__all__ = ["check"]


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
    if active_dropout(net):
        raise ValueError(
            "MCMC runs a network whose dropout is on, so that its density is random; "
            "call net.eval() first"
        )
