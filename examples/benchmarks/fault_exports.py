"""`export_peft` under hostile state: no file goes in, so the run itself is spoiled.

Each mutation changes a run, its target or its probe, and says how. An export that is
accepted is loaded by plain PEFT onto a fresh base, and its logits are compared with the
mean adapter's. After an error, run and target must be as they were.
"""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from benchmarks import fault_runs as runs
from benchmarks.fault_trials import Bench, Outcome, labeled, shown
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import lrvd_pyro as lrvd

NOBODY = 65534
NUMBERS = (float("nan"), float("inf"), -float("inf"))


class Call(NamedTuple):
    """The arguments of an export, to be spoiled."""

    name: str
    run: runs.Run
    path: Path
    options: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Of model and guide, with those of the base."""
        both = [("model", self.run["model"]), ("guide", self.run["guide"])]
        return {
            f"{root}.{name}": tensor
            for root, module in both
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }


# Spoils a call; gives words, and what an error must name besides the target.
Spoiling = Callable[[Call, Random], tuple[str, str]]


def _tensor(call: Call, rng: Random, part: str) -> tuple[str, Tensor]:
    buffers = {n for n, _ in call.run["model"].named_buffers(prefix="model")}
    kinds: dict[str, Callable[[str], bool]] = {
        "weights": lambda n: "lora_" in n,
        "guide": lambda n: n.startswith("guide"),
        "base": lambda n: n.startswith("model.net") and "lora_" not in n,
        "buffers": lambda n: n in buffers,
    }
    usable = {n: t for n, t in call.tensors.items() if t.is_floating_point()}
    # A BERT has no buffers of real numbers.
    found = {n: t for n, t in usable.items() if kinds[part](n)} or usable
    name = rng.choice(sorted(found))
    return name, found[name]


def not_finite(part: str) -> Spoiling:
    """NaN or inf in one of the tensors."""

    def spoil(call: Call, rng: Random) -> tuple[str, str]:
        name, tensor = _tensor(call, rng, part)
        number = rng.choice(NUMBERS)
        tensor.data.reshape(-1)[rng.randrange(tensor.numel())] = number
        return f"{name} has {number}", name

    return spoil


def scaling(call: Call, rng: Random) -> tuple[str, str]:
    """Another scaling in a layer, NaN among them."""
    space = call.run["model"].space
    module, layer = rng.choice([*zip(space.modules, space.layers)])
    number = rng.choice([*NUMBERS, 0.0, -3.0, 1e30])
    layer.scaling[space.adapter] = number
    return f"scaling {number} of {module}", module


def adapter(call: Call, rng: Random) -> tuple[str, str]:
    """An adapter that is merged, disabled, deleted or has company."""
    net = call.run["model"].base_net
    way = rng.choice(["merged", "disabled", "deleted", "another"])
    if way == "merged":
        net.merge_adapter()
    elif way == "disabled":
        net.base_model.disable_adapter_layers()
    elif way == "deleted":
        net.delete_adapter("default")
    else:
        net.add_adapter("another", net.peft_config["default"])
        net.set_adapter("another")
    return way, "adapter"


def probe(call: Call, rng: Random) -> tuple[str, str]:
    """A probe that does not fit."""
    good = runs.batch(call.name)
    first = next(iter(good))
    probes: list[Any] = [{}, {"surprise": good[first]}, {first: None}, "text", 5, []]
    probes += [{first: good[first][:0]}, {first: good[first][0, 0]}]
    probes += [{first: good[first].float() * number} for number in NUMBERS]
    probes += [{first: good[first][:, :2].double()}, {first: good[first], "x2": 1}]
    call.options["probe"] = chosen = rng.choice(probes)
    return f"probe {ascii(chosen)[:40]}", "batch"


def mode(call: Call, rng: Random) -> tuple[str, str]:
    """Another mode."""
    chosen = rng.choice(["", "Pruned", None, 5, ["pruned"], "../x", "merged"])
    call.options["mode"] = chosen
    return f"mode {chosen!r}", "mode"


def taken(call: Call, rng: Random) -> tuple[str, str]:
    """A target that is a file, or holds something, or cannot be."""
    way = rng.choice(["a file", "not empty", "in a file", "a link to itself", "long"])
    if way == "a file":
        call.path.write_text("mine")
    elif way == "not empty":
        call.path.mkdir()
        (call.path / "mine").write_text("mine")
    elif way == "a link to itself":
        call.path.symlink_to(call.path)
    else:
        (call.path.parent / "file").write_text("mine")
        inner = "file/inner" if way == "in a file" else "x" * 300
        call.options["path"] = call.path.parent / inner
    return way, "file"


def read_only(call: Call, rng: Random) -> tuple[str, str]:
    """A folder in which nothing may be written."""
    os.chmod(call.path.parent, 0o555)
    if os.geteuid() == 0:  # for whom no folder is read-only
        os.seteuid(NOBODY)
    return "read-only", call.path.name


def full_disk(call: Call, rng: Random) -> tuple[str, str]:
    """A disk that takes some bytes of each file and then no more."""
    limit = rng.choice([0, 1, 100, rng.randrange(3000)])
    fill(limit)
    return f"{limit} bytes", call.path.name


def fill(limit: int) -> None:
    """Let no file of this process grow beyond some bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


