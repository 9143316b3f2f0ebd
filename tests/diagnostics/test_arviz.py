"""The posterior in ArviZ: its names and its numbers."""

import sys
import warnings
from typing import Any

import pytest
import torch
from inferred import QUERY, QUIET, VALUE, az, hierarchical, names, pair
from nets import bert, lora, perceptron, tokens
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro import priors
from lrvd_pyro.diagnostics.arviz import to_arviz
from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.selection.removal import select

pytestmark = QUIET


def test_groups_hold_draws_labels_and_log_alpha() -> None:
    model, guide = hierarchical()
    data = to_arviz(model, guide, [tokens(6), tokens(4)], 7)
    assert names(data) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "observed_data",
        "constant_data",
    }
    posterior = data["posterior"]
    assert {name: posterior[name].shape for name in posterior.data_vars} == {
        "global_scale": (1, 7, 1),
        "module_scale": (1, 7, 4),
        "rank_scale": (1, 7, 14),
        "gate": (1, 7, 14),
    }
    assert data["posterior_predictive"]["labels"].shape == (1, 7, 10)
    assert data["log_likelihood"]["labels"].shape == (1, 7, 10)
    log_alpha = torch.as_tensor(data["constant_data"]["log_alpha"].values)
    torch.testing.assert_close(log_alpha, guide.log_alpha)


def test_unseen_data_have_groups_of_their_own_under_the_same_draws() -> None:
    model, guide = hierarchical()
    train, unseen = [tokens(6)], [tokens(3), tokens(2)]
    both = to_arviz(model, guide, train, 40, test_batches=unseen)
    alone, test = (to_arviz(model, guide, data, 40) for data in (train, unseen))
    kinds = {"posterior_predictive", "log_likelihood", "observed_data"}
    assert names(both) - names(alone) == {f"test_{kind}" for kind in kinds}
    for name in ("log_likelihood", "observed_data"):
        for mine, other in [(name, alone), (f"test_{name}", test)]:
            assert both[mine]["labels"].equals(other[name]["labels"]), mine
    assert both["test_posterior_predictive"]["labels"].shape == (1, 40, 5)
    # What ArviZ judges is the training set, whatever else is there.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few draws
        assert az.loo(both, reff=1).n_data_points == 6
    assert both["posterior"]["gate"].equals(alone["posterior"]["gate"])


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ([], ValueError, "got no batches; expected at least one: to_arviz"),
        ({"labels": torch.ones(2)}, TypeError, "batches is one batch"),
        ([{"input_ids": torch.ones(2, 3).long()}], ValueError, "has no labels"),
    ],
)
def test_unseen_data_are_checked_as_the_others_are(
    wrong: Any, kind: type[Exception], message: str
) -> None:
    model, guide = pair()
    with pytest.raises(kind, match=message):
        to_arviz(model, guide, [tokens(6)], 7, test_batches=wrong)


def test_ragged_ranks_are_named_and_placed() -> None:
    model, guide = hierarchical()
    posterior = to_arviz(model, guide, [tokens()], 2)["posterior"]
    gate = posterior["gate"]
    labels = gate["gate_id"].values.tolist()
    assert labels[:4] == [f"l0.{QUERY}[{i}]" for i in (0, 1)] + [
        f"l0.{VALUE}[{i}]" for i in (0, 1)
    ]
    assert labels[-1] == f"l1.{VALUE}[3]" and len(set(labels)) == 14
    for name, values in model.space.coordinates.items():
        assert gate[name].dims == ("gate_id",) and gate[name].values.tolist() == values
    assert posterior["module_scale"]["module_id"].values.tolist() == [
        *model.space.modules
    ]
    assert gate.groupby("module").mean().shape[-1] == 4


@pytest.mark.parametrize(
    ("over", "expected"), [("layer", [0, 1]), ("type", [QUERY, VALUE])]
)
def test_a_scale_has_its_groups_as_coordinate(over: Any, expected: list[Any]) -> None:
    model, guide = pair(prior=priors.Hierarchical(over=over))
    scale = to_arviz(model, guide, [tokens()], 2)["posterior"][f"{over}_scale"]
    assert scale[f"{over}_id"].values.tolist() == expected


def test_equal_short_names_give_way_to_module_names() -> None:
    net = nn.ModuleDict({k: nn.Sequential(nn.Linear(5, 3)) for k in ("left", "right")})

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net

        def forward(self, x: Tensor) -> Tensor:
            return torch.add(self.parts["left"](x), self.parts["right"](x))

    model = GateLoRA(lora(Sum(), r=1, target_modules=["0"]), num_data=9)
    batch = {"x": torch.randn(4, 5), "labels": torch.tensor([0, 1, 2, 0])}
    gate = to_arviz(model, RankDiagonal(model), [batch], 2)["posterior"]["gate"]
    assert gate["gate_id"].values.tolist() == ["parts.left.0[0]", "parts.right.0[0]"]


