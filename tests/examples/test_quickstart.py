"""The quickstart: its data files, and the whole of it, made tiny."""

import importlib
import io
import json
import math
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from inferred import QUIET, az
from peft import PeftModel
from PIL import Image
from short_minilm import LAYERS
from transformers import AutoModelForSequenceClassification

import lrvd_pyro as lrvd
from lrvd_pyro.diagnostics.calibration import calibration_report, scores

pytestmark = QUIET

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


# The rate is high so that B leaves zero in ten steps.
SMALL = "--rows 64 --samples 3 --batch 4 --lr 0.02 --draws 40".split()


def shrunk(monkeypatch: pytest.MonkeyPatch, minilm: str) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    task = importlib.import_module("quickstart_task")
    monkeypatch.setattr(task, "PER_LIBRARY", 24)
    monkeypatch.setattr(task, "MINILM", minilm)
    return importlib.import_module("quickstart")


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch, minilm: str) -> Any:
    return shrunk(monkeypatch, minilm)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> Iterator[Any]:
    """One run with the default data: what it printed, read and wrote."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        module = shrunk(monkeypatch, minilm)
        folder = tmp_path_factory.mktemp("runs") / "tiny"
        options = [*SMALL, "--epochs", "4", "--r", "4"]
        with redirect_stdout(io.StringIO()) as out:
            module.main([*options, "--out", str(folder)])
            task = module.load_task(module.options("").parse_args(options))
        report = json.loads((folder / "report.json").read_text())
        yield SimpleNamespace(
            out=out.getvalue(),
            task=task,
            folder=folder,
            report=report,
            options=options,
            model=minilm,
        )


def base(run: Any) -> Any:
    """The pretrained network as anyone would load it."""
    torch.set_default_dtype(torch.float32)
    return AutoModelForSequenceClassification.from_pretrained(
        run.model, num_labels=run.task.classes
    )


def test_both_start_from_the_same_network(quickstart: Any) -> None:
    args = quickstart.options("").parse_args([*SMALL, "--seed", "3"])
    task = quickstart.load_task(args)
    first, again = (quickstart.lora_network(task, args) for _ in range(2))
    trained = [name for name, p in first.named_parameters() if p.requires_grad]
    assert trained and all(
        torch.equal(first.get_parameter(name), again.get_parameter(name))
        for name in trained
    )
    assert not [m for m in first.modules() if getattr(m, "p", 0.0) != 0.0]


def test_default_run_prints_finite_scores_and_ranks(run: Any) -> None:
    _, mean, sampled, evident, *_, uncertainty = check_report(run.out, r=4)
    assert mean[-8:-3] != sampled[-8:-3], "the samples are as good as the mean"
    assert evident[-8:-3] not in (mean[-8:-3], sampled[-8:-3])
    assert 0 < uncertainty[-3] < uncertainty[-6], "mutual information below entropy"
    assert "held-out library sympy" in run.out


def test_run_on_a_file(
    quickstart: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "reviews.tsv"
    lines = [f'{"good" if i % 2 else "bad"} "film {i}\t{i % 2}\n' for i in range(48)]
    file.write_text("text\tlabel\n" + "".join(lines), encoding="utf-8")
    options = [*SMALL, "--data", str(file), "--epochs", "1", "--targets", "value"]
    quickstart.main([*options, "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert out.startswith("28 sentences to train on, 8 dev, 12 test")
    assert "LRVD keeps the noise of training" in out  # one epoch learns nothing here
    check_report(out, r=8, types=1, evident=False)


def check_report(
    out: str, r: int, types: int = 2, *, evident: bool = True
) -> list[list[float]]:
    """Rows of finite scores, a picture that adds up, and rows of uncertainty."""
    rows = [
        line.split() for line in out.splitlines() if re.match(" *(LoRA |LRVD,)", line)
    ]
    assert len(rows) == 6 + 2 * evident
    figures = [
        [float(f) for f in row if re.fullmatch(r"-?[\d.]+|nan|inf", f)] for row in rows
    ]
    assert all(math.isfinite(f) for row in figures for f in row)
    lora, mean, sampled = (row[-8:] for row in figures[:3])
    for row in figures[: 3 + evident]:
        dev_nll, accuracy, nll, brier, ece, _, rank, seconds = row[-8:]
        assert dev_nll > 0 and nll > 0 and seconds > 0
        assert 0 <= accuracy <= 1 and 0 <= brier <= 2 and 0 <= ece <= 1
        assert 0 < rank <= LAYERS * types * r
    assert lora[-2] == LAYERS * types * r
    assert mean[-3] == lora[-3] + lora[-2], "one variance per rank component"
    kept = [float(k) for k in re.findall(r"[█·]{8} +([\d.]+)", out)]
    assert len(kept) == LAYERS * types and all(0 <= k <= r for k in kept)
    assert sum(kept) == pytest.approx(sampled[-2], abs=0.05 * len(kept))
    lora, mean, sampled = (row[-6:] for row in figures[3 + evident :][:3])
    assert lora[3:] == mean[3:] == [0.0, 0.0, 0.5], "a point has no mutual information"
    assert all(0 <= row[-4] <= 1 for row in figures[3 + evident :])
    if evident:
        assert figures[-1][-3] > sampled[3], "the evidence allows more noise"
    return figures


def test_the_folder_holds_what_the_run_says_and_nothing_else(run: Any) -> None:
    said = {line.split()[0] for line in run.out.splitlines() if "/tiny/" in line}
    assert said == {str(path) for path in run.folder.iterdir()} and len(said) == 5


def test_the_folder_fills_from_the_cheap_to_the_dear(
    run: Any, quickstart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that cannot write draws for ArviZ has left all the rest."""
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'lrvd_pyro\[arviz\]'"):
        quickstart.main([*run.options, "--out", str(tmp_path)])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {path.name for path in run.folder.iterdir()} - {"posterior.nc"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() == run.report.keys()


def test_loo_judges_the_training_set(run: Any) -> None:
    data = az.from_netcdf(str(run.folder / "posterior.nc"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few draws
        found = az.loo(data, reff=1, pointwise=True)
    data.close()
    texts = importlib.import_module("run_folder").ARVIZ_TEXTS
    assert found.n_data_points == texts < len(run.task.train)
    high = int((found.pareto_k > found.good_k).sum())
    verdict = f"above {found.good_k:.2f} for {high} of {texts} training"
    assert verdict in run.out


def test_plain_peft_loads_the_adapter_and_scores_as_reported(run: Any) -> None:
    """Any warning while it loads would be an error here."""
    net = PeftModel.from_pretrained(base(run), run.folder / "adapter").eval()
    with torch.no_grad():
        logits = torch.cat([net(**b).logits for b in run.task.test.in_order()])
    found = scores(logits.softmax(-1), run.task.test.labels)
    reported = run.report["LRVD, posterior mean"]
    for name, value in found.items():
        assert value == pytest.approx(reported[name]["value"], rel=1e-4), name


def test_the_loaded_posterior_predicts_as_reported(run: Any) -> None:
    model, guide = lrvd.load(run.folder / "adapter", base(run))
    prediction, held_out = (
        lrvd.predict(model, guide, data.in_order(), method="linearized")
        for data in (run.task.test, run.task.held_out)
    )
    found = calibration_report(
        prediction, run.task.test.labels, out_of_distribution=held_out
    ).to_dict()
    reported = run.report["LRVD, noise by evidence"]
    assert reported["nll"] != run.report["LRVD, posterior mean"]["nll"]
    for name, value in found.items():
        assert value == pytest.approx(reported[name], rel=1e-5), name
    assert float(guide.effective_rank) == pytest.approx(reported["rank"], rel=1e-5)
    assert reported["seconds"] > run.report["LRVD, 3 samples"]["seconds"]


def test_without_a_maximum_of_the_evidence_the_rest_is_printed_and_written(
    quickstart: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As after a few steps at a tiny rate."""
    rates = [*SMALL, "--lr", "1e-5", "--epochs", "1", "--out", str(tmp_path)]
    quickstart.main(rates)
    out = capsys.readouterr().out
    assert "LRVD keeps the noise of training: the evidence has no maximum" in out
    assert len(list(tmp_path.iterdir())) == 5
    report = json.loads((tmp_path / "report.json").read_text())
    assert [*report] == ["LoRA", "LRVD, posterior mean", "LRVD, 3 samples"]


def test_posterior_nc_opens_in_arviz_with_every_gate_in_its_place(run: Any) -> None:
    data = az.from_netcdf(str(run.folder / "posterior.nc"))
    gate = data["posterior"]["gate"].load()
    density = {
        name: data[f"{name}log_likelihood"]["labels"].values for name in ("", "test_")
    }
    labels = {
        name: data[f"{name}observed_data"]["labels"].values for name in ("", "test_")
    }
    log_alpha = torch.as_tensor(data["constant_data"]["log_alpha"].values)
    data.close()
    assert gate.dims == ("chain", "draw", "gate_id") and gate.shape == (
        1,
        40,
        8 * LAYERS,
    )
    types = ["attention.self.query", "attention.self.value"]
    places = [(i, t, r) for i in range(LAYERS) for t in types for r in range(4)]
    columns = [gate[name].values.tolist() for name in ("layer", "type", "rank")]
    assert [*zip(*columns)] == places
    assert gate["gate_id"].values[-1] == f"l{LAYERS - 1}.attention.self.value[3]"
    for name, part in [("", run.task.train), ("test_", run.task.test)]:
        shown = part.labels[: importlib.import_module("run_folder").ARVIZ_TEXTS]
        assert labels[name].tolist() == shown.tolist()
        assert density[name].shape == (1, 40, len(shown)) and (density[name] < 0).all()
    rank = run.report["LRVD, 3 samples"]["rank"]
    assert float(torch.sigmoid(-log_alpha).sum()) == pytest.approx(rank, rel=1e-5)


def test_the_report_is_strict_json_of_finite_numbers(run: Any) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    text = (run.folder / "report.json").read_text()
    report = json.loads(text, parse_constant=refuse)
    of_lrvd = ["LRVD, posterior mean", "LRVD, 3 samples", "LRVD, noise by evidence"]
    assert [*report] == ["LoRA", *of_lrvd]
    for result in report.values():
        assert result.keys() >= {"accuracy", "nll", "ece", "ood_entropy", "seconds"}
        for name, value in result.items():
            numbers = [*value.values()] if isinstance(value, dict) else [value]
            assert all(math.isfinite(number) for number in numbers), name
            if isinstance(value, dict):
                assert value["low"] <= value["high"], name


@pytest.mark.parametrize("name", ["ranks.png", "reliability.png"])
def test_a_picture_is_a_png_with_something_drawn_in_its_middle(
    name: str, run: Any
) -> None:
    with Image.open(run.folder / name) as image:
        assert image.format == "PNG" and min(image.size) > 300
        width, height = image.size
        inside = (width // 5, height // 5, width * 3 // 4, height * 4 // 5)
        middle = np.asarray(image.convert("RGB").crop(inside)).reshape(-1, 3)
    colors, counts = np.unique(middle, axis=0, return_counts=True)
    assert len(colors) > 10 and counts.max() < 0.9 * counts.sum()


def test_a_second_run_replaces_everything_in_the_folder(
    run: Any, quickstart: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(run.folder, folder)
    quickstart.main([*run.options, "--seed", "1", "--out", str(folder)])
    before, after = (
        {path.relative_to(top): path.read_bytes() for path in top.rglob("*.*")}
        for top in (run.folder, folder)
    )
    assert before.keys() == after.keys() and len(after) == 8
    same = {path.name for path in after if before[path] == after[path]}
    assert same <= {"adapter_config.json", "lrvd_config.json"}
