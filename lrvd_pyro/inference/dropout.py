"""Dropout that is on: noise that no posterior knows of."""

from torch import nn

__all__ = ["active_dropout"]

_MODULES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def active_dropout(net: nn.Module) -> dict[str, float]:
    """The rates of all dropout in training mode, by the names of modules.

    There are torch's modules, and layers that call a function, with a rate in an
    attribute such as ``attention_dropout``, ``drop_prob`` or ``layerdrop``.
    """
    rates = {name: _rate(m) for name, m in net.named_modules() if m.training}
    return {name: rate for name, rate in rates.items() if rate > 0}


def _rate(module: nn.Module) -> float:
    if isinstance(module, _MODULES):
        return module.p
    found = (x for name, x in vars(module).items() if "drop" in name)
    # A rate is a share; thresholds and the like may be anything.
    return max((x for x in found if isinstance(x, float) and x < 1), default=0.0)
