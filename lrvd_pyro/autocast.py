"""The precision that autocast gives a device at present."""

import torch

__all__ = ["autocast_dtype"]


def autocast_dtype(device: str) -> torch.dtype | None:
    """The precision of operations under autocast on a device type; None if it is off.

    Args:
        device: The type of a device: "cuda", or one that has no autocast, as "meta".
    """
    # torch raises an error for a device type that it knows no autocast for.
    known = torch.amp.is_autocast_available(device)
    if not known or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
