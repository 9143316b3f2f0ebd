"""The posterior mean of an adapter as plain PEFT LoRA, or merged into the network.

Gate means and scalings go into ``lora_B``. Every module gets ``lora_alpha = r``, so its
scaling is 1, whether or not a server reads ``rank_pattern`` and ``alpha_pattern``. This
is exact for DoRA too, whose norm depends on ``scaling B A`` alone.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from peft.utils import TrainableTokensWrapper
from torch import Tensor, nn

from lrvd_pyro._compat.peft import unloaded
from lrvd_pyro._compat.transformers import attention_implementation
from lrvd_pyro.autocast import autocast_dtype
from lrvd_pyro.batches import Batch, without_labels
from lrvd_pyro.inference.programs import Guide
from lrvd_pyro.models.base import RankModel, evaluating
from lrvd_pyro.models.inputs import copied
from lrvd_pyro.predictive.predictive import posterior_mean
from lrvd_pyro.rank_space.find import plain_net
from lrvd_pyro.storage.atomic import AnyPath, written_whole
from lrvd_pyro.storage.embeddings import resized_embeddings
from lrvd_pyro.storage.fit import refuse_infinite
from lrvd_pyro.storage.fresh_base import fresh_base
from lrvd_pyro.storage.mean_adapter import (
    MeanModule,
    is_nothing,
    mean_modules,
    padded,
)
from lrvd_pyro.storage.peft_files import (
    PREFIX,
    adapter_state,
    live_config,
    lora_config,
    module_names,
    write_adapter,
)
from lrvd_pyro.storage.refusals import (
    refuse_merging_shared,
    refuse_moved_buffers,
    refuse_other_adapters,
    refuse_what_no_adapter_holds,
)
from lrvd_pyro.storage.transaction import told_of, unchanged_on_error

__all__ = ["export_peft", "merge", "plain_adapter"]

_Mode = Literal["pruned", "padded", "merged"]

_HALF = {torch.bfloat16, torch.float16}
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_B.center")


def export_peft(
    path: AnyPath,
    model: RankModel,
    guide: Guide,
    *,
    mode: _Mode = "pruned",
    probe: Batch | None = None,
) -> Path:
    """Write the posterior mean for programs that do not know this library.

    - "pruned": PEFT LoRA without the components whose mean gate is exactly 0, and
      without the modules that have no other. ``rank_pattern`` holds ragged ranks.
    - "padded": the same, filled up with zero rows to one rank, for servers that do not
      read patterns.
    - "merged": a plain Transformers network with the adapter added to its weights.

    Wrong as a substitute for prediction under the posterior: one forward pass at the
    mean is not an average, and its confidence is that of a point estimate.

    Example::

        export_peft("adapter", model, guide, probe=batch)
        PeftModel.from_pretrained(AutoModel.from_pretrained(name), "adapter")

    Args:
        path: A folder that does not exist yet, or is empty.
        model: The trained model; its network stays as it is.
        guide: Its guide.
        mode: "pruned", "padded" or "merged".
        probe: A batch for a trial. Before ``path`` exists, plain PEFT or Transformers
            loads the export onto the base as it was before training, and its logits are
            compared with the model's.

    Returns:
        The path.

    Raises:
        ValueError: If ``path`` is not empty; if nothing is left to export; if the
            adapter alone does not make the network, as when running statistics of the
            base moved; if "merged" meets a bias and a layer without one, or a weight
            that two modules share; if the local folder that the network came from holds
            another base; or if the probe's logits differ by more than 1e-5 of the
            largest (2e-2 in half precision, autocast too). Nothing is written then.
        TypeError: If a layer cannot be padded, or "merged" meets a network that is not
            a Transformers one.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted.
    """
    if mode not in ("pruned", "padded", "merged"):
        raise ValueError(f'mode={mode!r}; expected "pruned", "padded" or "merged"')
    refuse_other_adapters(model)
    if mode != "merged":
        refuse_moved_buffers(model)
    with (
        unchanged_on_error(model, guide),
        told_of(Path(path)),
        written_whole(path) as folder,
    ):
        if mode == "merged":
            merged = merge(model, guide)
            refuse_infinite(merged.state_dict(keep_vars=True))
            merged.save_pretrained(folder)
        else:
            config, tensors = plain_adapter(model, guide, uniform=mode == "padded")
            refuse_infinite({n: nn.Parameter(t, False) for n, t in tensors.items()})
            write_adapter(folder, config, tensors, model.base_net)
        if probe is not None:
            _compare(folder, model, guide, mode, probe)
    return Path(path)


def plain_adapter(
    model: RankModel, guide: Guide, *, drop: bool = True, uniform: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Give the mean adapter as PEFT stores it: its config, and its tensors by name.

    Args:
        model: The trained model.
        guide: Its guide.
        drop: Leave out components whose mean gate is 0.
        uniform: Fill up with zeros to one rank.

    Raises:
        ValueError: If nothing is left, or the adapter alone does not make the network.
        TypeError: If a layer cannot be padded.
    """
    refuse_other_adapters(model)
    refuse_what_no_adapter_holds(model)
    net, adapter = model.base_net, model.space.adapter
    means = mean_modules(model, guide, drop=drop)
    left = {name: mean for name, mean in means.items() if not is_nothing(mean)}
    if not left:
        raise ValueError(
            "nothing is left to export: the mean of every gate is 0, and PEFT has no "
            'adapter without rank; use export_peft(..., mode="merged")'
        )
    # PEFT refuses rank 0, so a bias that stands alone comes with a row of zeros.
    ranks = {name: max(1, len(mean.lora_A)) for name, mean in left.items()}
    if uniform:
        ranks = dict.fromkeys(left, max(ranks.values()))
    tensors = adapter_state(net, adapter)
    for name in means:
        for part in _PARTS:
            tensors.pop(f"{PREFIX}{name}.{part}", None)
    tensors = _embedding_tensors(net, left) | tensors | _lora_tensors(left, ranks)
    # vLLM ignores both patterns and takes one lora_alpha / r: with alpha = r in every
    # module it is right all the same.
    config = lora_config(live_config(model), ranks, ranks, module_names(net))
    config.use_rslora, config.inference_mode = False, True
    config.lora_bias = any(mean.bias is not None for mean in left.values())
    return config, tensors


