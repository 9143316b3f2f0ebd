"""The examples, each the whole of it, made tiny."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from short_minilm import LAYERS

EXAMPLES = Path(__file__).parents[2] / "examples"
RANKS = LAYERS * 2 * 8  # query and value, r = 8

pytestmark = pytest.mark.usefixtures("short_task")


def shrunk(name: str, monkeypatch: pytest.MonkeyPatch, **constants: Any) -> Any:
    module = importlib.import_module(name)
    for constant, value in constants.items():
        monkeypatch.setattr(module, constant, value)
    return module


@pytest.mark.parametrize(("name", "count"), [("swap_prior", 9), ("swap_guide", 8)])
def test_a_swap_example_scores_every_variant(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.set_default_dtype(torch.float32)
    shrunk("quickstart_task", monkeypatch, PER_LIBRARY=12)
    example = importlib.import_module(name)
    out = tmp_path / "table.md"
    example.main(["--seeds", "1", "--epochs", "1", "--out", str(out)])
    rows = [row for row in out.read_text().splitlines() if " ± " in row][1:]
    assert len(rows) == count
    for row in rows:
        scores = [float(cell.split(" ± ")[0]) for cell in row.split("|")[2:-1]]
        assert all(math.isfinite(score) for score in scores)
        assert 0 < scores[3] <= RANKS + 0.1  # the effective rank


# Pyro's jit_compile, which the example uses
TRACING = pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")


@TRACING
def test_the_nuts_reference_compares_every_guide_under_every_prior(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    example = shrunk(
        "nuts_reference",
        monkeypatch,
        PER_LIBRARY=12,
        CHAINS=2,
        WARMUP=20,
        DRAWS=30,
        STEPS=10,
        LORA_STEPS=3,
        MAX_RHAT=math.inf,
        MIN_ESS=0,
    )
    example.main(["--out", str(tmp_path)])
    table = (tmp_path / "nuts_reference.md").read_text()
    for prior in example.PRIORS:
        for method in ("NUTS", *example.GUIDES):
            assert f"| {prior} | {method} |" in table
    assert (tmp_path / "nuts_reference.png").stat().st_size > 10_000


@TRACING
def test_the_judge_refuses_chains_that_have_not_mixed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    example = shrunk(
        "nuts_reference", monkeypatch, PER_LIBRARY=12, CHAINS=2, WARMUP=2, DRAWS=4
    )
    with pytest.raises(SystemExit, match="NUTS cannot judge here: r-hat"):
        example.main(["--out", str(tmp_path)])


def tiny_task(monkeypatch: pytest.MonkeyPatch) -> Path:
    """small_task.py on 64 sentences of CoLA; skips where there is no data."""
    data = EXAMPLES.parents[1] / "shared" / "data" / "cola"
    if not data.exists():
        pytest.skip(f"no data at {data.name}: it lies outside the project")
    torch.set_default_dtype(torch.float32)
    task = shrunk("small_task", monkeypatch, TRAIN=64, DEV=8, EPOCHS=2, LR=1e-2)
    read = task.read
    monkeypatch.setattr(task, "read", lambda path: read(path).take(range(100)))
    return data


def test_rank_selection_scores_every_threshold_and_exports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tiny_task(monkeypatch)
    example = shrunk(
        "rank_selection", monkeypatch, TRAIN=64, THRESHOLDS=(-4.0, 3.0, 20.0)
    )
    out = tmp_path / "lines.jsonl"
    example.main(["--data", str(data), "--seeds", "0", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 3 * len(example.THRESHOLDS)
    for model in example.MODELS:
        own = [line for line in lines if line["model"] == model]
        ranks = [line["rank"] for line in own]
        pruned = model.endswith("pruned in training")
        assert ranks == sorted(ranks) and (pruned or ranks[-1] == RANKS)
        assert own[-1]["bytes"] <= 1 and own[-1]["time"] > 0
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:no closed form of KL")
def test_the_linear_teacher_is_aligned_by_balancing_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.set_default_dtype(torch.float32)
    example = shrunk("gauge", monkeypatch, STEPS=400, EVERY=100)
    example.main(["--seeds", "1", "--out", str(tmp_path)])
    rows = {}
    for line in (tmp_path / "gauge.md").read_text().splitlines()[2:]:
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        rows[name] = [float(cell.split(" ± ")[0]) if cell else None for cell in cells]
    assert list(rows) == list(example.METHODS)
    assert rows["balanced"][0] > 0.97
    for other in ("training alone", "covariance over the core"):
        assert rows[other][0] < 0.9


def test_the_gauge_benchmark_compares_orders_and_posteriors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tiny_task(monkeypatch)
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    monkeypatch.delitem(sys.modules, "gauge", raising=False)
    ways = shrunk("one_pass", monkeypatch, SAMPLES=2)
    names = (
        "trained gauge",
        "balanced, noise refitted",
        "balanced, whole core, N(0, 1)",
    )
    monkeypatch.setattr(ways, "POSTERIORS", {n: ways.POSTERIORS[n] for n in names})
    benchmark = shrunk("gauge", monkeypatch, TRAIN=64, BUDGETS=(12,))
    monkeypatch.delitem(sys.modules, "gauge")
    out = tmp_path / "lines.jsonl"
    arguments = ["--data", str(data), "--seeds", "0", "--epochs", "2"]
    benchmark.main([*arguments, "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    orders = [line for line in lines if line["table"] == "order"]
    assert [line["k"] for line in orders] == [RANKS] + 10 * [12]
    energy = {}
    for line in lines:
        if line["table"] == "energy":
            assert line["energy"][-1] == pytest.approx(1)
            energy.setdefault((line["order"], line["metric"]), []).append(line["auc"])
    best = {key: sum(values) for key, values in energy.items()}
    for order in ("trained gauge", "norm", "random"):
        assert best["balanced", "whitened"] > best[order, "whitened"]
        assert best["SVD of dW", "Frobenius"] > best[order, "Frobenius"]
    assert out.with_suffix(".png").stat().st_size > 10_000
    posteriors = {line["posterior"] for line in lines if line["table"] == "posterior"}
    assert posteriors == {"plain LoRA", *names}


def test_a_whole_run_frees_the_lower_layers_and_keeps_fewer_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tiny_task(monkeypatch)
    monkeypatch.syspath_prepend(EXAMPLES)
    benchmark = shrunk(
        "benchmarks.whole_run", monkeypatch, TRAIN=64, SAMPLES=2, ROUNDS=3
    )
    freed = list(benchmark.FREED)[-1]
    monkeypatch.setitem(benchmark.FREED, freed, ({"layers": 1}, True))
    out = tmp_path / "lines.jsonl"
    with pyro.validation_enabled(False):
        arguments = ["--data", str(data), "--seeds", "0", "--out", str(out)]
        benchmark.main([*arguments, "--rows", "A/A", "GateLoRA", freed])
    rows = {line["row"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["LoRA", "A/A", "GateLoRA", freed]
    assert rows["A/A"]["bytes"] == rows["LoRA"]["bytes"] == 1
    assert rows["A/A"]["nll"] == rows["LoRA"]["nll"]
    assert rows["GateLoRA"]["ranks"] == RANKS
    assert rows[freed]["ranks"] == RANKS * (LAYERS - 1) // LAYERS
    assert rows[freed]["bytes"] < rows["GateLoRA"]["bytes"]


def test_the_benchmarks_command_in_the_readme_starts() -> None:
    """It trains for half an hour; here it says what it would do."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    found = re.search(r"`PYTHONPATH=(\S+) python (\S+) --data [^`]+`", readme)
    assert found is not None
    environment = os.environ | {"PYTHONPATH": found[1], "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, found[2], "--help"],
        cwd=EXAMPLES.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--data" in run.stdout and "one-pass-LoRA-centered" in run.stdout
