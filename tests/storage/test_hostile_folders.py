"""A stranger's folder, its hashes right: refused by name, or a model that works."""

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import damaged
import nets
import pytest
import torch
from safetensors.torch import load_file, save_file
from stored import fresh, perturbed

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.storage.hashes import seal


def folder(path: Path) -> tuple[Path, Any, dict[str, Any]]:
    """A saved model, its base and inputs for both."""
    net = nets.perceptron()
    model = GateLoRA(net, prior=lrvd.priors.Horseshoe(), num_data=20)
    guide = perturbed(model, RankDiagonal(model, learn_mean=False))
    return lrvd.save(path, model, guide), fresh(net), {"x": torch.randn(4, 5)}


def loaded(path: Path, base: Any, inputs: dict[str, Any]) -> str:
    """What became of it: a refusal that names a file, or finite predictions."""
    before = damaged.state_of(base)
    try:
        model, guide = lrvd.load(path, base)
    except (ValueError, TypeError) as error:
        assert damaged.state_of(base) == before, f"changed by {error}"
        told = [str(error), *getattr(error, "__notes__", [])]
        assert any(str(path) in words for words in told), error
        return "refused"
    assert lrvd.predict(model, guide, [inputs], 2).probs.isfinite().all()
    return "valid"


@pytest.mark.parametrize(
    ("name", "least"), [("lrvd_config.json", 250), ("adapter_config.json", 60)]
)
def test_every_entry_of_a_config_is_checked_and_a_refusal_changes_nothing(
    name: str, least: int, tmp_path: Path
) -> None:
    path, base, inputs = folder(tmp_path / "run")
    whole = json.loads((path / name).read_text())
    outcomes: dict[str, list[str]] = {"refused": [], "valid": []}
    for what, config in damaged.damaged(whole):
        if "hash" in what:
            continue
        (path / name).write_text(json.dumps(config))
        seal(path)
        outcomes[loaded(path, fresh_of(base), inputs)].append(what)
    assert len(outcomes["refused"]) > least, outcomes["valid"]


def fresh_of(base: Any) -> Any:
    new = nets.Perceptron()
    new.load_state_dict(base.state_dict())
    return new


def test_every_tensor_is_checked_and_a_refusal_changes_nothing(tmp_path: Path) -> None:
    path, base, inputs = folder(tmp_path / "run")
    file = path / "lrvd_posterior.safetensors"
    whole = load_file(file)
    for name in whole:
        others: list[Any] = [v for v in damaged.variants(whole[name]) if v is not None]
        for tensor in [t for t in others if isinstance(t, torch.Tensor)]:
            save_file(
                {n: t for n, t in whole.items() if n != name} | {name: tensor}, file
            )
            seal(path)
            assert loaded(path, fresh_of(base), inputs) == "refused", (name, tensor)
        save_file({n: t for n, t in whole.items() if n != name}, file)
        seal(path)
        assert loaded(path, fresh_of(base), inputs) == "refused", name


@pytest.mark.parametrize("name", ["lrvd_config.json", "adapter_config.json"])
def test_a_flipped_bit_in_text_is_named(name: str, tmp_path: Path) -> None:
    _flips(name, tmp_path)


@pytest.mark.parametrize(
    "name", ["lrvd_posterior.safetensors", "adapter_model.safetensors"]
)
def test_a_flipped_bit_in_a_tensor_is_named(name: str, tmp_path: Path) -> None:
    _flips(name, tmp_path)


def _flips(name: str, tmp_path: Path) -> None:
    path, base, _ = folder(tmp_path / "run")
    whole = (path / name).read_bytes()
    for i in range(40):
        place = len(whole) * i // 40
        flipped = bytes([whole[place] ^ (1 << i % 8)])
        (path / name).write_bytes(whole[:place] + flipped + whole[place + 1 :])
        if name.endswith("json") and _same_content(path / name, whole):
            continue  # a space that became another
        with pytest.raises(ValueError, match=rf"{name}|format"):
            lrvd.load(path, fresh_of(base))


def _same_content(file: Path, whole: bytes) -> bool:
    try:
        return bool(json.loads(file.read_bytes()) == json.loads(whole))
    except ValueError:
        return False


