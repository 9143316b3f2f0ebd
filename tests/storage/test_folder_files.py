"""Saved folders are whole or refused; errors say what they found, and the way out."""

import copy
import io
import json
import os
import pickletools
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import tokens
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file, save_file
from stored import fresh, perturbed, same_predictions, saved
from torch import Tensor, nn

from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.inference.param_store import give_own_name
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.selection.removal import select
from lrvd_pyro.storage import atomic as folders
from lrvd_pyro.storage import folder as folder_module
from lrvd_pyro.storage.folder import load, save
from lrvd_pyro.storage.hashes import seal

FILES = ["adapter_config.json", "adapter_model.safetensors"]
FILES += ["lrvd_config.json", "lrvd_posterior.safetensors"]


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "lrvd_config.json").read_text()) | changes
    (path / "lrvd_config.json").write_text(json.dumps(config))
    seal(path)


def whole(net: Any, before: dict[str, Tensor]) -> bool:
    """Nothing of PEFT is in the network, and it is as it was."""
    state = net.state_dict()
    same = state.keys() == before.keys()
    same &= all(torch.equal(state[n], before[n]) for n in before)
    return same and not hasattr(net, "peft_config") and _all_train(net)


def _all_train(net: nn.Module) -> bool:
    return all(p.requires_grad for p in net.parameters())


# Files


