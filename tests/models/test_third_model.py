"""A model that the library has never heard of goes through all of it, or is refused."""

import copy
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from nets import bert, tokens
from peft import PeftModel
from pyro import distributions as dist
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal, init_to_value
from third_model import CoreLoRA, identity
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.inference import give_own_name
from lrvd_pyro.models import Factors, GateLoRA, RankModel

estimated = pytest.mark.filterwarnings("ignore:no closed form")


def automatic(model: Any) -> Any:
    """Pyro's own guide, started where the cores change nothing."""
    start = init_to_value(values={"core": identity(model.space)})
    guide = give_own_name(AutoNormal(model, init_loc_fn=start, init_scale=0.1))
    guide(**tokens())
    return guide


def trained() -> tuple[CoreLoRA, Any]:
    model = CoreLoRA(bert(), num_data=60, scale=2.0)
    guide = automatic(model)
    svi = SVI(model, guide, lrvd.optim.AdamW(variational_lr=0.1), loss=lrvd.RankELBO())
    batch = tokens()
    losses = [svi.step(**batch) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    with torch.no_grad():
        guide.locs.core.mul_(2.0)  # far from where cores change nothing
    return model, guide


def logits_at_the_mean(model: Any, guide: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), lrvd.posterior_mean(model, guide) as net:
        return net.eval()(**batch).logits


def test_it_trains_and_its_draws_share_passes_with_nobody() -> None:
    model, guide = trained()
    batch = tokens(labels=False)
    some = lrvd.predict(model, guide, [batch], 4, seed=1, return_samples=True).samples
    for i, each in enumerate(some):
        torch.manual_seed(1)
        cores = [guide()["core"] for _ in range(4)][i]
        with torch.no_grad(), model.bind(cores):
            alone = model.base_net.eval()(**batch).logits.softmax(-1)
        torch.testing.assert_close(each, alone)


def test_its_export_is_its_mean_and_not_the_plain_adapter(tmp_path: Path) -> None:
    model, guide = trained()
    batch = tokens(labels=False)
    expected = logits_at_the_mean(model, guide, batch)
    with torch.no_grad():
        plain = model.base_net.eval()(**batch).logits
    assert (plain - expected).abs().max() > 1e-3  # the twin: the draw left out
    for mode in ("pruned", "merged"):
        path = tmp_path / mode
        lrvd.export_peft(path, model, guide, mode=mode, probe=batch)
    base = copy.deepcopy(model.base_net).unload()
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "pruned").eval()(**batch)
    torch.testing.assert_close(found.logits, expected)


def test_it_comes_back_from_disk_when_its_class_is_passed(tmp_path: Path) -> None:
    model, guide = trained()
    batch = tokens(labels=False)
    lrvd.save(tmp_path / "run", model, guide)
    expected = lrvd.predict(model, guide, [batch], 3).probs

    def base() -> Any:
        return copy.deepcopy(model.base_net).unload().requires_grad_(True)

    with pytest.raises(
        ValueError, match=r"'CoreLoRA', which is not a class of .*model=\.\.\."
    ):
        lrvd.load(tmp_path / "run", base(), prior=identity)
    with pytest.raises(ValueError, match="the model is 'GateLoRA', .* with 'CoreLoRA'"):
        lrvd.load(tmp_path / "run", base(), model=gate_lora, prior=identity)
    loaded, its_guide = lrvd.load(
        tmp_path / "run", base(), model=CoreLoRA, prior=identity, guide=automatic
    )
    assert isinstance(loaded, CoreLoRA) and loaded.scale == 2.0
    assert torch.equal(lrvd.predict(loaded, its_guide, [batch], 3).probs, expected)


def gate_lora(net: Any, *, num_data: int, adapter: str, **_: Any) -> Any:
    return lrvd.models.GateLoRA(net, num_data=num_data, adapter=adapter)


def test_arviz_has_its_site_under_a_dimension_of_its_own() -> None:
    model, guide = trained()
    data = lrvd.to_arviz(model, guide, [tokens()], 5)
    core = data["posterior"]["core"]
    assert core.dims == ("chain", "draw", "core_id")
    assert core.shape == (1, 5, sum(r * r for r in model.space.ranks))
    assert "gate" not in data["posterior"]


def test_what_needs_gates_refuses_it_by_name() -> None:
    model, guide = trained()
    with pytest.raises(TypeError, match="needs gates or weights, and CoreLoRA draws c"):
        lrvd.predict(model, guide, [tokens()], method="linearized")
    with pytest.raises(TypeError, match="the gauge needs gates, and CoreLoRA draws c"):
        lrvd.gauge.gramians(model, [tokens()])
    with pytest.raises(TypeError, match="guide is a AutoNormal; expected a guid"):
        lrvd.prune(model, guide)
    with pytest.raises(TypeError, match="RankDiagonal needs gates, and CoreLoRA draw"):
        lrvd.guides.RankDiagonal(model)


