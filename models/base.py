"""What a model is: the three methods that a new one gives, and what it gets."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import pyro
import torch
from peft import PeftModel
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution

from lrvd_pyro._compat.pyro import name_of, plain_child
from lrvd_pyro.batches import Batch, batch_size, without_labels
from lrvd_pyro.inference.input_errors import plain_errors
from lrvd_pyro.inference.kl import latent_sites, scaled_log_prob
from lrvd_pyro.inference.param_store import UniqueModule, register_trainable
from lrvd_pyro.inference.threads import alone_in_pyro
from lrvd_pyro.likelihoods.base import Likelihood, check_likelihood
from lrvd_pyro.likelihoods.categorical import Categorical
from lrvd_pyro.models.checks import (
    check_call,
    check_mcmc,
    check_num_data,
    check_rows_drawn,
    checked_start,
    logits_of,
)
from lrvd_pyro.models.factors import Factors, SiteLabels
from lrvd_pyro.models.inputs import copied
from lrvd_pyro.models.rows import RowCheck
from lrvd_pyro.models.training_checks import TrainingChecks
from lrvd_pyro.rank_space.base_buffers import copied_buffers
from lrvd_pyro.rank_space.cuts import named_cuts
from lrvd_pyro.rank_space.removal import Cuts
from lrvd_pyro.rank_space.rows import Side
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["RankModel", "evaluating"]


class RankModel(UniqueModule):
    """A PEFT network whose adapter is drawn before each forward pass.

    It takes the batch as keyword arguments, observes ``labels`` if they are given, and
    returns the network's predictions.

    A subclass gives a word and three methods. `binds` says what is drawn. `draw` has
    the Pyro statements. `bind` puts the drawn value into the forward pass. `factors`
    says which adapter the value amounts to. Training, prediction, storage, export and
    ArviZ work by these.

    A subclass sets an attribute for each further argument of its constructor: `save`
    keeps the arguments by these. It may override `start`, where guides begin, `cuts`,
    and `site_labels`. With all imports: examples/recipes/add_model.py.

    Wrong for `pyro.infer.Predictive` with ``parallel=True``, which draws several
    adapters at once: the model refuses them.

    Args:
        net: A PEFT LoRA model, or a Transformers network after ``net.add_adapter``.
        num_data: The number of training examples N; a batch of B counts N/B times.
        prior: What `draw` uses; its parameters train and are saved.
        likelihood: Of labels given the network's logits; None takes `Categorical`.
        sides: The weights that `RankSpace.bind_weights` draws; gates need none.
        adapter: The adapter's name; None takes the single active one.

    Raises:
        TypeError: If the likelihood or the subclass lacks a method, or ``num_data`` is
            missing. And as `RankSpace` raises it.

    Example, in which B is random and A is a parameter::

        class RandomB(RankModel):
            binds = "weights"                    # B ~ prior, elementwise

            def __init__(self, net, *, prior=dist.Normal(0.0, 1.0), **arguments):
                super().__init__(net, sides=("lora_B",), prior=prior, **arguments)
                for weight in self.space.weights("lora_B"):   # the draw replaces it
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

    def __init__(
        self,
        net: nn.Module,
        *,
        num_data: int | None = None,
        prior: Any = None,
        likelihood: Likelihood | None = None,
        sides: tuple[Side, ...] = (),
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.num_data = check_num_data(num_data)
        self.prior = prior
        self.likelihood = Categorical() if likelihood is None else likelihood
        check_likelihood(self.likelihood)
        # Last, since the space puts hooks on the network.
        self.space, self.sides = RankSpace(net, adapter, sides=sides), sides
        self.net = net
        self.first_buffers = copied_buffers(net)  # adapters are for the base as it was
        self._training_checks, self._rows = TrainingChecks(), RowCheck()

    @property
    @abstractmethod
    def binds(self) -> str:
        """What one draw is, in a word: a class attribute.

        "gates" are one number per rank component; a pass may take a row per example.
        """

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

    def cuts(self, keep: Tensor) -> Cuts:
        """What `select` would slice beside the network: of the model and its prior.

        By default `named_cuts`.

        Args:
            keep: Which rank components stay, a bool mask (R,).

        Raises:
            TypeError: If a tensor belongs to no components that can be told.
        """
        # A likelihood is about labels: its tensors have no rank component.
        return named_cuts(self.space, keep, self, ("net.", "likelihood."))

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
        # A look: no random number is used up, and no outer handler sees it.
        with torch.random.fork_rng(), poutine.block(), poutine.trace() as run:
            self.draw()
        return {name: site["fn"] for name, site in latent_sites(run.trace).items()}

    def start(self) -> dict[str, Tensor]:
        """Where guides start each latent site: at the prior's ``start``, else at 1."""
        # At gate 1 the network is the trained LoRA. At gate 0 B would get no gradient.
        known = getattr(self.prior, "start", {})
        return checked_start(self.draw, self.latent_sites(), known, self.space.device)

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
    def forward(
        self, *args: object, labels: Tensor | None = None, **inputs: object
    ) -> Tensor:
        """Draw the adapter, run the network, observe (or draw) the labels.

        Args:
            args: Nothing.
            labels: The labels of the batch, ``B`` or as the likelihood has them.
            inputs: The network's own keyword arguments.

        Returns:
            The network's predictions, ``B x ...``.

        Raises:
            ValueError: If a draw per example would reach other examples.
        """
        batch = {"labels": labels, **inputs}
        with plain_errors():
            check_call(args, labels)
            check_mcmc(self.base_net, batch, self.num_data)
            if labels is not None:
                self._training_checks.check(self.space)
        self._register_parameters()
        value = self.draw()
        with plain_errors():
            if value.dim() > 1:
                check_rows_drawn(value, self.mixed_rows(batch))
            with self.bind(value):
                predictions = self.predictions(**inputs)
            self.likelihood(predictions, labels, self.num_data)
        return predictions

    def predictions(self, **inputs: object) -> Tensor:
        """The network's logits under the draw that is bound at present, ``B x ...``.

        Args:
            inputs: The network's own keyword arguments; each pass gets a copy of them.

        Raises:
            TypeError: If an argument cannot be copied, or the network returns neither a
                tensor nor something with logits.
        """

        def again() -> object:
            return self.base_net(**copied(inputs))

        output = again()
        self.space.check_fired(again)
        return logits_of(output)

    def mixed_rows(self, batch: Batch) -> str:
        """Why a draw per example would reach other examples; empty if it would not."""
        inputs, size = without_labels(batch), batch_size(batch)
        return self._rows.reason(self.space, self.predictions, inputs, size)

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
        if not pyro.settings.get("module_local_params"):
            register_trainable(f"{name_of(self)}.net", self.base_net)


def evaluating(model: RankModel) -> AbstractContextManager[None]:
    """Run the network in eval mode within the block, for this thread alone."""
    return model.space.binding.evaluating()
