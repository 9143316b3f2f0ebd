"""A Bayesian step and a predictive on a GPU, in units of plain LoRA.

A random Llama-like classifier (1B: 16 layers of width 2048; 7B: 32 of 4096) in
bfloat16 autocast, LoRA of rank 16 on q, k, v, o and the MLP, 4 texts of 512 tokens,
with torch.compile on and off and gradient checkpointing on and off. "step" is forward,
backward and fused AdamW; "memory" what a step allocates at its peak; "predict" 8
posterior samples, per sample, over one forward pass. LoRA and GateLoRA take turns in
one process, on twin networks; medians. Without a GPU it says so and ends.

    PYTHONPATH=examples python examples/benchmarks/gpu.py
    PYTHONPATH=examples python examples/benchmarks/gpu.py --check

The first appends a line per setting, with the card's name, to results/gpu.jsonl. The
second compares loss and gradients of a tiny Llama, for both drivers: bfloat16 autocast
and torch.compile with float32 on the CPU, and where there is a GPU, that with the CPU.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import peft
import pyro
import torch
from benchmarks.measuring import append
from benchmarks.step_time import LR, Batch, Step
from pyro.infer import SVI
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.optim import AdamW, parameter_groups

SIZES = {  # width, layers, heads, key and value heads, width of the MLP, vocabulary
    "tiny": (32, 2, 4, 2, 64, 100),
    "1B": (2048, 16, 32, 8, 8192, 32000),
    "7B": (4096, 32, 32, 32, 11008, 32000),
}
TARGETS = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
SAMPLES, ROUNDS = 8, 15
RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"


def llama(size: str, device: str, dtype: torch.dtype) -> Any:
    """A random network with LoRA, in train mode, always of the same weights."""
    width, layers, heads, shared, inner, words = SIZES[size]
    sizes: dict[str, Any] = {"vocab_size": words, "hidden_size": width}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": shared, "intermediate_size": inner}
    sizes |= {"pad_token_id": 0, "num_labels": 2, "use_cache": False}
    config = LlamaConfig(**sizes)
    torch.manual_seed(0)
    with torch.device("cpu" if size == "tiny" else device):
        base: Any = LlamaForSequenceClassification(config)
    options = peft.LoraConfig(r=16, target_modules=TARGETS, task_type="SEQ_CLS")
    net = peft.get_peft_model(base.to(dtype), options)
    for name, p in net.named_parameters():
        if p.requires_grad:
            p.data = p.data.float()
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
    return net.to(device).train()


def batch_of(size: int, length: int, words: int, device: str) -> Batch:
    """Random tokens and labels, without padding."""
    torch.manual_seed(1)
    batch = {
        "input_ids": torch.randint(1, words, (size, length)),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
        "labels": torch.randint(0, 2, (size,)),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def half(device: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16."""
    return torch.autocast(device, dtype=torch.bfloat16)


def trained(net: Any) -> list[Tensor]:
    """The parameters that train."""
    return [p for p in net.parameters() if p.requires_grad]


def stepping(loss: Callable[[], Tensor], optim: torch.optim.Optimizer) -> Step:
    """One step in bfloat16."""

    def step() -> None:
        with half("cuda"):
            value = loss()
        value.backward()
        optim.step()
        optim.zero_grad()

    return step


def seconds_of(run: Step) -> float:
    """Of one call, by the device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def ratio(run: Step, base: Step) -> tuple[float, float]:
    """Median of the paired ratios of time, and the seconds of ``base``."""
    for _ in range(3):
        base()
        run()
    pairs = [(seconds_of(base), seconds_of(run)) for _ in range(ROUNDS)]
    return median(t / one for one, t in pairs), median(one for one, _ in pairs)


def peak(run: Step) -> int:
    """Bytes allocated at most while it runs, beyond those allocated before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def adapted(size: str, *, checkpointed: bool) -> Any:
    """A Llama with LoRA in bf16 on the card."""
    net = llama(size, "cuda", torch.bfloat16)
    if checkpointed:
        options = {"use_reentrant": False}
        net.get_base_model().gradient_checkpointing_enable(options)
    return net


def measure(size: str, *, compiled: bool, checkpointed: bool) -> dict[str, Any]:
    """One line: GateLoRA against LoRA on a twin of its network."""
    torch._dynamo.reset()
    bare, net = (adapted(size, checkpointed=checkpointed) for _ in range(2))
    batch = batch_of(4, 512, SIZES[size][-1], "cuda")
    model = GateLoRA(net, num_data=1000)
    guide = RankDiagonal(model)
    if compiled:
        bare.compile()
        net.compile()
    elbo = lrvd.RankELBO()(model, guide)
    fused: dict[str, Any] = {"weight_decay": 0.0, "fused": True}
    plain = torch.optim.AdamW(trained(bare), lr=LR, **fused)
    gated = torch.optim.AdamW(parameter_groups(model, guide, lr=LR), **fused)
    lora = stepping(lambda: bare(**batch).loss, plain)
    gate = stepping(lambda: elbo(**batch), gated)
    step, seconds = ratio(gate, lora)
    line = {"size": size, "compile": compiled, "checkpointing": checkpointed}
    line |= {"step": step, "A/A": ratio(lora, lora)[0], "lora_seconds": seconds}
    line["memory"] = peak(gate) / peak(lora)
    return line | {"predict": predict_ratio(net.eval(), model, guide, batch)}


