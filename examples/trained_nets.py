"""The trained networks of a `small_task`, made once and kept in a folder."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from pyro.infer import SVI
from small_task import BATCH, LR, Task, logits, train_lora
from torch.nn import functional as F

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import evidence
from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.priors import LogUniform

FACTOR_RATE, FACTOR_KL = 0.2, 0.1  # of log variances; the KL weight after its rise
Pair = tuple[Any, Any]


def lora(task: Task, folder: Path, *, stopped: bool = False) -> PeftModel:
    """Plain LoRA after the last epoch, or after that of least NLL on dev."""
    last, best = (task.path(folder, name) for name in ("lora", "stopped"))
    if not last.exists():  # it is written last
        net, least = task.net(), [float("inf")]

        def keep_the_best() -> None:
            nll = float(F.cross_entropy(logits(net, task.dev), task.dev.labels))
            if nll < least[0]:
                least[0] = nll
                net.save_pretrained(str(best))

        train_lora(task, net, each_epoch=keep_the_best)
        net.save_pretrained(str(last))
    path = str(best if stopped else last)
    return PeftModel.from_pretrained(task.base(), path).eval()


def gate_lora(task: Task, folder: Path, *, estimated: bool = False) -> Pair:
    """GateLoRA at the true ELBO, or at the multiplicity of the evidence.

    The multiplicity is then gamma_loo / R, estimated after each epoch but the last.
    """
    path = task.path(folder, "gate-estimated" if estimated else "gate")
    if not path.exists():
        prior = LogUniform()
        model = GateLoRA(task.net(), prior=prior, num_data=len(task.train))
        guide = RankDiagonal(model)

        def estimate() -> None:
            with suppress(ValueError):  # the first epochs may have learned nothing
                found = evidence(model, guide, task.train.grouped(BATCH))
                prior.multiplicity = found.gamma_loo / model.space.size

        between = estimate if estimated else None
        _train(task, model, guide, lrvd.RankELBO(), 0.05, path, between)
    return lrvd.load(path, task.base())


def factor_lora(task: Task, folder: Path) -> Pair:
    """FactorLoRA on both sides, under a KL weight that rises over half of training."""
    path = task.path(folder, "factor")
    if not path.exists():
        sides: Any = ("lora_A", "lora_B")
        model = FactorLoRA(task.net(), num_data=len(task.train), sides=sides)
        rise = lrvd.linear_warmup(task.steps // 2)
        loss = lrvd.RankELBO(kl_weight=lambda step: FACTOR_KL * rise(step))
        _train(task, model, TiedDiagonal(model), loss, FACTOR_RATE, path)
    return lrvd.load(path, task.base())


def _train(
    task: Task,
    model: Any,
    guide: Any,
    loss: lrvd.RankELBO,
    rate: float,
    path: Path,
    between: Callable[[], None] | None = None,
) -> None:
    optim = lrvd.optim.AdamW(lr=LR, variational_lr=rate, schedule=task.decay)
    svi = SVI(model, guide, optim, loss=loss)
    for epoch, batches in enumerate(task.epochs(model.base_net)):
        if epoch and between:
            between()
        for batch in batches:
            svi.step(**batch)
    lrvd.save(path, model, guide)
    model.release()
    guide.release()