EXPORT: dict[str, Spoiling] = {
    **{f"NaN, inf in {p}": not_finite(p) for p in ("weights", "guide", "base")},
    "NaN, inf in buffers": not_finite("buffers"),
    "scaling": scaling,
    "adapter": adapter,
    "probe": probe,
    "mode": mode,
    "target taken": taken,
    "target read-only": read_only,
    "disk full": full_disk,
}
# Here the adapter itself is another one than before.
OWN_STATE = {"NaN, inf in weights", "NaN, inf in guide", "scaling", "adapter"}


def listing(folder: Path) -> dict[str, str]:
    """The files below a folder, and what is in them."""
    return {
        str(p.relative_to(folder)): p.read_bytes().hex() if p.is_file() else ""
        for p in folder.rglob("*")
    }


def judged(call: Call, kind: str, rng: Random) -> tuple[str, str]:
    """Spoil a call and make it; the class of what came of it."""
    told, name = EXPORT[kind](call, rng)
    model, guide = call.run["model"], call.run["guide"]
    options = {"path": call.path, "model": model, "guide": guide, **call.options}
    home = call.path.parent

    def state() -> dict[str, str]:
        return runs.bits([runs.state_of(call.run), listing(home)])

    before = state()
    try:
        lrvd.export_peft(**options)
    except BaseException as error:
        after = state()
        if changed := [k for k in before | after if before.get(k) != after.get(k)]:
            return "state changed", f"{told} -> {shown(error)} | {changed[:3]}"
        last = [p for p in name.split(".") if p not in ("default", "weight")][-2:]
        names = {call.path.name, options["path"].name, ".".join(last)}
        names |= {"finite", "probe"}
        return labeled(error, names), f"{told} -> {shown(error)}"
    label, words = _accepted(call, options["path"], kind)
    return label, f"{told} -> {words}"


def _accepted(call: Call, path: Path, kind: str) -> tuple[str, str]:
    """The class of an export that was accepted."""
    merged = not (path / "adapter_config.json").exists()
    tensors = load_file(path / f"{'' if merged else 'adapter_'}model.safetensors")
    if unsound := [n for n, t in tensors.items() if not t.isfinite().all()]:
        return "silently wrong", f"not finite: {unsound[:3]}"
    if kind not in OWN_STATE and not merged:
        right = _untouched(call.name, path.parent / "untouched")
        return ("same" if right == runs.bits(tensors) else "silently wrong"), "by file"
    try:
        close = _agrees(call, path)
    except RuntimeError as error:
        return "silently wrong", f"exported, but {shown(error)}"
    return ("same" if close else "silently wrong"), "by logits"


def _agrees(call: Call, path: Path) -> bool:
    """Whether plain PEFT gives the mean adapter's logits."""
    inputs = {k: v for k, v in runs.batch(call.name).items() if k != "labels"}
    base: Any = runs.base(call.name)
    if call.options.get("mode") == "merged":
        loaded = type(base).from_pretrained(path).eval()
    else:
        loaded = PeftModel.from_pretrained(base, path).eval()
    model, guide = call.run["model"].eval(), call.run["guide"]
    with torch.no_grad(), lrvd.posterior_mean(model, guide):
        expected = model.predictions(**inputs)
    with torch.no_grad():
        output = loaded(**inputs)
    logits = getattr(output, "logits", output)
    return torch.allclose(logits, expected.to(logits.dtype), rtol=1e-4, atol=1e-5)


def _untouched(name: str, path: Path) -> dict[str, str]:
    """The tensors of an export that nothing spoiled."""
    run = runs.trained(name, 1)
    lrvd.export_peft(path, run["model"], run["guide"])
    return runs.bits(load_file(path / "adapter_model.safetensors"))


def trial(bench: Bench, kind: str, rng: Random) -> Outcome:
    """Export under one hostile state."""
    name = rng.choice(bench.names)
    home = bench.folder / "export"
    if home.exists():
        home.chmod(0o755)
        shutil.rmtree(home)
    home.mkdir()
    given = {"probe": runs.batch(name)} if rng.random() < 0.5 else {}
    call = Call(name, runs.reference(name), home / "adapter", given)
    label, told = bench.run(lambda: judged(call, kind, rng))
    return Outcome("export", kind, label, f"{name}: {told}")


def trials(bench: Bench, count: int, seed: int) -> list[Outcome]:
    """As many trials, the kinds in turn."""
    rng, kinds = Random(f"export {seed}"), [*EXPORT]
    found = []
    for number in range(count):
        found.append(trial(bench, kinds[number % len(kinds)], Random(rng.random())))
    return found
