"""Which basis of rank space a posterior prefers, and who finds it: a linear teacher.

``y = W x + noise`` with W of rank 4, inputs and noise anisotropic; a LoRA of rank 12
learns W from 1,000 examples. Theory says that a diagonal posterior over the gates has
its optimum in the singular vectors of ``H^1/2 dW S^1/2`` (S: second moments of the
inputs, H: precision of the noise), and that one over the whole 12 x 12 core has none.

    python examples/gauge.py --out examples/results

prints, for each way to train, over seeds: how well the four true components align with
those singular vectors and with those of dW itself (1: all of them, both sides); how far
the objective lies below that of training alone, in nats, where the prior is the same;
and log alpha of the four least noisy components and of the rest.

The other eight fit the noise of the examples. Whitened, that noise is a matrix of unit
entries, whose largest singular value is about ``sqrt(24) + sqrt(16)``; A and B are
points, so what the data say of it is taken at its word, and ``t^2`` goes up to the
square of that. Against a penalty of weight w per log of t, a component of size t in the
data keeps a size above 0 if ``w < t^2 / 4``: hence the multiplicity of 20, which no
noise passes and every true component does.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyro
import torch
from peft import LoraConfig, get_peft_model
from pyro import distributions as dist
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import LambdaLR  # type: ignore[attr-defined]
from torch import Tensor, nn
from tqdm import tqdm

import lrvd_pyro as lrvd
from lrvd_pyro.gauge import BalanceSchedule
from lrvd_pyro.guides import RankDiagonal, multivariate_normal
from lrvd_pyro.likelihoods.base import data_plate
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.priors.log_uniform import LogUniform

INPUTS, OUTPUTS, RANK, R, EXAMPLES = 24, 16, 4, 12, 1000
STEPS, LR, EVERY = 3000, 1e-2, 200
# Beyond a quarter of the largest t^2 that pure noise reaches, no noise keeps a rank.
EDGE = (INPUTS**0.5 + OUTPUTS**0.5) ** 2 / 4


class Teacher:
    """Data, and the whitening that goes with them."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        spread = torch.logspace(0.5, -0.5, INPUTS)[torch.randperm(INPUTS)]
        turn = torch.linalg.qr(torch.randn(INPUTS, INPUTS))[0]
        self.scale = torch.logspace(-0.5, 0.5, OUTPUTS)[torch.randperm(OUTPUTS)]
        self.x = (torch.randn(EXAMPLES, INPUTS) * spread) @ turn.T
        left = torch.linalg.qr(torch.randn(OUTPUTS, RANK))[0]
        right = torch.linalg.qr(torch.randn(INPUTS, RANK))[0]
        sizes = torch.tensor([2.0, 1.5, 1.0, 0.75])
        noise = torch.randn(EXAMPLES, OUTPUTS) * self.scale
        self.y = self.x @ right @ (left * sizes).T + noise
        moments = self.x.T @ self.x / EXAMPLES
        values, vectors = torch.linalg.eigh(moments)
        self.root_inputs = (vectors * values.sqrt()) @ vectors.T
        self.root_outputs = (1 / self.scale).diag()

    def net(self) -> Any:
        """A linear layer of zeros with a LoRA of rank 12."""
        base = Linear()
        config = LoraConfig(r=R, lora_alpha=R, target_modules=["layer"])
        return get_peft_model(base, config)

    def alignment(self, a: Tensor, b: Tensor, *, whitened: bool) -> float:
        """Mean over the true components of the best match of any ``b_i a_i^T``."""
        if whitened:
            a, b = a @ self.root_inputs, self.root_outputs @ b
        left, _, right = torch.linalg.svd(b @ a)
        match = nn.functional.normalize(b, dim=0).T @ left[:, :RANK]
        match = match * (nn.functional.normalize(a, dim=1) @ right[:RANK].T)
        return float(match.abs().max(0).values.mean())


class KnownNoise:
    """Gaussian noise of known scales, one for each output."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, outputs: Tensor, labels: Tensor | None, num_data: int) -> None:
        with data_plate(len(outputs), labels, num_data):
            pyro.sample(
                "labels", dist.Normal(outputs, self.scale).to_event(1), obs=labels
            )

    def summarize(self, outputs: Tensor) -> dict[str, Tensor]:
        """The mean output."""
        return {"mean": outputs.mean(0)}

    def collect(self, fields: dict[str, Tensor]) -> Tensor:
        """The mean outputs for all data."""
        return fields["mean"]


class Linear(nn.Module):
    """y = W x, W = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, OUTPUTS, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Trained(NamedTuple):
    """Where training ended."""

    a: Tensor
    b: Tensor
    objective: float
    log_alpha: Tensor


def decay(step: int) -> float:
    """Learning rates fall to zero over the last half."""
    return min(1.0, 2 * (1 - step / STEPS))


