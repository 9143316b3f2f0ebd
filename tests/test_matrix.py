"""Every prior with every guide of tests/helpers/families.py."""

import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import pytest
from families import GUIDES, PRIORS, REFUSED
from nets import bert, tokens
from pyro import poutine

import lrvd_pyro as lrvd
from lrvd_pyro.guides import TiedDiagonal
from lrvd_pyro.inference.kl import family, latent_sites
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.testing.assertions import assert_error, assert_ok

pytestmark = pytest.mark.filterwarnings("ignore:no closed form")


DRIVERS = list(product(["svi", "torch"], ["example", "batch"]))
RESULTS = Path(__file__).parents[1] / "examples" / "results" / "README.md"


def pair(prior: str, guide: str) -> tuple[Any, Any]:
    model = GateLoRA(bert(randomize=False), prior=PRIORS[prior](), num_data=60)
    return model, GUIDES[guide](model)


def cover() -> list[Any]:
    """All pairs; each prior, and each guide, sees every driver with every noise."""
    rows = []
    for (i, prior), (j, guide) in product(enumerate(PRIORS), enumerate(GUIDES)):
        driver, noise = DRIVERS[(i + j) % len(DRIVERS)]
        name = f"{prior}-{guide}-{driver}-{noise}"
        rows.append(pytest.param(prior, guide, driver, noise, id=name))
    return rows


@pytest.mark.parametrize(("prior", "guide", "driver", "noise"), cover())
def test_every_prior_trains_predicts_and_saves_with_every_guide(
    prior: str, guide: str, driver: Any, noise: Any
) -> None:
    make_pair = partial(pair, prior, guide)
    if (prior, guide) in REFUSED:
        reason = (
            r"a (log-uniform prior|prior with a learned or latent scale), .* has no "
            r"minimum; .* or another proper prior"
        )
        assert_error(make_pair, tokens(), reason)
        return
    elbo = lrvd.RankELBO(noise=noise)
    assert_ok(make_pair, [tokens() for _ in range(3)], elbo=elbo, driver=driver)


@pytest.mark.parametrize(("driver", "noise"), DRIVERS)
@pytest.mark.parametrize("sides", [("lora_A",), ("lora_A", "lora_B")])
@pytest.mark.parametrize("guide", ["TiedDiagonal", "AutoNormal"])
def test_drawn_weights_train_predict_and_save(
    guide: str, sides: Any, driver: Any, noise: Any
) -> None:
    def make_pair() -> tuple[Any, Any]:
        model = FactorLoRA(bert(), num_data=60, sides=sides)
        if guide == "AutoNormal":  # it has means of its own, so the net's stay
            for weight in (w for side in sides for w in model.space.weights(side)):
                weight.requires_grad_(False)
        return model, {"TiedDiagonal": TiedDiagonal, **GUIDES}[guide](model)

    elbo = lrvd.RankELBO(noise=noise)
    assert_ok(make_pair, [tokens() for _ in range(3)], elbo=elbo, driver=driver)


def kind_of_kl(model: Any, guide: Any) -> tuple[str, str]:
    """How RankELBO finds the KL of this pair; and why not, where it refuses."""
    batch = tokens()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            lrvd.RankELBO().differentiable_loss(model, guide, **batch)
        except ValueError as error:
            return "refused", str(error)
    if any("no closed form of KL" in str(warning.message) for warning in said):
        return "Monte Carlo", ""
    drawn = latent_sites(poutine.trace(guide).get_trace(**batch)).values()
    if all(family(site["fn"]) == "Delta" for site in drawn):
        return "point", ""
    return "closed", ""


def kl_table() -> tuple[dict[str, dict[str, str]], set[str]]:
    """By guide and prior the kind of KL; and the reasons of the refusals."""
    kinds: dict[str, dict[str, str]] = {}
    reasons = set()
    for guide, prior in product(GUIDES, PRIORS):
        pyro.clear_param_store()
        kind, reason = kind_of_kl(*pair(prior, guide))
        kinds.setdefault(guide, {})[prior] = kind
        reasons |= {reason.split(";")[0]} if reason else set()
    return kinds, reasons


def markdown(kinds: dict[str, dict[str, str]], reasons: set[str]) -> str:
    """A row for each prior; guides with the same column share it."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for guide, column in kinds.items():
        columns.setdefault(tuple(column.values()), []).append(f"`{guide}`")
    rows = [["prior", *(", ".join(names) for names in columns.values())]]
    rows.append(["---"] * len(rows[0]))
    rows += [[f"`{p}`", *cells] for p, *cells in zip(PRIORS, *columns)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    why = "\n".join(f"- refused: {reason}" for reason in sorted(reasons))
    return f"{table}\n\n{why}\n"


def test_readme_table_is_what_the_code_does() -> None:
    kinds, reasons = kl_table()
    refused = {
        (p, g) for g in kinds for p, kind in kinds[g].items() if kind == "refused"
    }
    assert refused == REFUSED
    table = markdown(kinds, reasons)
    assert table in RESULTS.read_text(), f"{RESULTS} lacks this table:\n{table}"
