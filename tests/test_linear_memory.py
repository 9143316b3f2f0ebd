"""No function makes a tensor whose size grows faster than the rank components."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrvd_pyro import priors
from lrvd_pyro.inference.per_example import PerExample
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.rank_space.space import RankSpace

EXAMPLES = Path(__file__).parents[1] / "examples"
RANK = 128  # of every module; 8 and 16 modules make 1,024 and 2,048 components
Row = Callable[[Any], object]


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation returns within the block."""

    size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # By storage, since an expanded view takes no memory of its own.
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in made]
        self.size = max([self.size, *sizes])
        return result


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, whose rows are all functions; with fewer draws than hide R^2."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from benchmarks import memory

    for module in ("guides.rank_diagonal", "predictive.linearized"):
        monkeypatch.setattr(f"lrvd_pyro.{module}._DRAWS", 512)
    return memory


def growth(memory: Any, row: Row) -> float:
    """The largest tensor at twice the number of modules, over that at once."""
    sizes = []
    for modules in (8, 16):
        pyro.clear_param_store()
        net = memory.adapted(modules, RANK)
        with warnings.catch_warnings(), Largest() as largest:
            warnings.simplefilter("ignore")
            row(net)
        sizes.append(largest.size)
    return sizes[1] / sizes[0]


def test_the_largest_tensor_of_every_function_is_linear_in_the_ranks(
    memory: Any,
) -> None:
    grown = {name: growth(memory, row) for name, row in memory.ROWS.items()}
    assert {name: times for name, times in grown.items() if times > 2.1} == {}


def square_check(net: Any) -> None:
    """A prior run on as many examples as there are ranks."""
    space = RankSpace(net)
    with PerExample(space.size):
        priors.Normal()(space)


def square_guide(net: Any) -> None:
    """A full covariance, past the size at which this library refuses one."""
    model = GateLoRA(net, prior=priors.Normal(), num_data=64)
    AutoMultivariateNormal(model)(x=torch.zeros(2, 8), labels=torch.zeros(2).long())


@pytest.mark.parametrize("row", [square_check, square_guide])
def test_memory_that_is_quadratic_would_be_found(memory: Any, row: Row) -> None:
    assert growth(memory, row) > 3.9