def test_without_hashes_a_present_folder_is_refused_and_an_older_one_warns(
    tmp_path: Path,
) -> None:
    path, base, inputs = folder(tmp_path / "run")
    file = path / "lrvd_config.json"
    config = json.loads(file.read_text())
    bare = {name: v for name, v in config.items() if "hash" not in name}
    file.write_text(json.dumps(bare))
    with pytest.raises(ValueError, match=r"lacks \['hash', 'hashes'\], so its files"):
        lrvd.load(path, fresh_of(base))
    del bare["layer_replication"], bare["dtypes"]
    file.write_text(json.dumps(bare | {"format": 2}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lrvd.load(path, base)
    assert [str(w.message).count("without hashes of its files") for w in seen] == [1]


def adapter_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    seal(path)


def test_a_strangers_module_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, base, _ = folder(tmp_path / "run")
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the stranger')")
    monkeypatch.syspath_prepend(tmp_path)
    adapter_config(path, megatron_config={"a": 1}, megatron_core="evil")
    before = damaged.state_of(base)
    with pytest.raises(ValueError, match=r"adapter_config.json sets 'megatron_co"):
        lrvd.load(path, base)
    assert "evil" not in sys.modules and damaged.state_of(base) == before


def test_layers_are_not_replicated_by_peft_s_file_alone(tmp_path: Path) -> None:
    net = nets.bert()
    model = GateLoRA(net, num_data=60)
    path = lrvd.save(tmp_path / "run", model, perturbed(model))
    base = fresh(net)
    adapter_config(path, layer_replication=[[0, 2]] * 3)
    with pytest.raises(
        ValueError, match="sets 'layer_replication' to .* load does not"
    ):
        lrvd.load(path, base)
    assert len(base.bert.encoder.layer) == 2


def lrvd_config(path: Path, **changes: Any) -> None:
    file = path / "lrvd_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    seal(path)


def test_a_name_that_is_a_regular_expression_is_refused_at_once(tmp_path: Path) -> None:
    path, base, _ = folder(tmp_path / "run")
    lrvd_config(path, modules=["hidden", "(a+)+$"])
    with pytest.raises(ValueError, match=r"lacks 1 modules .*\(a\+\)\+\$'\]; pass"):
        lrvd.load(path, base)


def test_sizes_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    path, base, _ = folder(tmp_path / "run")
    lrvd_config(path, ranks=[2 * 10**9, 4], origin=[*range(8)])
    with pytest.raises(ValueError, match="origin is .*; expected 2000000004 different"):
        lrvd.load(path, base)
    lrvd_config(path, ranks=[3, 5])
    with pytest.raises(ValueError, match="rank 3 in 'hidden', and as its lora_A a ten"):
        lrvd.load(path, base)
    lrvd_config(path, ranks=[4, 4], modules=["hidden", "elsewhere"])
    with pytest.raises(ValueError, match=r"lacks 1 modules .*'elsewhere'\]; pass a"):
        lrvd.load(path, base)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (
            {"instance": "torch.distributions.LKJCholesky", "keywords": {"dim": 10**7}},
            "LKJCholesky of .*; expected numbers, for parameters among",
        ),
        (
            {"instance": "torch.distributions.Normal", "keywords": {"loc": "0"}},
            "Normal of .*; expected numbers, for parameters among",
        ),
        (
            {
                "instance": "torch.distributions.Normal",
                "keywords": {"loc": 0.0, "scale": -1.0},
            },
            "Normal of .*: ValueError.*Expected parameter scale",
        ),
        (
            {"instance": "torch.distributions.Distribution", "keywords": {}},
            r"Distribution of .*; expected numbers, for parameters among \[\]",
        ),
        ({"instance": 7, "keywords": {}}, "7 is no name; expected a distribution's"),
        (
            {"instance": "torch.distributions.Normal", "keywords": [1]},
            r"keywords \[1\]; expected a dict",
        ),
    ],
)
def test_a_distribution_has_numbers_as_parameters(
    prior: Any, message: str, tmp_path: Path
) -> None:
    path, base, _ = folder(tmp_path / "run")
    model = json.loads((path / "lrvd_config.json").read_text())["model"]
    model["arguments"]["weight_prior"] = prior
    lrvd_config(path, model=model)
    with pytest.raises(ValueError, match=message):
        lrvd.load(path, base)