def test_a_folder_holds_four_files_no_pickle_and_no_path_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, _ = saved(tmp_path)
    assert sorted(p.name for p in path.iterdir()) == FILES
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    for file in path.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
        with pytest.raises(ValueError):
            pickletools.dis(file.read_bytes(), out=io.StringIO())
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load"))
    load(path, fresh(model.base_net))


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    path, model, guide = saved(tmp_path)
    select(model, guide, keep=torch.arange(16) > 3)
    save(path, model, guide)
    loaded, _ = load(path, fresh(model.base_net))
    assert loaded.space.ranks == (4, 4, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    path, model, guide = saved(tmp_path)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds \['notes.txt'\], which would be lost"):
        save(path, model, guide)
    with pytest.raises(ValueError, match="holds .*a file"):
        save(path / "notes.txt", model, guide)
    assert (path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "failing", ["write_tensors", "sync", "replace", "second", "third"]
)
def test_a_failed_write_leaves_the_folder_as_it_was(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, guide = saved(tmp_path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    perturbed(model, guide)
    calls: list[Any] = []
    replace = os.replace

    def fails(*args: Any) -> None:
        calls.append(args)
        if {"second": 2, "third": 3}.get(failing, len(calls)) == len(calls):
            raise OSError("no space left")
        replace(*args)

    module: Any = {"write_tensors": folder_module, "sync": folders}.get(failing, os)
    name = "replace" if module is os else failing
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails)
        with pytest.raises(OSError, match="no space left"):
            save(path, model, guide)
    assert calls and {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_kill_between_two_renames_is_mended_by_the_next_reader(
    tmp_path: Path,
) -> None:
    path, model, guide = saved(tmp_path)
    os.replace(path, tmp_path / ".run.previous")
    same_predictions(
        (model, guide), load(path, fresh(model.base_net)), tokens(4, labels=False)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# Errors: each says what it found and what to do, and leaves the network as it was


@pytest.mark.parametrize("name", [FILES[0], FILES[2], FILES[3]])
def test_missing_and_truncated_files_are_named(name: str, tmp_path: Path) -> None:
    path, model, _ = saved(tmp_path)
    base = fresh(model.base_net)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is (damaged|not the file that)"):
        load(path, base)
    if name != "lrvd_config.json":
        seal(path)
        with pytest.raises(
            ValueError, match=f"{name} is damaged: .*; expected .*write the"
        ):
            load(path, base)
    (path / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing; the folder holds"):
        load(path, base)
    assert whole(base, before)


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing; the folder is empty or missing"):
        load(tmp_path / "nothing", nets.Perceptron())


def test_a_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    path, model, _ = saved(tmp_path)
    base = fresh(model.base_net)
    hacked = {"name": "Hacked", "builtin": True, "arguments": {}}
    edit(path, model={})
    with pytest.raises(
        ValueError,
        match=r"config.json: the list of names in model is \[\]; .*save\(",
    ):
        load(path, base)
    edit(path, model=hacked)
    with pytest.raises(
        ValueError, match="'Hacked', which is not a class of .*model=...\\)"
    ):
        load(path, base)
    edit(path, format=9, versions={"lrvd_pyro": "9.0"})
    with pytest.raises(
        ValueError, match="format 9, written by lrvd_pyro '9.0'; .*pip in"
    ):
        load(path, base)
    (path / "lrvd_config.json").write_text("[]")
    with pytest.raises(ValueError, match="it is a list; expected a JSON object"):
        load(path, base)


def test_an_adapter_of_another_type_is_refused(tmp_path: Path) -> None:
    path, model, _ = saved(tmp_path)
    (path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    seal(path)
    with pytest.raises(ValueError, match="of type 'IA3'; expected 'LORA'"):
        load(path, fresh(model.base_net))


def test_another_base_is_refused_and_left_alone(tmp_path: Path) -> None:
    path, model, _ = saved(tmp_path)
    other = fresh(nets.bert())
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(
        ValueError, match="is not the base .* has the values .*differen"
    ):
        load(path, other)
    assert whole(other, before)
    with pytest.raises(ValueError, match="embeddings.weight is missing"):
        load(path, nets.Perceptron())
    larger = fresh(model.base_net)
    larger.resize_token_embeddings(53)
    with pytest.raises(ValueError, match=r"shape \[53, 16\], not \[50, 16\]"):
        load(path, larger)
    larger.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="extra.weight is one too many"):
        load(path, larger)


def test_a_peft_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path, model, _ = saved(tmp_path)
    net: Any = copy.deepcopy(model.base_net)
    with pytest.raises(
        TypeError, match=r"without PEFT, .*load\(path, net.unload\(\)\)"
    ):
        load(path, net)
    load(path, net.unload())


def test_tensors_of_another_shape_are_refused_and_the_adapter_taken_out(
    tmp_path: Path,
) -> None:
    path, model, _ = saved(tmp_path)
    base = fresh(model.base_net)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    tensors = load_file(path / "lrvd_posterior.safetensors")
    tensors["guide.log_variance"] = torch.zeros(3, dtype=torch.float64)
    save_file(tensors, path / "lrvd_posterior.safetensors")
    seal(path)
    with pytest.raises(ValueError, match=r"variance is .*\[3\], expected .*\[16\];"):
        load(path, base)
    tensors["guide.more"] = torch.zeros(1)
    save_file(tensors, path / "lrvd_posterior.safetensors")
    seal(path)
    with pytest.raises(ValueError, match="are not those of its config: guide.more;"):
        load(path, base)
    del tensors["guide.more"]
    save_file(tensors, path / "lrvd_posterior.safetensors")
    seal(path)
    assert whole(base, before)
    base.classifier = nn.Linear(16, 5)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"classifier.bias is .*\[3\], expec.*\[5\]"):
        load(path, base)
    assert whole(base, before)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    net = nets.bert()
    model = GateLoRA(net, num_data=60)
    guide, path = RankDiagonal(model), tmp_path / "run"
    with pytest.raises(TypeError, match=r"a PeftModel\w+; expected a models.RankModel"):
        save(path, net, guide)  # type: ignore[arg-type]
    function: Any = guide.forward
    with pytest.raises(TypeError, match="guide is a method, .*make it a PyroModule"):
        save(path, model, function)
    with pytest.raises(ValueError, match="guide was built on another model"):
        save(path, GateLoRA(nets.bert(), num_data=60), guide)
    with pytest.raises(ValueError, match="AutoNormal has no parameters yet"):
        save(path, model, give_own_name(AutoNormal(model)))
    net.base_model.model.bert.pooler.dense.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="train but belong to no adapter"):
        save(path, model, guide)
    assert not list(tmp_path.iterdir())