def gates(
    teacher: Teacher,
    guide_of: Callable[..., Any] = RankDiagonal,
    *,
    multiplicity: float = 1.0,
    balanced: bool = False,
) -> Trained:
    """GateLoRA under a guide of its gates."""
    prior: Any = LogUniform(multiplicity)
    likelihood = KnownNoise(teacher.scale)
    model = GateLoRA(
        teacher.net(), prior=prior, likelihood=likelihood, num_data=EXAMPLES
    )
    guide = guide_of(model)
    optim = lrvd.optim.AdamW(lr=LR, schedule=decay)
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO())
    if balanced:
        counts = {"every": EVERY, "gather_every": EVERY // 10}
        schedule = BalanceSchedule(model, guide, optim, **counts)
    losses = []
    for _ in tqdm(range(STEPS), leave=False):
        losses.append(svi.step(x=teacher.x, labels=teacher.y))
        if balanced:
            schedule.step()
    with torch.no_grad():
        draws = torch.stack([guide()["gate"] for _ in range(2000)])
    alpha = draws.var(0) / draws.mean(0).square()
    (a,), (b,) = (model.space.weights(side) for side in ("lora_A", "lora_B"))
    return Trained(a.detach(), b.detach(), mean_of_last(losses), alpha.log())


def core(teacher: Teacher) -> Trained:
    """A Gaussian of any covariance over the 12 x 12 core, its mean at I.

    Its prior is N(0, gamma) with gamma learned, so that rotations of the basis change
    neither family nor prior.
    """
    net = teacher.net().base_model.model.layer
    a, b = net.lora_A["default"].weight, net.lora_B["default"].weight
    middle = torch.eye(R).flatten()

    def model() -> None:
        pyro.param("a", a)
        pyro.param("b", b)
        gamma = pyro.param("log_gamma", torch.zeros(())).exp()
        spread = gamma.sqrt() * torch.eye(R * R)
        prior = dist.MultivariateNormal(torch.zeros(R * R), scale_tril=spread)
        c = pyro.sample("core", prior).view(R, R)
        KnownNoise(teacher.scale)(teacher.x @ (b @ c @ a).T, teacher.y, EXAMPLES)

    def guide() -> None:
        scale = pyro.param("log_scale", torch.full((R * R,), -2.0)).exp()
        lower = pyro.param("lower", torch.zeros(R * R, R * R)).tril(-1)
        noise = scale[:, None] * (lower + torch.eye(R * R))
        pyro.sample("core", dist.MultivariateNormal(middle, scale_tril=noise))

    optim: Any = LambdaLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": LR}, "lr_lambda": decay}
    )
    svi = SVI(model, guide, optim, loss=TraceMeanField_ELBO())
    losses = []
    for _ in tqdm(range(STEPS), leave=False):
        losses.append(svi.step())
        optim.step()
    noise = pyro.param("log_scale").exp()[:, None]
    noise = noise * (pyro.param("lower").tril(-1) + torch.eye(R * R))
    alpha = (noise @ noise.T).diagonal().view(R, R).diagonal()
    objective = mean_of_last(losses)
    return Trained(a.detach(), b.detach(), objective, alpha.detach().log())


def mean_of_last(losses: list[float]) -> float:
    """The mean loss of the last tenth."""
    last = torch.tensor(losses[-max(1, STEPS // 10) :])
    return float(last.mean())


METHODS: dict[str, Callable[[Teacher], Trained]] = {
    "training alone": gates,
    "balanced": partial(gates, balanced=True),
    f"balanced, multiplicity {EDGE:.0f}": partial(
        gates, balanced=True, multiplicity=EDGE
    ),
    "covariance over the gates": partial(gates, guide_of=multivariate_normal),
    "covariance over the core": core,
}
COMPARABLE = ("training alone", "balanced", "covariance over the gates")


def rows(seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each seed and method."""
    for seed in range(seeds):
        teacher, alone = Teacher(seed), None
        for name, train in METHODS.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            found = train(teacher)
            best = found.log_alpha.sort().values
            alone = found.objective if alone is None else alone
            comparable = name in COMPARABLE
            yield {
                "": name,
                "alignment": teacher.alignment(found.a, found.b, whitened=True),
                "with dW itself": teacher.alignment(found.a, found.b, whitened=False),
                "nats gained": alone - found.objective if comparable else None,
                "true: largest log α": float(best[RANK - 1]),
                "others: least log α": float(best[RANK]),
                "others: largest log α": float(best[-1]),
            }


def table(frame: pd.DataFrame) -> str:
    """Mean and standard deviation over seeds, in markdown."""
    groups = frame.groupby("", sort=False)
    mean, sd = groups.mean(), groups.std()
    lines = ["| | " + " | ".join(mean.columns) + " |", "|---" * 7 + "|"]
    for name in mean.index:
        pairs = zip(mean.loc[name], sd.loc[name], strict=True)
        cells = ["" if pd.isna(m) else f"{m:.2f} ± {s:.2f}" for m, s in pairs]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run every method on every seed; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many; 5")
    parser.add_argument("--out", type=Path, help="a folder for gauge.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    text = f"{table(pd.DataFrame(rows(options.seeds)))}\n"
    print(text)
    if options.out:
        (options.out / "gauge.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
