"""What Pyro's MCMC needs of a model that it runs."""

import inspect

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def is_running() -> bool:
    """Whether `pyro.infer.mcmc` runs the present program."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("pyro.infer.mcmc"):
            return True
        frame = frame.f_back
    return False


def check(net: nn.Module, size: int, num_data: int) -> None:
    """Raise where a run by MCMC would sample another posterior in silence.

    Raises:
        ValueError: If the batch is not the whole data set, or dropout is on.
    """
    if size != num_data:
        raise ValueError(
            f"MCMC runs the model on {size} labels out of num_data={num_data}, which "
            f"would sample another posterior (of none, the prior); pass all data: "
            f"MCMC(NUTS(model), ...).run(**whole), num_data=len(whole['labels'])"
        )
    dropout = (m for m in net.modules() if isinstance(m, _DropoutNd) and m.training)
    if any(m.p > 0 for m in dropout):
        raise ValueError(
            "MCMC runs a network whose dropout is on, so that its density is random; "
            "call net.eval() first"
        )