def test_numbers_that_are_not_finite_are_no_json(tmp_path: Path) -> None:
    path, base, _ = folder(tmp_path / "run")
    lrvd_config(path, num_data=math.nan)
    with pytest.raises(ValueError, match="config.json is damaged: it holds NaN, which"):
        lrvd.load(path, base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modules": ["hidden", "hidden"]},
            "modules is .*; expected one or more",
        ),
        ({"scalings": [1.0]}, r"scalings is \[1.0\]; expected one for each of the 2"),
        (
            {"origin": [0] * 8},
            "origin is .*; expected 8 different numbers",
        ),
        ({"adapter": "keys"}, "adapter is 'keys'; expected a name that nn"),
        ({"adapter": "a.b"}, "adapter is 'a.b'; expected a name that nn"),
        ({"num_data": 0}, "num_data is 0; expected a positive number"),
        (
            {"layer_replication": [[2, 1]]},
            r"replication is \[2, 1\]; expected the",
        ),
        (
            {"frozen": ["net.x"]},
            r"lacks \['net.x'\], of which it says that they",
        ),
        ({"versions": 7}, "versions is 7; expected a dict"),
    ],
)
def test_entries_of_the_config_agree(
    changes: Any, message: str, tmp_path: Path
) -> None:
    path, base, _ = folder(tmp_path / "run")
    lrvd_config(path, **changes)
    with pytest.raises(ValueError, match=message):
        lrvd.load(path, base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_dropout": 1.5},
            "lora_dropout is 1.5; expected a number from 0 to",
        ),
        ({"task_type": "X"}, "task_type is 'X'; expected one of"),
        ({"bias": "some"}, "bias is 'some'; expected 'none', 'all' or 'lora_only'"),
        (
            {"trainable_token_indices": {"a": [-1]}},
            r"\['a'\]\[0\] is -1; expected a",
        ),
        (
            {"kasa_config": {"a": 1}},
            "sets 'kasa_config' to .*, which load does not",
        ),
    ],
)
def test_fields_of_peft_have_their_kinds(
    changes: Any, message: str, tmp_path: Path
) -> None:
    path, base, _ = folder(tmp_path / "run")
    adapter_config(path, **changes)
    with pytest.raises(ValueError, match=rf"adapter_config.json:? {message}|{message}"):
        lrvd.load(path, base)


def test_a_guide_has_the_models_sites_and_flags_that_are_flags(tmp_path: Path) -> None:
    path, base, _ = folder(tmp_path / "run")
    guide = json.loads((path / "lrvd_config.json").read_text())["guide"]
    lrvd_config(path, guide=guide | {"held": ["nothing"]})
    with pytest.raises(ValueError, match=r"the guide's sites \['nothing'\]; expect"):
        lrvd.load(path, base)
    arguments = guide["arguments"] | {"learn_mean": "no"}
    lrvd_config(path, guide=guide | {"arguments": arguments})
    with pytest.raises(ValueError, match="has learn_mean='no'; expected true or false"):
        lrvd.load(path, base)


def test_tensors_are_finite(tmp_path: Path) -> None:
    path, base, _ = folder(tmp_path / "run")
    file = path / "lrvd_posterior.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * math.nan}, file)
    seal(path)
    with pytest.raises(ValueError, match=rf"{name} has NaN or infinity, expected fin"):
        lrvd.load(path, base)


def test_a_task_of_other_networks_is_refused(tmp_path: Path) -> None:
    path, base, _ = folder(tmp_path / "run")
    before = damaged.state_of(base)
    adapter_config(path, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="put the saved adapter on a Perceptron"):
        lrvd.load(path, base)
    assert damaged.state_of(base) == before


def test_replicated_layers_have_names_and_a_bound(tmp_path: Path) -> None:
    path, base, _ = folder(tmp_path / "run")
    lrvd_config(path, modules=["hidden", "(a+)+$"], layer_replication=[[0, 2]])
    with pytest.raises(ValueError, match=r"modules is '\(a\+\)\+\$'; expected names"):
        lrvd.load(path, base)
    lrvd_config(path, modules=["hidden", "out"], layer_replication=[[0, 2]] * 1000)
    with pytest.raises(ValueError, match="replication is .*; expected 1000 layers"):
        lrvd.load(path, base)
