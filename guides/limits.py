"""Which guides are too large, where memory is quadratic in the number of latents."""

__all__ = ["refuse_large"]

_LARGEST = 4096  # latent components


def refuse_large(size: int, what: str) -> None:
    """Raise a ValueError if ``size x size`` numbers are too many.

    Args:
        size: The number of latent components.
        what: What takes so many, for the message.
    """
    if size > _LARGEST:
        raise ValueError(
            f"{what} over {size} latent components takes "
            f"{size**2 * 4 / 2**30:.2g} GiB, and more to compute it; up to {_LARGEST} "
            f"components fit. Use "
            f"low_rank_multivariate_normal(model, rank=16)"
        )
