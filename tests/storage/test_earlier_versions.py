"""What version 0.1.0 wrote is read, and predicts what it predicted then."""

import json
import shutil
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from pyro.infer import SVI
from safetensors.torch import load_file

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.rank_space.center import center_at, center_of

WRITTEN = Path(__file__).parents[1] / "fixtures" / "0.1.0"


def base() -> Any:
    net = nets.Perceptron()
    net.load_state_dict(load_file(WRITTEN / "base.safetensors"))
    return net


def expected() -> dict[str, torch.Tensor]:
    return load_file(WRITTEN / "expected.safetensors")


@pytest.mark.parametrize(
    ("name", "family", "kind"),
    [
        ("centered_gates", GateLoRA, RankDiagonal),
        ("horseshoe", GateLoRA, RankDiagonal),
        ("factors", FactorLoRA, TiedDiagonal),
    ],
)
def test_a_folder_predicts_as_it_did(
    name: str, family: Any, kind: Any, tmp_path: Path
) -> None:
    folder = tmp_path / name
    shutil.copytree(WRITTEN / name, folder)
    with pytest.warns(UserWarning, match="without hashes of its files"):
        model, guide = lrvd.load(folder, base())
    assert type(model) is family and type(guide) is kind
    known = expected()
    found = lrvd.predict(model, guide, [{"x": known["x"]}], num_samples=3).probs
    torch.testing.assert_close(found, known[name])
    assert bool(center_of(model.space)) == (name == "centered_gates")
    lrvd.save(folder, model, guide)  # in the present format
    assert json.loads((folder / "lrvd_config.json").read_text())["format"] == 3
    again = lrvd.predict(*lrvd.load(folder, base()), [{"x": known["x"]}], 3).probs
    assert torch.equal(again, found)


def test_a_checkpoint_goes_on_as_it_did() -> None:
    known = expected()
    net = nets.lora(base(), target_modules=["hidden", "out"])
    model = GateLoRA(net, prior=lrvd.priors.ARD(), num_data=20)
    guide = RankDiagonal(model)
    elbo = lrvd.RankELBO(kl_weight=lrvd.linear_warmup(2))
    optimizer = lrvd.optim.AdamW(lr=1e-2)
    sampler = lrvd.ResumableSampler(20, seed=1)
    balance = lrvd.gauge.BalanceSchedule(
        model, guide, optimizer, every=4, gather_every=1
    )
    run: Any = {"model": model, "guide": guide, "optimizer": optimizer, "elbo": elbo}
    run |= {"sampler": sampler, "schedule": balance}
    with pytest.warns(UserWarning, match="without a hash of its content"):
        lrvd.resume(WRITTEN / "run.safetensors", **run)
    svi = SVI(model, guide, optimizer, loss=elbo)
    steps = 0
    while steps < 4:
        for index in sampler.batches(6):
            svi.step(x=known["X"][index], labels=known["Y"][index])
            balance.step()
            steps += 1
            if steps == 4:
                break
    balance.close()
    found = lrvd.predict(model, guide, [{"x": known["x"]}], num_samples=3).probs
    torch.testing.assert_close(found, known["run"])


def test_the_twin_without_the_centers_does_not() -> None:
    with pytest.warns(UserWarning, match="without hashes of its files"):
        model, guide = lrvd.load(WRITTEN / "centered_gates", base())
    center_at(model.space, 0.5 * torch.ones(model.space.size))
    known = expected()
    found = lrvd.predict(model, guide, [{"x": known["x"]}], num_samples=3).probs
    assert not torch.allclose(found, known["centered_gates"], rtol=1e-3)