def predict_ratio(net: Any, model: GateLoRA, guide: RankDiagonal, b: Batch) -> float:
    """Seconds of a posterior sample over those of a forward pass."""
    inputs = {name: tensor for name, tensor in b.items() if name != "labels"}

    def forward() -> None:
        with torch.no_grad(), half("cuda"):
            net(**inputs)

    def predict() -> None:
        with half("cuda"):
            lrvd.predict(model, guide, [inputs], SAMPLES)

    return ratio(predict, forward)[0] / SAMPLES


def on_cpu(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal noise that is the same on every device."""
    return torch.randn(shape, dtype=dtype).to(device)


def gradients(
    driver: str, device: str, *, bf16: bool = False, compiled: bool = False
) -> list[Tensor]:
    """Loss and gradients of a tiny Llama at a fixed draw."""
    torch._dynamo.reset()
    model = GateLoRA(llama("tiny", device, torch.float32), num_data=20)
    guide, elbo = RankDiagonal(model), lrvd.RankELBO()
    if compiled:
        model.base_net.compile(backend="eager" if device == "cpu" else "inductor")
    batch = batch_of(4, 8, SIZES["tiny"][-1], device)
    parameters = trained(torch.nn.ModuleList([model, guide]))
    torch.manual_seed(2)
    with (
        patch("torch.distributions.normal._standard_normal", on_cpu),
        half(device) if bf16 else nullcontext(),
    ):
        if driver == "SVI":
            svi = SVI(model, guide, AdamW(), loss=elbo)
            value = torch.tensor(svi.loss_and_grads(model, guide, **batch))
        else:
            value = elbo(model, guide)(**batch)
            value.backward()
    found = [value.detach(), *(p.grad for p in parameters if p.grad is not None)]
    pyro.clear_param_store()
    return [tensor.double().cpu() for tensor in found]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of a tensor, by norms; inf if one is lacking."""
    if len(found) != len(expected):
        return float("inf")
    pairs = zip(found, expected, strict=True)
    errors = [float((f - e).norm() / e.norm().clamp(min=1e-12)) for f, e in pairs]
    return float("inf") if any(x != x for x in errors) else max(errors)


def check() -> bool:
    """Print how far each way is from float32 on the CPU; whether all are near."""
    ways: dict[str, tuple[str, dict[str, bool], float]] = {
        "CPU, compiled": ("cpu", {"compiled": True}, 1e-4),
        "CPU, bfloat16": ("cpu", {"bf16": True}, 0.1),
    }
    if torch.cuda.is_available():
        ways["GPU"] = "cuda", {}, 1e-3
        ways["GPU, compiled"] = "cuda", {"compiled": True}, 1e-3
        ways["GPU, bfloat16"] = "cuda", {"bf16": True}, 0.1
    expected = gradients("torch", "cpu")
    good = True
    for driver in ("SVI", "torch"):
        ways |= {"CPU": ("cpu", {}, 1e-5)}
        for way, (device, options, limit) in ways.items():
            off = error(gradients(driver, device, **options), expected)
            good &= off <= limit
            verdict = "ok" if off <= limit else "TOO FAR"
            print(f"{driver} driver, {way}: off by {off:.1e} of {limit:.0e}, {verdict}")
    return good


def table(lines: list[dict[str, Any]]) -> str:
    """The lines of one run."""
    columns = ["size", "compile", "checkpointing"]
    figures = ["step", "A/A", "memory", "predict"]
    text = ["| " + " | ".join(columns + figures) + " |", "|---" * 7 + "|"]
    for line in lines:
        cells = [str(line[c]) for c in columns] + [f"{line[f]:.3f}" for f in figures]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, or the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare gradients only")
    parser.add_argument("--sizes", nargs="+", default=["1B", "7B"], choices=SIZES)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON lines file")
    options = parser.parse_args(argv)
    pyro.enable_validation(False)
    if options.check:
        sys.exit(not check())
    if not torch.cuda.is_available():
        print("no GPU here, nothing measured; --check runs anywhere")
        return
    lines = []
    for size, compiled, kept in itertools.product(options.sizes, *[(False, True)] * 2):
        try:
            lines.append(measure(size, compiled=compiled, checkpointed=kept))
        except torch.cuda.OutOfMemoryError:
            print(f"{size} with compile={compiled}, checkpointing={kept} does not fit")
        pyro.clear_param_store()
    card = {"card": torch.cuda.get_device_name()}
    command = f"gpu.py --sizes {' '.join(options.sizes)}"
    append([line | card for line in lines], options.out, command)
    print(f"{card['card']}\n{table(lines)}")


if __name__ == "__main__":
    main()