def test_pruned_components_are_gone() -> None:
    model, guide = pair()
    keep = torch.ones(14, dtype=torch.bool)
    keep[:3] = False
    select(model, guide, keep=keep)
    gate = to_arviz(model, guide, [tokens()], 2)["posterior"]["gate"]
    assert gate["gate_id"].values.tolist()[0] == f"l0.{VALUE}[0]"
    assert gate.shape == (1, 2, 11) and gate["rank"].values[0] == 0


def test_draws_are_those_of_predict() -> None:
    model, guide = pair()
    batches = [tokens(6), tokens(5)]
    data = to_arviz(model, guide, batches, 9, seed=4)
    predicted = lrvd.predict(model, guide, batches, 9, seed=4, return_samples=True)
    labels = torch.cat([batch["labels"] for batch in batches])
    assert data["observed_data"]["labels"].values.tolist() == labels.tolist()
    # unscaled: num_data is 60, the data are 11
    by_hand = predicted.samples.gather(2, labels.expand(9, -1)[..., None]).log()
    found = torch.as_tensor(data["log_likelihood"]["labels"].values[0])
    torch.testing.assert_close(found, by_hand.squeeze(-1))


def test_the_posterior_predictive_has_the_predicted_probabilities() -> None:
    model = GateLoRA(perceptron(), num_data=60)
    guide = RankDiagonal(model, init_log_alpha=-1.0)
    batch = {"x": torch.randn(3, 5), "labels": torch.tensor([0, 1, 2])}
    before = torch.get_rng_state()
    drawn = to_arviz(model, guide, [batch], 1500)["posterior_predictive"]["labels"]
    assert torch.equal(before, torch.get_rng_state())
    share = torch.nn.functional.one_hot(torch.as_tensor(drawn.values[0]), 3).double()
    probs = lrvd.predict(model, guide, [batch], 1500).probs
    torch.testing.assert_close(share.mean(0), probs, rtol=0, atol=0.06)


def test_a_batch_may_exceed_the_training_set() -> None:
    model = GateLoRA(bert(), num_data=4)
    data = to_arviz(model, RankDiagonal(model), [tokens(6)], 2)
    assert data["log_likelihood"]["labels"].shape == (1, 2, 6)


def test_drawn_weights_are_placed_too() -> None:
    model = FactorLoRA(perceptron(), num_data=9, sides=("lora_A", "lora_B"))
    batch = {"x": torch.randn(4, 5), "labels": torch.tensor([0, 1, 2, 0])}
    data = to_arviz(model, TiedDiagonal(model), [batch], 2)
    factor = data["posterior"]["factor"]
    sizes = {
        (side, module): int(((factor.side == side) & (factor.module == module)).sum())
        for side in model.space.sides
        for module in model.space.modules
    }
    assert [*sizes.values()] == [4 * 5, 4 * 6, 6 * 4, 3 * 4]
    assert data["constant_data"]["log_alpha"]["module"].values[-1] == "out"
    assert "gate" not in data["posterior"]


def test_given_samples_are_taken_as_they_are() -> None:
    model, _ = hierarchical()
    latents = {name: fn.sample((5,)) for name, fn in model.latent_sites().items()}
    data = to_arviz(model, None, [tokens()], posterior_samples=latents)
    for name, values in latents.items():
        found = torch.as_tensor(data["posterior"][name].values[0])
        torch.testing.assert_close(found, values)
    gates = torch.stack(
        [model.value_at({k: v[s] for k, v in latents.items()}) for s in range(5)]
    )
    found = torch.as_tensor(data["posterior"]["gate"].values[0])
    torch.testing.assert_close(found, gates)
    assert "constant_data" not in names(data)


def test_without_arviz_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz", None)
    model, guide = pair()
    with pytest.raises(ImportError, match=r"pip install 'lrvd_pyro\[arviz\]'"):
        to_arviz(model, guide, [tokens()], 2)


def test_what_has_no_log_likelihood_is_refused() -> None:
    model, guide = pair()
    with pytest.raises(TypeError, match=r"batches is one batch; expected several"):
        to_arviz(model, guide, tokens())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"got no batches; expected at least one: to_arviz"
    ):
        to_arviz(model, guide, [])
    with pytest.raises(
        ValueError, match=r"num_samples=0; expected a whole number, 1 or more"
    ):
        to_arviz(model, guide, [tokens()], 0)
    for batches in ([tokens(labels=False)], [tokens(), tokens(labels=False)]):
        with pytest.raises(ValueError, match=r"has no labels, and the log like"):
            to_arviz(model, guide, batches, 2)


def test_batches_are_read_as_they_come() -> None:
    model, guide = pair()
    seen: list[int] = []
    progress: list[int] = []

    def batches() -> Any:
        for i in range(3):
            seen.append(i)
            yield tokens(2)

    model.base_net.register_forward_pre_hook(lambda *args: progress.append(len(seen)))
    to_arviz(model, guide, batches(), 2)
    assert progress == [1, 1, 2, 2, 3, 3]
