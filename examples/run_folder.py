"""What a run leaves behind: report, pictures, the posterior, for PEFT and for ArviZ."""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from quickstart_task import Task
from text_data import Encoded
from tqdm import tqdm

import lrvd_pyro as lrvd
from lrvd_pyro.diagnostics import plots
from lrvd_pyro.diagnostics.calibration import calibration_report
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.categorical import CategoricalPrediction
from lrvd_pyro.models import GateLoRA

BINS = 10


class Result(NamedTuple):
    """What one way of predicting says, and what it cost."""

    name: str
    cost: dict[str, float]
    dev: CategoricalPrediction
    test: CategoricalPrediction
    held_out: CategoricalPrediction


class Posterior(NamedTuple):
    """A trained pair, log alpha over its training, and a guide of more noise."""

    model: GateLoRA
    guide: RankDiagonal
    history: lrvd.RankHistory
    noisy: RankDiagonal


ARVIZ_TEXTS = 32  # of train and of test


def write(
    folder: Path,
    posterior: Posterior,
    results: Sequence[Result],
    task: Task,
    draws: int,
) -> Iterator[str]:
    """Write the run folder, over an older one, and say what lies where.

    What is cheap and needs few libraries comes first. A run that ends early has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, guide, history, noisy = posterior

    def line(name: str, what: str) -> str:
        return f"{folder / name!s:<32} {what}"

    report = json.dumps(reports(results, task.test), indent=2, allow_nan=False)
    (folder / "report.json").write_text(report, encoding="utf-8")
    yield line("report.json", "scores on test and their 95% bootstrap intervals")
    draw_ranks(history).savefig(folder / "ranks.png")
    yield line("ranks.png", "effective rank of each LoRA module over training")
    plain, *_, last = results
    draw_reliability([plain, last], task.test).savefig(folder / "reliability.png")
    yield line("reliability.png", "accuracy against confidence on test")
    lrvd.save(folder / "adapter", model, noisy)
    yield line(
        "adapter", "the mean for plain PEFT; with noise by evidence for lrvd.load"
    )
    # Each draw is a pass over these texts: a part of them, or it would take long.
    train, test = (
        part.in_order(ARVIZ_TEXTS, labels=True)[:1] for part in (task.train, task.test)
    )
    shown = tqdm(train, desc=f"{draws} draws for ArviZ")
    data = lrvd.to_arviz(model, guide, shown, draws, test_batches=test)
    data.to_netcdf(str(folder / "posterior.nc"))
    yield line("posterior.nc", "draws of the gates as trained, log likelihoods")
    yield f"\n{judge_loo(data)}"


def judge_loo(data: Any) -> str:
    """Whether the draws are enough for leave-one-out on the training set."""
    import arviz  # takes seconds, and the rest is on disk by now

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # this says the same
        loo = arviz.loo(data, pointwise=True, reff=1)  # type: ignore[no-untyped-call]
    high = int((loo.pareto_k > loo.good_k).sum())
    return (
        f"az.loo(data, reff=1): Pareto k is above {loo.good_k:.2f} for {high} of "
        f"{loo.n_data_points} training texts; more --draws lower it"
    )


def reports(results: Sequence[Result], test: Encoded) -> dict[str, object]:
    """Cost and calibration of each way, the held-out data as out of distribution."""
    return {
        result.name: result.cost
        | calibration_report(
            result.test, test.labels, out_of_distribution=result.held_out
        ).to_dict()
        for result in results
    }


def draw_ranks(history: lrvd.RankHistory) -> Figure:
    """Effective rank over training, a row per module."""
    figure = Figure(figsize=(7.0, 3.6), dpi=100, layout="constrained")
    plots.rank_heatmap(history, by="module", ax=figure.subplots())
    return figure


def draw_reliability(results: Sequence[Result], test: Encoded) -> Figure:
    """A reliability diagram for each way of predicting, side by side."""
    size = (3.6 * len(results), 3.6)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    row = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for ax, result in zip(row, results):
        plots.reliability_diagram(result.test, test.labels, bins=BINS, ax=ax)
        ax.set_title(result.name)
        ax.label_outer()
    for ax in row[1:]:
        ax.get_legend().remove()
    return figure
