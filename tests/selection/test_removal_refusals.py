"""A selection that cannot be carried out is refused, and changes nothing."""

from functools import partial
from typing import Any

import nets
import pyro
import pytest
import torch
from nets import tokens
from pairs import rank_guide
from pruned import MODELS, outputs, some, trained
from pyro import distributions as dist
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro import RankSpace
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.selection.removal import select


def parameters(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for m in modules for p in m.parameters()]


def fixed_size(space: RankSpace) -> Tensor:
    return pyro.sample("gate", dist.Normal(torch.ones(16), 1.0).to_event(1))


def unnamed_groups(space: RankSpace) -> Tensor:
    scale = pyro.sample("tau", dist.HalfCauchy(torch.ones(4)).to_event(1))
    each = scale[..., space.group("module")]
    return pyro.sample("gate", dist.Normal(0.0, each).to_event(1))


@pytest.mark.parametrize(
    "prior, message",
    [
        (fixed_size, "does not follow the rank space to 6 rank components"),
        (unnamed_groups, "'tau' has 4 components, and nothing says"),
    ],
)
def test_a_prior_that_cannot_follow_is_refused(prior: Any, message: str) -> None:
    model = GateLoRA(nets.bert(), num_data=60, prior=prior)
    refused(model, RankDiagonal(model), some(model.space), None, TypeError, message)


def refused(
    model: Any, guide: Any, keep: Tensor, optim: Any, error: Any, message: str
) -> None:
    """Selecting raises, and neither model nor guide nor optimizer has changed."""
    before, ranks = parameters(model, guide), model.space.ranks
    inputs = tokens(labels=False)
    with pytest.raises(error, match=message):
        select(model, guide, optim, keep=keep)
    assert model.space.ranks == ranks
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model, guide)))
    outputs(model, model.value_at(model.start()), inputs)


def test_selections_that_cannot_be_carried_out_are_refused() -> None:
    model = MODELS["gate"](nets.bert())
    guide, keep = RankDiagonal(model), some(model.space)
    other = MODELS["gate"](nets.bert())
    say = partial(refused, model)
    say(guide, keep[:3], None, ValueError, r"\(3,\) .*expected torch.bool \(16,\)")
    say(guide, keep.double(), None, ValueError, "keep is torch.float64")
    say(guide, ~keep & keep, None, ValueError, "with 0 to keep")
    say(
        AutoNormal(model), keep, None, TypeError, r"AutoNormal; .*RankDiagonal\(model\)"
    )
    say(RankDiagonal(other), keep, None, ValueError, "built on another model")
    say(guide, keep, SVI, TypeError, "svi.optim")
    _, theirs = trained(other, RankDiagonal(other))
    say(guide, keep, theirs, ValueError, "holds no parameter of this model")
    restored = lrvd.optim.AdamW()
    restored.set_state(theirs.get_state())
    say(guide, keep, restored, ValueError, "restored and has taken no step")
    model.base_net.merge_adapter()
    with pytest.raises(RuntimeError, match="is merged"):
        select(model, guide, keep=keep)
    model.base_net.unmerge_adapter()
    say(guide, ~keep & keep, None, ValueError, "with 0 to keep")


def test_an_optimizer_without_a_moment_per_element_is_refused() -> None:
    model = MODELS["gate"](nets.bert())
    guide = RankDiagonal(model)
    optim = torch.optim.Adafactor(lrvd.optim.parameter_groups(model, guide))
    lrvd.RankELBO()(model, guide)(**tokens()).backward()
    optim.step()
    message = "Adafactor keeps 'row_var' in another shape"
    refused(model, guide, some(model.space), optim, TypeError, message)


def test_a_grouped_convolution_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.warns(UserWarning, match="groups > 1"):
        peft = nets.lora(net, target_modules=["0"])
    space = RankSpace(peft)
    keep = torch.tensor([True, False, True, True])
    with pytest.raises(TypeError, match="grouped convolution"):
        space.select(keep)
    model = MODELS["factor-both"](peft)
    with pytest.raises(TypeError, match="grouped convolution"):
        select(model, rank_guide(model), keep=keep)
