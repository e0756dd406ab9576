"""A model without its weights: what a step allocates and computes follows from shapes alone.

Shape suffixes: N media of a batch.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from datamodules.batch import MediaBatch, pad_time
from encoders.base import Encoder, Part
from encoders.stored import StoredLinear
from encoders.tuning import Tune
from lightning_modules.autocast import check_trained, check_types
from models.language import LanguageModel
from models.multimodal import MultiModalModel
from models.parallel import check_split, split_styles
from models.stored import Quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_modules.multimodal import MultiModalLitModule


@dataclass(frozen=True)
class Outline:
    """A LitModule that is built of tensors without values.

    Args:
        module: The module.
        mode: The mode in which it runs.
        weights: Each of its weights once, with the name of its part; `reference` has what a reference keeps for itself.
        stored: Those that are stored in fewer bits than they have here, with their bytes.
    """

    module: "MultiModalLitModule"
    mode: FakeTensorMode
    weights: dict[nn.Parameter, str]
    stored: dict[Tensor, int]

    def num_bytes(self, weight: nn.Parameter) -> int:
        """What a weight takes."""
        return self.stored.get(weight, weight.numel() * weight.element_size())

    def counts(self, trainable: bool = False) -> Counter[str]:
        """Weights by part; those that train, or all."""
        counts = Counter(dict.fromkeys(self.weights.values(), 0))
        for weight, part in self.weights.items():
            counts[part] += weight.numel() if weight.requires_grad or not trainable else 0
        return counts


def make_outline(
    unbuilt: "MultiModalLitModule", precision: Precision | None = None, on_cpu: bool = False, split: int = 1
) -> Outline:
    """Builds a copy of a module as an `Outline`, by the code that builds it for training, from its configuration alone.

    Args:
        unbuilt: The module; it is left as it is.
        precision: Lightning's plugin, which may want all weights in another type; None: it leaves them.
        on_cpu: It is to run on a CPU.
        split: So many devices split each layer of the decoder (tensor parallelism): it is that of one of them.

    Raises:
        ValueError: A part cannot be made, or not be split so.
    """
    module = copy.deepcopy(unbuilt)
    language_model = module.model.language_model
    for part in module.parts().values():
        _leave_weights(part)
    language_model.__class__ = type("Unread", (_Unread, type(language_model)), {})  # as of blocks that are computed again
    module.init_from = None
    with torch.device("meta"):
        module.configure_model()
    if split > 1:
        _split(language_model, split)
    for inner in module.modules():
        if isinstance(inner, LanguageModel):
            _ = inner.takes_branches, inner.takes_packs  # is tried out where there are values, and here taken for given
    if precision is not None:
        check_types(module.parts(), precision.precision)
        check_trained(module.parts(), precision.precision)
        precision.convert_module(module)
    _fill(module, mode := FakeTensorMode(allow_non_fake_inputs=True))
    for inner in module.modules():
        if isinstance(inner, MultiModalModel):
            inner.frozen_features = MediaTogether(on_cpu)  # type: ignore[assignment]
    weights = {weight: name for name, part in module.parts().items() for _, weight in part.own_named_parameters()}
    weights = dict.fromkeys(module.parameters(), "reference") | weights
    quantize = language_model.quantize
    stored = {} if quantize is None else dict(_stored_bytes(module, quantize))
    return Outline(module.train(), mode, weights, stored)


class MediaTogether:
    """Runs frozen encoders as `FrozenFeatures` does: on an accelerator all media of a batch at once, on a CPU one by one."""

    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu = on_cpu

    @torch.no_grad()
    def __call__(self, encoder: Encoder, media: MediaBatch) -> tuple[Tensor, Tensor | None]:
        """The features of the media of a batch, and which are real."""
        if not self.on_cpu:
            return encoder.features(media["media"], media["mask"])
        masks_N: Sequence[Tensor | None] = [None] * len(media["media"]) if media["mask"] is None else list(media["mask"])
        features = []
        for item, mask_T in zip(media["media"], masks_N, strict=True):
            [features_LD], mask_NL = encoder.features((item if mask_T is None else item[mask_T])[None])
            features.append(features_LD if mask_NL is None else features_LD[mask_NL[0]])
        return pad_time(features)


def _leave_weights(part: Part) -> None:
    """Lets a part draw its weights, of which on the meta device none are drawn, instead of reading them."""
    for name, value in (("pretrained", False), ("checkpoint_path", None)):
        if name in part.options:
            setattr(part, name, value)
    for name, tune in vars(part).items():
        if isinstance(tune, Tune):
            setattr(part, name, replace(tune, lora=replace(tune.lora, init=None)))  # PiSSA's adapters are as large as others


class _Unread(LanguageModel):
    """A language model whose weights are drawn and, where they are to be quantised, of one byte each."""

    def _load(self, kind: Any, dtype: torch.dtype) -> "PreTrainedModel":
        quantize, self.quantize = self.quantize, None
        model = super()._load(kind, dtype)
        self.quantize = quantize
        if quantize is not None:
            whole = self._kept_whole(kind) or []
            for name, layer in model.named_modules():
                is_whole = layer is model.get_output_embeddings() or any(f".{name}.".find(f".{one}.") >= 0 for one in whole)
                if type(layer) is nn.Linear and not is_whole:
                    layer.__class__ = _Quantised
                    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        return model


class _Quantised(StoredLinear):
    """A layer whose weight is decoded at each use, also under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return super().forward(input)
        return super().forward(input)


def _stored_bytes(module: nn.Module, quantize: Quantize) -> Iterator[tuple[Tensor, int]]:
    """What bitsandbytes keeps of each layer: its weights, and their scales.

    Those of NF4 take 8 bits for 64 weights, and 32 bits for 256 of these (QLoRA, section 3); those of int8 are one for a row.
    """
    for layer in module.modules():
        if isinstance(layer, _Quantised):
            size = layer.weight.numel()
            is_nf4 = quantize == "nf4"
            yield layer.weight, size // 2 + size // 64 + 4 * size // (64 * 256) if is_nf4 else size + 4 * layer.out_features


def _split(language_model: LanguageModel, split: int) -> None:
    """Leaves a language model, on the meta device, what one of several devices has of the weights that they split."""
    from torch.distributed.tensor.parallel import ColwiseParallel

    check_split(language_model, split)
    for layer in language_model.decoder_layers:
        for name, style in split_styles(language_model, layer).items():
            linear, is_colwise = layer.get_submodule(name), isinstance(style, ColwiseParallel)
            for weight in linear.parameters(recurse=False):
                if is_colwise or weight.ndim > 1:  # the bias of what is split by its inputs is added once
                    size = list(weight.shape)
                    size[0 if is_colwise else 1] //= split
                    weight.data = weight.new_empty(size)


def _fill(module: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors on a CPU in the place of those on the meta device; what is shared stays shared."""
    made: dict[Tensor, Any] = {}

    def fake(x: Tensor) -> Any:
        if x not in made:
            with mode:
                empty = torch.empty(x.shape, dtype=x.dtype, device="cpu")
            made[x] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
        return made[x]

    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            child.register_parameter(name, fake(parameter))
        for name, buffer in child.named_buffers(recurse=False, remove_duplicate=False):
            child.register_buffer(name, fake(buffer), persistent=name not in child._non_persistent_buffers_set)