class OwnGates(RankModel):
    """Gates, drawn otherwise than by a `GateLoRA`."""

    binds = "gates"

    def draw(self) -> Tensor:
        ones = self.space.ones()
        gate: Tensor = pyro.sample("gate", dist.Normal(ones, 2.0).to_event(1))
        return gate

    def bind(self, value: Tensor) -> Any:
        return self.space.bind(value)

    def factors(self, value: Tensor) -> dict[str, Factors]:
        As, Bs = self.space.weights("lora_A"), self.space.weights("lora_B")
        gates = self.space.split(value)
        return dict(zip(gates, map(Factors, As, Bs, gates.values())))


def test_a_model_of_gates_gets_what_gates_have() -> None:
    model, builtin = OwnGates(bert(), num_data=60), GateLoRA(bert(), num_data=60)
    builtin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for each in (model, builtin):
            for B in each.space.weights("lora_B"):
                B.copy_(torch.linspace(-1, 1, B.numel()).view_as(B))
    batch = tokens()
    ours, theirs = (
        lrvd.gauge.gramians(each, [batch], labels="observed")
        for each in (model, builtin)
    )
    assert torch.equal(ours.gate_fisher, theirs.gate_fisher)
    assert ours.gate_fisher.max() > 0
    lrvd.gauge.center(model, ours)
    guide = lrvd.guides.RankDiagonal(model)
    optim = lrvd.optim.AdamW()
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    schedule = lrvd.gauge.BalanceSchedule(model, guide, optim, every=2, gather_every=1)
    for _ in range(2):
        svi.step(**batch)
        changes = schedule.step()
    assert changes
    keep = lrvd.prune(
        model, guide, optim, log_alpha_threshold=float(guide.log_alpha[0])
    )
    assert model.space.size == int(keep.sum()) < 16
    predicted = lrvd.predict(model, guide, [batch], method="linearized")
    assert predicted.probs.shape == (6, 3)


def test_a_model_that_lacks_a_method_cannot_be_made() -> None:
    class Half(RankModel):
        def draw(self) -> Tensor:
            return torch.ones(1)

    with pytest.raises(TypeError, match="abstract class Half .*bind.*factors"):
        Half(bert(), num_data=60)  # type: ignore[abstract]
    with pytest.raises(TypeError, match="abstract class RankModel .*binds, draw"):
        RankModel(bert(), num_data=60)  # type: ignore[abstract]


def test_a_model_that_does_not_say_what_it_binds_cannot_be_made() -> None:
    class Silent(RankModel):
        draw = bind = factors = CoreLoRA.draw  # type: ignore[assignment]

    with pytest.raises(TypeError, match="abstract class Silent .*binds"):
        Silent(bert(), num_data=60)  # type: ignore[abstract]


class Partial(CoreLoRA):
    """Its factors lack a module."""

    def factors(self, value: Tensor) -> dict[str, Factors]:
        return dict(list(super().factors(value).items())[1:])


class Narrow(CoreLoRA):
    """Its factors lack a component."""

    def factors(self, value: Tensor) -> dict[str, Factors]:
        found = super().factors(value)
        return {n: Factors(A[:1], B[:, :1], z[:1]) for n, (A, B, z) in found.items()}


@pytest.mark.parametrize("family", [Partial, Narrow])
def test_factors_that_do_not_fit_are_refused_by_the_export(
    family: Any, tmp_path: Path
) -> None:
    model = family(bert(), num_data=60)
    with pytest.raises(TypeError, match=rf"{family.__name__}.factors gives 'bert"):
        lrvd.export_peft(tmp_path / "out", model, automatic(model))
    assert not (tmp_path / "out").exists()


class Bare(CoreLoRA):
    """It has no prior object: the program stands in `draw` alone."""

    def __init__(self, net: Any, *, num_data: int, **parts: Any) -> None:
        super().__init__(net, num_data=num_data, **parts)
        self.prior = None

    def draw(self) -> Tensor:
        core: Tensor = pyro.sample(
            "core", dist.Normal(identity(self.space), self.scale).to_event(1)
        )
        return core


def test_a_model_without_a_prior_object_comes_back(tmp_path: Path) -> None:
    model = Bare(bert(), num_data=60)
    guide = automatic(model)
    lrvd.save(tmp_path / "run", model, guide)
    base = copy.deepcopy(model.base_net).unload().requires_grad_(True)
    with pytest.raises(ValueError, match="the prior is 'identity', .* with 'None'"):
        lrvd.load(tmp_path / "run", base, model=Bare, prior=identity, guide=automatic)
    loaded, its_guide = lrvd.load(tmp_path / "run", base, model=Bare, guide=automatic)
    inputs = [tokens(labels=False)]
    ours, theirs = (
        lrvd.predict(*pair, inputs, 2).probs
        for pair in ((model, guide), (loaded, its_guide))
    )
    assert torch.equal(ours, theirs)
