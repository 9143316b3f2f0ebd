"""What the models of this package have in common."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from numbers import Integral
from typing import Any, ClassVar, NamedTuple, cast

import pyro
import torch
from peft import PeftModel
from pyro import poutine
from pyro.params.param_store import param_with_module_name
from torch import Tensor
from torch.distributions import Distribution

from lrvd_pyro._compat.pyro import mcmc_is_running, name_of, plain_child
from lrvd_pyro.batches import batch_size
from lrvd_pyro.inference import mcmc
from lrvd_pyro.inference.kl import latent_sites, scaled_log_prob
from lrvd_pyro.inference.param_store import UniqueModule, check_registered
from lrvd_pyro.inference.per_example import drawn_per_example
from lrvd_pyro.likelihoods.base import Likelihood, check_likelihood
from lrvd_pyro.rank_space.space import RankSpace

SiteLabels = tuple[str, dict[str, list[Any]]]


class Factors(NamedTuple):
    """A LoRA module as ``scaling * lora_B diag(gate) lora_A``.

    Attributes:
        lora_A: ``r x in``, or as the layer has it.
        lora_B: ``out x r``.
        gate: r.
    """

    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor


class RankModel(UniqueModule):
    """A PEFT network whose adapter is drawn before each forward pass.

    Called with the batch as keyword arguments, as the network itself; ``labels`` are
    observed if given. Returns the network's predictions.

    A subclass gives three methods: `draw`, the Pyro statements; `bind`, which puts what
    was drawn into the forward pass; and `factors`, the adapter that this amounts to.
    Prediction, storage, export and ArviZ work by them. A subclass sets ``prior``, and
    an attribute for each further argument of its constructor, by which `save` keeps it.

    Args:
        space: The rank space of the adapter.
        likelihood: Of labels given the network's predictions.
        num_data: The number of training examples N.

    Attributes:
        binds: What one draw is, in a word. "gates" are one number per rank component,
            of which a pass may take one row per example.

    Raises:
        TypeError: If the likelihood lacks a method, or a subclass a method.
    """

    prior: Any
    binds: ClassVar[str]

    def __init__(self, space: RankSpace, likelihood: Likelihood, num_data: int) -> None:
        check_likelihood(likelihood)
        super().__init__()
        self.net = space.net
        self.space = space
        self.likelihood = likelihood
        self.num_data = num_data

    @abstractmethod
    def draw(self) -> Tensor:
        """The Pyro statements of the prior; returns what `bind` takes."""

    @abstractmethod
    def bind(self, value: Tensor) -> AbstractContextManager[None]:
        """Let the forward passes within the block use ``value``."""

    @abstractmethod
    def factors(self, value: Tensor) -> dict[str, Factors]:
        """For each LoRA module what it computes by while ``value`` (one draw) is bound.

        Names are those of ``space.modules``.
        """

    def site_labels(self, site: str) -> SiteLabels | None:
        """How ArviZ calls the components of a latent site; None leaves it to their number.

        Returns:
            The dimension, and the coordinates along it by name.
        """
        return None

    def latent_sites(self) -> dict[str, Distribution]:
        """The prior distribution of each latent site, from one run."""
        with torch.random.fork_rng(), poutine.block(), poutine.trace() as run:
            self.draw()
        return {name: site["fn"] for name, site in latent_sites(run.trace).items()}

    def start(self) -> dict[str, Tensor]:
        """Where guides start each latent site: at the prior's ``start``, else at 1."""
        known = getattr(self.prior, "start", {})
        device = self.space.device
        return {
            name: torch.full(fn.event_shape, known.get(name, 1.0), device=device)
            for name, fn in self.latent_sites().items()
        }

    def value_at(self, latents: Mapping[str, Tensor]) -> Tensor:
        """What the model binds when its latent sites have the given values.

        Raises:
            ValueError: If a latent site has no value.
        """
        with poutine.block(), poutine.trace() as run:
            with poutine.condition(data=dict(latents)):
                value: Tensor = self.draw()
        if missing := latent_sites(run.trace):
            raise ValueError(
                f"no draws of the latent sites {sorted(missing)}, only of "
                f"{sorted(latents)}; every latent site of the model needs a value"
            )
        return value

    def log_prior(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The log prior density of values of the latent sites, in nats."""
        with poutine.block(), poutine.trace() as run:
            with poutine.condition(data=dict(latents)):
                self.draw()
        sites = [run.trace.nodes[name] for name in latents]
        return torch.stack([scaled_log_prob(site) for site in sites]).sum()

    def forward(self, *, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        """Draw the adapter, run the network, observe (or draw) the labels."""
        if labels is not None and not isinstance(labels, Tensor):
            raise TypeError(
                f"labels are a {type(labels).__name__}; expected a tensor with one "
                f"entry per example: torch.as_tensor(labels)"
            )
        size = batch_size({"labels": labels, **inputs})
        if mcmc_is_running():
            observed = 0 if labels is None else size
            mcmc.check(self.base_net, observed, self.num_data)
        self._register_parameters()
        value = self.draw()
        if value.dim() > 1 and not drawn_per_example():
            raise ValueError(
                f"the adapter was drawn with shape {tuple(value.shape)}, several draws "
                f"at once; use Predictive(parallel=False) or lrvd_pyro.predict"
            )
        with self.bind(value):
            predictions = self.predictions(**inputs)
        self.likelihood(predictions, labels, self.num_data)
        return predictions

    def predictions(self, **inputs: Any) -> Tensor:
        """The network's logits for whatever is bound at present.

        Raises:
            TypeError: If the network returns no tensor, nor something with logits.
        """
        output = self.base_net(**inputs)
        self.space.check_fired()
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the network returned a {type(output).__name__}; expected a tensor or "
                f"an output with logits: net(**batch, return_dict=True), or a head"
            )
        return logits

    @property
    def base_net(self) -> PeftModel:
        """The network, read without telling Pyro."""
        return cast(PeftModel, plain_child(self, "net"))

    def _register_parameters(self) -> None:
        """Show Pyro the trainable parameters, and only them."""
        if pyro.settings.get("module_local_params"):
            return
        for name, parameter in self.base_net.named_parameters():
            if parameter.requires_grad:
                path = param_with_module_name(f"{name_of(self)}.net", name)
                pyro.param(path, parameter)
                check_registered(path, parameter)


def check_num_data(num_data: int | None) -> int:
    """The number of training examples.

    Raises:
        TypeError: If it is no positive integer.
    """
    whole = isinstance(num_data, Integral) and not isinstance(num_data, bool)
    if not whole or int(num_data or 0) < 1:
        raise TypeError(
            f"num_data={num_data!r}; expected the number of training examples, "
            f"which weighs the likelihood against the prior: num_data=len(train)"
        )
    return int(num_data or 0)


@contextmanager
def evaluating(model: RankModel) -> Iterator[None]:
    """Run the network in eval mode within the block; its mode is restored."""
    was_training = [m for m in model.base_net.modules() if m.training]
    model.base_net.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
