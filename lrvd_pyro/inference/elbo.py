"""The evidence lower bound of a program whose latents are drawn once per example."""

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine import Trace
from torch import Tensor

from lrvd_pyro._numbers import check_count, check_rate
from lrvd_pyro.batches import Batch, batch_size
from lrvd_pyro.inference.gradient_checks import (
    NO_GRADIENT,
    NO_NOISE,
    hierarchy,
    parameters,
    warn_of_unreached,
)
from lrvd_pyro.inference.gradients import (
    Gradients,
    data_scale,
    infinite_gradients,
    largest_square,
    refusal,
    uses_float16,
    weakly,
)
from lrvd_pyro.inference.kl import divergence
from lrvd_pyro.inference.noise import Noise, check_noise, draws_per_example
from lrvd_pyro.inference.pairs import paired
from lrvd_pyro.inference.param_store import check_name_is_free
from lrvd_pyro.inference.per_example import Multiplicities, PerExample
from lrvd_pyro.inference.programs import Guide, Program
from lrvd_pyro.inference.terms import add_mean, observed_terms
from lrvd_pyro.inference.threads import alone_in_pyro

__all__ = ["RankELBO"]

_Args = tuple[object, ...]
_AS_BEFORE = (
    "The parameters are as they were before this step, and so are the moments of the "
    "optimizer. "
)
_BEFORE_A_STEP = "Take no step on these gradients: optim.zero_grad(). "