def merge(model: RankModel, guide: Guide) -> Any:
    """Copy the network without PEFT, with the mean adapter added to its weights.

    Raises:
        TypeError: If the network is not a Transformers one.
        ValueError: If the adapter has a bias where the layer has none, or changes a
            weight that another module has too.
    """
    net, adapter = model.base_net, model.space.adapter
    if not hasattr(plain_net(net), "save_pretrained"):
        raise TypeError(
            f'mode="merged" writes a Transformers network, and this one is a '
            f'{type(plain_net(net)).__name__}; use mode="pruned"'
        )
    refuse_merging_shared(model)
    twin = copy.deepcopy(net)
    for name, mean in mean_modules(model, guide, drop=False).items():
        layer: Any = plain_net(twin).get_submodule(name)
        layer.lora_A[adapter].weight.data = mean.lora_A.detach()
        layer.lora_B[adapter].weight.data = mean.lora_B.detach()
        # By this flag PEFT merges a bias, and fails where the layer has none. A bias of
        # zeros has nothing to merge.
        layer.lora_bias[adapter] = mean.bias is not None and bool(mean.bias.any())
        if mean.bias is not None:
            layer.lora_B[adapter].bias.data = mean.bias.detach()
        layer.scaling[adapter] = 1.0
        if layer.lora_bias[adapter] and layer.get_base_layer().bias is None:
            raise ValueError(
                f"the adapter has a bias in {name!r}, whose layer has none to merge it "
                f'into; use mode="pruned", or centered=False before ranks are removed'
            )
    return unloaded(twin, [adapter])


def _embedding_tensors(net: nn.Module, left: Collection[str]) -> dict[str, Tensor]:
    """The embeddings that the base's files lack, by the names that PEFT looks for."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in resized_embeddings(net).items():
        layer, _, part = name.rpartition(".")
        inner = "base_layer." if layer in left else ""
        if isinstance(plain_net(net).get_submodule(layer), TrainableTokensWrapper):
            inner = "token_adapter.base_layer."
        tensors[f"{PREFIX}{layer}.{inner}{part}"] = tensor
    return tensors


def _lora_tensors(
    left: Mapping[str, MeanModule], ranks: Mapping[str, int]
) -> dict[str, Tensor]:
    """The tensors of modules at their ranks, by the names that PEFT gives them."""
    tensors: dict[str, Tensor] = {}
    for name, mean in left.items():
        for part, tensor in zip(_PARTS, padded(name, mean, ranks[name])):
            if tensor is not None:
                tensors[f"{PREFIX}{name}.{part}"] = tensor
    return tensors


def _compare(
    folder: Path, model: RankModel, guide: Guide, mode: _Mode, probe: Batch
) -> None:
    """Raise unless a written folder gives the logits of the mean adapter."""
    net = model.base_net
    inputs = without_labels(probe)
    device = next(net.parameters()).device
    with evaluating(model), torch.no_grad():
        with posterior_mean(model, guide), _autocasts(net, device.type) as seen:
            expected = model.predictions(**inputs)
        # Whoever loads draws what the files do not hold, and then overwrites it.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            loaded = _reload(folder, model, mode).eval()
        # Accelerate's autocast stands in the forward of the network that it prepared,
        # which the export does not have.
        with torch.autocast(device.type, next(iter(seen), None), enabled=bool(seen)):
            output = loaded(**copied(inputs))
    error = float((getattr(output, "logits", output) - expected).abs().max())
    largest = float(expected.abs().max())
    half = sorted(str(d) for d in seen | {p.dtype for p in net.parameters()} & _HALF)
    tolerance = 2e-2 if half else 1e-5
    if not error <= tolerance * largest:  # NaN is refused too
        raise ValueError(
            f"loaded again, the export's logits differ by {error:.2g} from the mean "
            f"adapter's, whose largest is {largest:.2g}; expected {tolerance} of that "
            f"at most{' in ' if half else ''}{', '.join(half)}. Nothing was written. "
            f"If net.eval()(**probe) gives the same logits twice, please report this "
            f"message"
        )


@contextmanager
def _autocasts(net: nn.Module, device: str) -> Iterator[set[torch.dtype]]:
    """The precisions that autocast sets in the forward passes within the block."""
    seen: set[torch.dtype] = set()

    def look(*_: object) -> None:
        if dtype := autocast_dtype(device):
            seen.add(dtype)

    hooks = [module.register_forward_pre_hook(look) for module in net.modules()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _reload(folder: Path, model: RankModel, mode: _Mode) -> nn.Module:
    """Load an export by plain Transformers, or by plain PEFT on a fresh base."""
    base: Any = plain_net(model.base_net)
    if mode == "merged":
        # Another attention kernel or precision would round its logits differently.
        attention = attention_implementation(base)
        loaded: nn.Module = type(base).from_pretrained(
            folder, dtype=base.dtype, attn_implementation=attention
        )
        return loaded.to(base.device)
    plain: PeftModel = PeftModel.from_pretrained(fresh_base(model), folder)
    return plain
