"""What a model is: the three methods that a new one gives, and what it gets."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import pyro
import torch
from peft import PeftModel
from pyro import poutine
from pyro.params.param_store import param_with_module_name
from torch import Tensor
from torch.distributions import Distribution

from lrvd_pyro._compat.pyro import mcmc_is_running, name_of, plain_child
from lrvd_pyro.batches import Batch, batch_size
from lrvd_pyro.inference import mcmc
from lrvd_pyro.inference.input_errors import plain_errors
from lrvd_pyro.inference.kl import latent_sites, scaled_log_prob
from lrvd_pyro.inference.param_store import UniqueModule, check_registered
from lrvd_pyro.inference.per_example import drawn_per_example
from lrvd_pyro.inference.threads import alone_in_pyro
from lrvd_pyro.likelihoods.base import Likelihood, check_likelihood
from lrvd_pyro.models.checks import TrainingChecks
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["Factors", "RankModel", "SiteLabels", "evaluating"]

# The name of a dimension, and the coordinates along it by name.
SiteLabels = tuple[str, dict[str, list[Any]]]


class Factors(NamedTuple):
    """What a LoRA module computes by: ``scaling * lora_B diag(gate) lora_A``.

    Attributes:
        lora_A: ``r x in``, or as the layer has it.
        lora_B: ``out x r``, or as the layer has it.
        gate: ``r``.
    """

    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor


class RankModel(UniqueModule):
    """A PEFT network whose adapter is drawn before each forward pass.

    A model is called with the batch as keyword arguments, as its network is. It
    observes ``labels`` if they are given, and returns the network's predictions.

    A subclass gives three methods. `draw` has the Pyro statements. `bind` puts the
    drawn value into the forward pass. `factors` says which adapter the value amounts
    to. Training, prediction, storage, export and ArviZ work by these three.

    A subclass may set ``prior``. It sets an attribute for each further argument of its
    constructor: `save` keeps the arguments by these. It may override `start`, where
    guides begin, and `site_labels`. With all imports: examples/recipes/add_model.py.

    Wrong for `pyro.infer.Predictive` with ``parallel=True``, which draws several
    adapters at once: the model refuses them.

    Args:
        space: The rank space of the adapter.
        likelihood: The distribution of labels given the network's predictions.
        num_data: The number of training examples N.

    Attributes:
        binds: What one draw is, in a word. "gates" are one number per rank component,
            of which a pass may take one row per example.

    Raises:
        TypeError: If the likelihood lacks a method, or a subclass a method.

    Example, in which B is random and A is a parameter::

        class RandomB(RankModel):
            binds = "weights"                    # B ~ Normal(0, 1), elementwise

            def __init__(self, net, *, num_data, prior=None, likelihood=None, **parts):
                space = RankSpace(net, parts.get("adapter"), sides=("lora_B",))
                super().__init__(space, likelihood or Categorical(), num_data)
                self.prior = prior or dist.Normal(0.0, 1.0)
                for weight in space.weights("lora_B"):   # the draw takes its place
                    weight.requires_grad_(False)

            def draw(self):                      # one site with one event dimension
                size = self.space.flatten("lora_B").shape
                return pyro.sample("B", self.prior.expand(size).to_event(1))

            def bind(self, value):               # (K,), or one row per example
                return self.space.bind_weights(value)

            def factors(self, value):            # (K,)
                As, Bs = self.space.weights("lora_A"), self.space.unflatten(value)
                ones = self.space.split(self.space.ones())
                return dict(zip(ones, map(Factors, As, Bs["lora_B"], ones.values())))

            def start(self):
                return {"B": self.space.flatten("lora_B").detach()}

        model = RandomB(net, num_data=len(train))
        guide = AutoNormal(model, init_loc_fn=init_to_value(values=model.start()))
        svi = SVI(model, guide, AdamW(), loss=RankELBO())
    """

    prior: Any
    binds: ClassVar[str]

    def __init__(self, space: RankSpace, likelihood: Likelihood, num_data: int) -> None:
        # The space has its hooks on the network already.
        with space.binding.closed_on_failure():
            check_likelihood(likelihood)
        super().__init__()
        self.net = space.net
        self.space = space
        self.likelihood = likelihood
        self.num_data = num_data
        self.prior = None
        self._training_checks = TrainingChecks()

    @abstractmethod
    def draw(self) -> Tensor:
        """The Pyro statements, under the rules that `lrvd_pyro.priors` gives.

        Returns:
            What `bind` takes: a vector, or one row per example within a `PerExample`.
        """

    @abstractmethod
    def bind(self, value: Tensor) -> AbstractContextManager[None]:
        """Let the forward passes within the block use a draw.

        Args:
            value: What `draw` returned.
        """

    @abstractmethod
    def factors(self, value: Tensor) -> dict[str, Factors]:
        """What each LoRA module computes by while a draw is bound.

        Args:
            value: One draw, a vector.

        Returns:
            The factors by module, under the names of ``space.modules``.
        """

    def site_labels(self, site: str) -> SiteLabels | None:
        """The labels that ArviZ gives the components of a latent site.

        Returns:
            The dimension, and the coordinates along it by name. By default None:
            components have numbers.
        """
        return None

    @alone_in_pyro()
    def latent_sites(self) -> dict[str, Distribution]:
        """The prior distribution of each latent site, from one run."""
        # A mere look: no random number is used up, and no outer handler sees it.
        with torch.random.fork_rng(), poutine.block(), poutine.trace() as run:
            self.draw()
        return {name: site["fn"] for name, site in latent_sites(run.trace).items()}

    def start(self) -> dict[str, Tensor]:
        """Where guides start each latent site: at the prior's ``start``, else at 1."""
        # At gate 1 the network is the trained LoRA. At gate 0 B would get no gradient.
        known = getattr(self.prior, "start", {})
        device = self.space.device
        return {
            name: torch.full(fn.event_shape, known.get(name, 1.0), device=device)
            for name, fn in self.latent_sites().items()
        }

    @alone_in_pyro()
    def value_at(self, latents: Mapping[str, Tensor]) -> Tensor:
        """What the model binds when its latent sites have the given values.

        Args:
            latents: A value for each latent site, by name.

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

    @alone_in_pyro()
    def log_prior(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The log prior density of values of the latent sites, summed, in nats."""
        with poutine.block(), poutine.trace() as run:
            with poutine.condition(data=dict(latents)):
                self.draw()
        nodes: dict[str, Any] = run.trace.nodes
        return torch.stack([scaled_log_prob(nodes[name]) for name in latents]).sum()

    @alone_in_pyro()
    def forward(self, *, labels: Tensor | None = None, **inputs: object) -> Tensor:
        """Draw the adapter, run the network, observe (or draw) the labels.

        Args:
            labels: The labels of the batch, ``B`` or as the likelihood has them.
            inputs: The network's own keyword arguments.

        Returns:
            The network's predictions, ``B x ...``.
        """
        with plain_errors():
            self._check_batch({"labels": labels, **inputs})
        self._register_parameters()
        value = self.draw()
        with plain_errors():
            # Rows of several draws would be taken for rows of examples.
            if value.dim() > 1 and not drawn_per_example():
                raise ValueError(
                    f"the adapter was drawn with shape {tuple(value.shape)}, several "
                    f"draws at once; use Predictive(parallel=False) or "
                    f"lrvd_pyro.predict"
                )
            with self.bind(value):
                predictions = self.predictions(**inputs)
            self.likelihood(predictions, labels, self.num_data)
        return predictions

    def _check_batch(self, batch: Batch) -> None:
        labels = batch["labels"]
        if labels is not None and not isinstance(labels, Tensor):
            raise TypeError(
                f"labels are a {type(labels).__name__}; expected a tensor with one "
                f"entry per example: torch.as_tensor(labels)"
            )
        size = batch_size(batch)
        if mcmc_is_running():
            observed = 0 if labels is None else size
            mcmc.check(self.base_net, observed, self.num_data)
        if labels is not None:
            self._training_checks.check(self.space)

    def predictions(self, **inputs: object) -> Tensor:
        """The network's logits under the draw that is bound at present, ``B x ...``.

        Args:
            inputs: The network's own keyword arguments.

        Raises:
            TypeError: If the network returns neither a tensor nor something with
                logits.
        """
        again = partial(self.base_net, **inputs)
        output = again()
        self.space.check_fired(again)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the network returned a {type(output).__name__}; expected a tensor or "
                f"an output with logits: net(**batch, return_dict=True), or a head"
            )
        return logits

    @property
    def base_net(self) -> PeftModel:
        """The network, read past Pyro.

        ``model.net`` would register all parameters of the network with Pyro, the frozen
        base included, which unfreezes it.
        """
        return cast(PeftModel, plain_child(self, "net"))

    def _register_parameters(self) -> None:
        """Show Pyro the trainable parameters, and only them."""
        # Pyro's local mode has no store: a torch optimizer reads the module instead.
        if pyro.settings.get("module_local_params"):
            return
        for name, parameter in self.base_net.named_parameters():
            if parameter.requires_grad:
                path = param_with_module_name(f"{name_of(self)}.net", name)
                pyro.param(path, parameter)
                check_registered(path, parameter)


def evaluating(model: RankModel) -> AbstractContextManager[None]:
    """Run the network in eval mode within the block, for this thread alone."""
    return model.space.binding.evaluating()