class RankELBO(TraceMeanField_ELBO):
    """The negative evidence lower bound, in nats per data set.

    ``loss = -(N/B) sum_b E_q[log p(y_b | z)] + kl_weight * KL(q(z) || p(z))``, of which
    ``kl_weight=1`` is the true ELBO.

    The KL has its closed form wherever one is registered. Otherwise it is estimated
    from the same draws, and one warning says so. AutoGuides over a joint latent are
    always estimated. A site of multiplicity w, as under ``LogUniform(multiplicity=w)``,
    counts w times its KL.

    Example::

        svi = SVI(model, guide, optim, loss=RankELBO())
        svi.step(**batch)
        loss = RankELBO()(model, guide)      # the same as a module, for torch
        loss(**batch).backward()

    Wrong, as its parent class is, when a latent's parents in the model descend from it
    in the guide. A mean-field guide never has such parents.

    Args:
        kl_weight: A number, or a function of the optimization step, counted from 0.
        noise: "example" draws the latents once per example of the batch, "batch" once
            for the whole batch. Both are unbiased. Once per example, the gradient of
            log alpha has the lower variance where the noise is large; see
            examples/results/README.md. Some networks mix the rows of examples: layers
            with the sequence first, stacked pairs, shared position embeddings. There
            "auto" draws per batch, and one warning names the layer. "example" refuses.
            The first step of a setting looks (`RowCheck`).
        num_particles: The number of independent draws to average over.

    Attributes:
        step: The number of optimization losses so far: calls with gradients enabled, so
            `SVI.evaluate_loss` is not counted. The attribute may be set.
        terms: The terms of the last loss: detached tensors, in nats per data set.
            ``log_likelihood``, ``kl_weight`` and ``kl``: a dict with ``total`` and one
            entry per latent site, or ``joint`` where the sites do not pair. A model's
            ``weight_prior`` is a log density, weighted as the KL is.

    Raises:
        ValueError: If an option is out of range. If the guide was built on another
            model, or the sites of the two do not match. If ``noise="example"`` would
            mix examples. If the loss or a gradient is not finite: from `SVI.step`, or
            from `check`.
        TypeError: If the batch holds no tensor.
    """

    def __init__(
        self,
        *,
        kl_weight: float | Callable[[int], float] = 1.0,
        noise: Noise = "auto",
        num_particles: int = 1,
    ) -> None:
        check_noise(noise)
        number = isinstance(kl_weight, Real) and 0 <= kl_weight < math.inf
        if not number and not callable(kl_weight):
            raise ValueError(
                f"kl_weight={kl_weight!r}; expected a number, 0 or more (1 is the true "
                f"ELBO), or a function of the step: linear_warmup(500)"
            )
        check_count("num_particles", num_particles, 1, "RankELBO(num_particles=2)")
        super().__init__(num_particles=num_particles)  # type: ignore[no-untyped-call]
        self.kl_weight = kl_weight
        self.noise = noise
        self.step = 0
        self.terms: dict[str, Any] = {}
        self._reach_checked = False
        self._warned: set[str] = set()
        self._trained: Callable[[], dict[str, Tensor]] = dict
        # Weak: a loss that outlives a guide must not keep its network in memory.
        self._set_up: weakref.WeakSet[Any] = weakref.WeakSet()

    # A WeakSet cannot be pickled; a guide that is set up twice takes no harm.
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_set_up": None, "_trained": dict}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _set_up=weakref.WeakSet())

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` takes: the step, which sets the KL weight."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the count of steps where `state_dict` was taken."""
        self.step = state["step"]

    def loss(
        self, model: Program, guide: Guide, *args: object, **kwargs: object
    ) -> float:
        """Estimate the loss without gradients, in nats per data set."""
        with torch.no_grad():
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.is_meta:
            return math.nan
        if wrong := self._infinite_term():
            raise refusal(wrong, self.step, "", {})
        return float(loss)

    @alone_in_pyro()
    def differentiable_loss(
        self, model: Program, guide: Guide, *args: object, **kwargs: object
    ) -> Tensor:
        """Estimate the loss with its graph, in nats per data set.

        The call never waits for the device once Pyro's validation, which reads the
        labels, is off: ``pyro.enable_validation(False)``. So it runs on torch's device
        ``meta``, on which `SVI.step` returns NaN: it has no numbers to check.
        """
        particles = self._particles(model, guide, args, kwargs)
        return torch.stack([loss for loss, _, _ in particles]).sum()

    @alone_in_pyro()
    def loss_and_grads(
        self, model: Program, guide: Guide, *args: object, **kwargs: object
    ) -> float:
        """Estimate the loss, and add its gradients if all of them are finite."""
        losses: list[Tensor] = []
        gradients, scale, before = Gradients(), 1.0, self.step
        try:
            # One backward pass a particle: one graph at a time is in memory.
            for loss, params, scale in self._particles(model, guide, args, kwargs):
                gradients.collect(params)
                if loss.requires_grad:
                    (loss / scale).backward()
                losses.append(loss.detach())
            value = torch.stack(losses).sum()
            gradients.finish(scale)
            read = gradients.parameters
            if value.is_meta:
                return math.nan
            square = largest_square(read.values()).to(value.device)
            # The only reading of a step.
            number, largest = torch.stack([value, square]).tolist()
            if not (math.isfinite(number) and math.isfinite(largest)):
                wrong = self._infinite_term() or infinite_gradients(read)
                wrong = wrong or f"the loss is {number}"
                raise refusal(wrong, self.step - 1, _AS_BEFORE, read)
            gradients.fit(math.sqrt(largest))
        except BaseException:
            gradients.drop()
            self.step = before
            raise
        return float(number)

    def check(self) -> None:
        """Raise if a term of the last loss, or a gradient, is not finite.

        Call it after the backward pass and before a torch step. It reads the device.

        Raises:
            ValueError: With the step, and the term or the parameters.
        """
        read = self._trained()
        if wrong := self._infinite_term() or infinite_gradients(read):
            raise refusal(wrong, self.step - 1, _BEFORE_A_STEP, read)

    def _infinite_term(self) -> str:
        kl = self.terms.get("kl", {})
        terms = self.terms | {f"kl[{name!r}]": value for name, value in kl.items()}
        for name, value in terms.items():
            if name != "kl" and not bool(torch.isfinite(value)):
                return f"{name} is {float(value)}"
        return ""

    def _particles(
        self, model: Program, guide: Guide, args: _Args, kwargs: Batch
    ) -> Iterator[tuple[Tensor, dict[str, Tensor], float]]:
        """Each particle's share of the loss, the parameters it read, its data scale."""
        given = self.kl_weight
        weight = float(given(self.step) if callable(given) else given)
        if callable(given):
            check_rate(f"kl_weight({self.step})", weight, "linear_warmup(1000)")
        terms: dict[str, Tensor] = {}
        divergences: dict[str, Tensor] = {}
        for _ in range(self.num_particles):
            model_trace, guide_trace, kl = self._run(model, guide, args, kwargs)
            observed = observed_terms(model_trace)
            total = torch.stack(list(kl.values())).sum() if kl else torch.zeros(())
            add_mean(terms, observed, self.num_particles)
            add_mean(divergences, {"total": total} | kl, self.num_particles)
            prior = total - observed.get("weight_prior", 0.0)
            loss = weight * prior - observed.get("log_likelihood", 0.0)
            learns = "log_likelihood" in observed and torch.is_grad_enabled()
            if learns and not self._reach_checked:
                # Once only, since the check walks the whole graph.
                fit = observed["log_likelihood"] + hierarchy(model_trace)
                warn_of_unreached(fit, guide_trace, NO_NOISE)
                warn_of_unreached(loss, model_trace, NO_GRADIENT)
                self._reach_checked = True
            read = parameters(model_trace, guide_trace)
            if torch.is_grad_enabled():
                self._trained = weakly(read, model, guide)
            scale = data_scale(model_trace) if uses_float16(model) else 1.0
            yield loss / self.num_particles, read, scale
        self.terms = terms | {"kl": divergences, "kl_weight": torch.tensor(weight)}
        self.step += torch.is_grad_enabled()

    def _run(
        self, model: Program, guide: Guide, args: _Args, kwargs: Batch
    ) -> tuple[Trace, Trace, dict[str, Tensor]]:
        """One draw: the traces of model and guide, and the divergence of each site."""
        once: tuple[Any, Any] = ({}, {})
        size = 1
        its_guide = paired(model, guide)
        self._set_up_guide(guide, args, kwargs)
        guide = its_guide
        if draws_per_example(self.noise, model, kwargs, self._warned):
            size = batch_size(kwargs)
            # Each program is wrapped by itself, and before replay. From outside, replay
            # would carry the guide's expanded sites into the model: a wrong loss.
            wrappers = PerExample(size), PerExample(size)
            model, guide = wrappers[0](model), wrappers[1](guide)
            once = wrappers[0].unexpanded, wrappers[1].unexpanded
        multiplicities = Multiplicities()
        model = multiplicities(model)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        kl, estimated = divergence(
            model_trace, guide_trace, once, size, multiplicities.by_site
        )
        self._warn_of_estimates(estimated)
        return model_trace, guide_trace, kl

    def _set_up_guide(self, guide: Guide, args: _Args, kwargs: Batch) -> None:
        """Make an AutoGuide's parameters before latents are drawn per example.

        An AutoGuide sizes its parameters by the latents of its first call. Latents that
        are drawn per example would give them a batch axis.
        """
        if guide not in self._set_up:
            check_name_is_free(guide)
            # Without a graph, so that the trace that an AutoGuide keeps can be copied.
            with torch.random.fork_rng(), poutine.block(), torch.no_grad():
                guide(*args, **kwargs)
            self._set_up.add(guide)

    def _warn_of_estimates(self, estimated: dict[str, str]) -> None:
        for name in estimated.keys() - self._warned:
            self._warned.add(name)
            warnings.warn(
                f"no closed form of KL({estimated[name]}) at site {name!r}: it is "
                f"estimated by Monte Carlo",
                stacklevel=2,
            )
