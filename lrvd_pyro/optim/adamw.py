"""One fused AdamW for adapter, head and variational parameters, in Pyro's form."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from lrvd_pyro._numbers import check_number, check_rate
from lrvd_pyro.optim.groups import GROUPS, group_of, rates_of

__all__ = ["AdamW"]


class AdamW(PyroOptim):
    """``torch.optim.AdamW(fused=True)`` over all parameters of model and guide.

    Pyro's own wrapper makes one optimizer per parameter. This wrapper makes one for all
    of them, with a learning rate per group. Log variances move by units, weights by
    hundredths; so they get the larger default rate. Parameters of 16 bits have moments
    of 32. Other optimizers refuse the float32 gradients that float16 parameters get.

    Gradients are those of the loss in nats per data set, N times those of a mean loss.
    The size of a step does not depend on that factor, but ``clip_norm`` does: a
    ``max_grad_norm`` of 1 on a mean loss is ``clip_norm=num_data`` here.

    Example::

        svi = SVI(model, guide, AdamW(lr=1e-3), loss=RankELBO())

    Gradient accumulation over k micro-batches::

        with pyro.poutine.trace(param_only=True) as seen:
            for batch in micro_batches:
                svi.loss_and_grads(model, guide, **batch)
        params = {site["value"].unconstrained() for site in seen.trace.nodes.values()}
        for p in params:
            p.grad /= k
        optim(params)
        pyro.infer.util.zero_grads(params)

    Args:
        lr: Learning rate of the adapter.
        head_lr: Learning rate of the head; None takes ``lr``.
        variational_lr: Learning rate of guide, prior and likelihood.
        betas: As in torch.
        weight_decay: Decay of adapter and head, never of variational parameters. Leave
            it at 0 with a model's ``weight_prior``, which takes its place.
        schedule: From the number of steps taken to a factor of all learning rates.
        clip_norm: Largest norm of all gradients together, in nats per data set.

    Attributes:
        steps: The number of steps taken.
        torch_optim: The torch optimizer, None before the first step.
        pending: A restored state that waits for the next step, or None.

    Raises:
        ValueError: If a number is out of range or NaN. From a step, if ``schedule``
            gives such a factor; nothing has moved then.
        TypeError: If ``schedule`` is not a function.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        *,
        head_lr: float | None = None,
        variational_lr: float = 5e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: Callable[[int], float] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(torch.optim.AdamW, {})
        rates = rates_of(lr, head_lr, variational_lr)
        check_rate("weight_decay", weight_decay, "weight_decay=0.0")
        for beta in betas:
            expected = "numbers from 0 to below 1: betas=(0.9, 0.999)"
            check_number("betas", beta, expected, lambda beta: 0 <= beta < 1)
        if clip_norm is not None:
            largest = "a positive number, or None: clip_norm=num_data"
            check_number("clip_norm", clip_norm, largest, lambda norm: norm > 0)
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"schedule={schedule!r}; expected a function from the step to a factor "
                f"of all learning rates: AdamW(schedule=lambda step: 0.999**step)"
            )
        decays = (weight_decay, weight_decay, 0.0)
        self.groups: list[dict[str, Any]] = [
            {"params": [], "name": name, "lr": rate, "weight_decay": decay}
            for name, rate, decay in zip(GROUPS, rates, decays, strict=True)
        ]
        self.rates = rates
        self.betas = betas
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.steps = 0
        self.torch_optim: torch.optim.AdamW | None = None
        self.pending: dict[str, Any] | None = None

    def __call__(
        self, params: Iterable[Tensor], *args: object, **kwargs: object
    ) -> None:
        """Take one step on ``params``, unconstrained tensors of Pyro's store."""
        params = set(params)
        with _in_float32(params):
            self._step(params)

    def _step(self, params: set[Tensor]) -> None:
        factor = 1.0 if self.schedule is None else self.schedule(self.steps)
        # Before anything moves, or joins the optimizer.
        check_rate(f"schedule({self.steps})", factor, "lambda step: 0.999**step")
        optim = self._with(params)
        for group, rate in zip(optim.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
            # SVI zeroes the gradients of this step's parameters only; a gradient left
            # on another one would move it.
            for parameter in group["params"]:
                if parameter not in params:
                    parameter.grad = None
        if self.clip_norm is not None:
            # SVI passes a set, hashed by address: a sum in its order would differ from
            # process to process.
            held = [p for group in optim.param_groups for p in group["params"]]
            ordered = [p for p in held if p in params]
            nn.utils.clip_grad_norm_(ordered, self.clip_norm)
        optim.step()
        self.steps += 1

    def get_state(self) -> dict[str, Any]:
        """The steps taken, the torch optimizer's state, and the shapes that it fits."""
        if self.pending is not None:
            return self.pending
        if self.torch_optim is None:
            return {"steps": self.steps, "optim": None, "shapes": []}
        shapes = _shapes(self.torch_optim)
        state = self.torch_optim.state_dict()
        return {"steps": self.steps, "optim": state, "shapes": shapes}

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Restore what `get_state` gave, for the same model and guide.

        Parameters are matched by their order. Before the first step the state is kept,
        and restored at that step.

        Args:
            state_dict: What `get_state` returned.

        Raises:
            ValueError: If the groups do not hold parameters of the saved shapes.
        """
        self.steps = state_dict["steps"]
        self.pending = None if state_dict["optim"] is None else state_dict
        if self.torch_optim is not None:
            self._restore(self.torch_optim)

    def hold(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Train these parameters, with moments that start at 0.

        The optimizer is as after a step that met them in this order, so that
        `set_state` restores at once. A later step adds the parameters that it meets.

        Args:
            groups: The parameters: one sequence each for adapter, head and variational.
        """
        for group, params in zip(self.groups, groups, strict=True):
            group["params"] = list(params)
        self.torch_optim = self._make() if any(groups) else None

    def _make(self) -> torch.optim.AdamW:
        # torch has no fused kernel for the meta device.
        fused = not any(p.is_meta for group in self.groups for p in group["params"])
        optim = torch.optim.AdamW(self.groups, betas=self.betas, fused=fused)
        self.groups = optim.param_groups
        return optim

    def _with(self, params: set[Tensor]) -> torch.optim.AdamW:
        """The torch optimizer, after adding new parameters in the order of names."""
        known: set[Tensor] = set()
        if self.torch_optim is not None:
            groups = self.torch_optim.param_groups
            known = {p for group in groups for p in group["params"]}
        if new := params - known:
            # In the order of names, since a restored state matches parameters by order.
            # A network's parameter is "<model>.net$$$<path>" to Pyro.
            store = pyro.get_param_store()
            for name, parameter in sorted((str(store.param_name(p)), p) for p in new):
                _, is_net, path = name.partition(".net$$$")
                index = GROUPS.index(group_of(path, in_net=bool(is_net)))
                self.groups[index]["params"].append(parameter)
            # torch adds groups and not members of a group, so the optimizer is made
            # once more; its state is by tensor, and passes over.
            before = self.torch_optim
            self.torch_optim = self._make()
            if before is not None:
                self.torch_optim.state.update(before.state)
            self._restore(self.torch_optim)
        assert self.torch_optim is not None
        return self.torch_optim

    def _restore(self, optim: torch.optim.AdamW) -> None:
        if self.pending is None:
            return
        saved, present = self.pending["shapes"], _shapes(optim)
        if saved != present:
            raise ValueError(
                f"the saved optimizer has parameters of shapes {saved} in {GROUPS}, "
                f"this one {present}; restore it for the model and guide that it was "
                f"saved from"
            )
        # Loading gives moments the precision of their parameters.
        with _in_float32(p for group in optim.param_groups for p in group["params"]):
            optim.load_state_dict(self.pending["optim"])
        self.pending = None


@contextmanager
def _in_float32(params: Iterable[Tensor]) -> Iterator[None]:
    """Hold 16-bit parameters, gradients and new moments in float32 within the block.

    In float16 the second moment of a gradient is 0 below 0.007 and infinite above
    8,000. In bfloat16 it does not decay, since 0.999 rounds to 1.
    """
    held = [(p, p.data) for p in params if p.dtype in (torch.float16, torch.bfloat16)]
    for parameter, data in held:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = data.float()
        parameter.grad = None if gradient is None else gradient.float()
    try:
        yield
    finally:
        for parameter, data in held:
            gradient, parameter.grad = parameter.grad, None
            # Copied, since other tensors may share the storage.
            parameter.data = data.copy_(parameter.data)
            # SVI reads no gradient after a step.
            if gradient is not None and parameter.grad_dtype is not torch.float32:
                gradient = gradient.to(data.dtype)
            parameter.grad = gradient


def _shapes(optim: torch.optim.AdamW) -> list[list[list[int]]]:
    return [[list(p.shape) for p in group["params"]] for group in optim.param_groups]
