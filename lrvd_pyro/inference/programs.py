"""What a model and a guide are to Pyro."""

from collections.abc import Callable
from typing import Any

Program = Callable[..., Any]  # Pyro statements, called with the batch as keywords
Guide = Program  # whose sites are those of the model; a module, or a function
