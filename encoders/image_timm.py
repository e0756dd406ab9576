"""Vision encoders from timm.

Shape suffixes: B pictures, C channels, H W pixels or cells, P prefix tokens (class token, registers), N patches, D width.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from encoders.base import one_line
from encoders.image_base import ImageEncoder, ImageTokens
from encoders.transforms import ImageTransform, timm_transform


@runtime_checkable
class _HasIntermediates(Protocol):
    """What most timm models offer beyond `forward_features`; timm has no base class for them."""

    forward_intermediates: Callable[..., list[Any]]
    prune_intermediate_layers: Callable[..., list[int]]


@dataclass(frozen=True)
class _TimmFacts:
    data_config: dict[str, Any]
    fixed_size: bool
    classifiers: tuple[str, ...]
    block: int | None


class TimmEncoder(ImageEncoder):
    """Any image model of timm (Wightman, github.com/huggingface/pytorch-image-models).

    `layer` counts the blocks of a transformer and the stages of a convolutional or hierarchical network.

    Args:
        model_name: Name in timm, with a tag (`vit_small_patch14_dinov2.lvd142m`), `hf-hub:owner/name` or `local-dir:folder`.
        pretrained: Take the weights of the name's tag, from the hub; False: random ones.
        checkpoint_path: Local file of weights (safetensors, or a torch file read without pickled code) instead of the hub's.
    """

    def __init__(
        self, model_name: str, *args: Any, pretrained: bool = True, checkpoint_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_name = model_name
        self.pretrained = pretrained
        self.checkpoint_path = checkpoint_path

    @property
    def has_source(self) -> bool:
        """Whether the weights come from the hub or a file."""
        return self.pretrained or self.checkpoint_path is not None

    @cached_property
    def transform(self) -> ImageTransform:
        return timm_transform(self._facts.data_config, self.resize, self.image_size)

    @cached_property
    def _facts(self) -> _TimmFacts:
        import timm
        from timm.data import resolve_data_config

        with torch.device("meta"):
            try:
                model: Any = timm.create_model(self.model_name)
            except (OSError, RuntimeError, ValueError) as error:
                reason = one_line(error).rstrip(".")
                raise ValueError(f"model_name {self.model_name!r} gives no timm model: {reason}. {self._similar()}") from error
        config = model.pretrained_cfg
        block = None
        if self.layer is not None:
            block = self._prune(model, self.layer - 1 if self.layer > 0 else self.layer)
        classifiers = config.get("classifier") or ()
        return _TimmFacts(
            data_config=resolve_data_config({}, config),
            fixed_size=bool(config.get("fixed_input_size")),
            classifiers=(classifiers,) if isinstance(classifiers, str) else tuple(classifiers),
            block=block,
        )

    def _similar(self) -> str:
        import timm

        names = difflib.get_close_matches(self.model_name.split(".")[0], timm.list_models(), n=3)
        return f"Similar names: {', '.join(names)}" if names else "`timm.list_models()` lists the names"

    def _prune(self, model: nn.Module, block: int) -> int:
        if not isinstance(model, _HasIntermediates):
            raise ValueError(f"timm's {self.model_name} gives no features between its layers: set layer to null")
        try:
            [kept] = model.prune_intermediate_layers([block], prune_norm=False, prune_head=False)
        except AssertionError as error:
            raise ValueError(f"layer {self.layer} does not exist in {self.model_name}: {error}") from error
        return kept

    def _create(self, pretrained: bool = False, overlay: dict[str, Any] | None = None) -> Any:
        import timm

        model: Any = timm.create_model(
            self.model_name,
            pretrained=pretrained,
            pretrained_cfg_overlay=overlay,
            num_classes=0,
            img_size=self.image_size if self._facts.fixed_size else None,
        )
        if self._facts.block is not None:
            self._prune(model, self._facts.block)
        return model

    def _load(self) -> nn.Module:
        model = self._load_whole()
        if self.compute_dtype is not None and self.dtype != torch.float32 and _reads_weights(model):
            raise ValueError(
                f"the attention of {self.model_name} takes the weights of its projections without calling them (as of EVA, BEiT "
                "and Swin V2), so that nothing could widen them: set compute_dtype of the image encoder to null"
            )
        return model

    def _load_whole(self) -> nn.Module:
        if self.checkpoint_path is not None:
            return self._load_file(Path(self.checkpoint_path))
        try:
            return self._create(pretrained=self.pretrained)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"no pretrained weights of {self.model_name} could be had ({one_line(error)}): the hub must be reachable or its "
                "cache filled; otherwise set checkpoint_path to a file, or pretrained to false for random weights"
            ) from error

    def _load_file(self, path: Path) -> nn.Module:
        from safetensors import SafetensorError
        from timm.models import load_state_dict

        if not path.is_file():
            raise ValueError(
                f"checkpoint_path {path} is no file: give weights of {self.model_name}, as safetensors or a torch file"
            )
        try:
            state = load_state_dict(str(path), weights_only=True)
            for name in self._facts.classifiers:
                state.pop(f"{name}.weight", None)
                state.pop(f"{name}.bias", None)
            # timm converts and resizes as for its own downloads; equal num_classes make it check every name
            overlay = {"state_dict": state, "source": "", "custom_load": False, "num_classes": 0, "label_offset": 0}
            model = self._create(pretrained=True, overlay=overlay)
        except (OSError, EOFError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"checkpoint_path {path} does not fit {self.model_name}: {one_line(error)}") from error
        model.pretrained_cfg.pop("state_dict")  # the weights would be held twice
        return model

    def _run(self, model: Any, image_BCHW: Tensor) -> ImageTokens:
        class_token = dict(model.named_parameters(recurse=False)).get("cls_token")
        num_class = 0 if class_token is None else class_token.shape[1]  # two where a model was distilled
        if self._facts.block is None:
            return self._run_whole(model, image_BCHW, num_class)
        return self._run_to_block(model, image_BCHW, num_class)

    def _run_whole(self, model: Any, image_BCHW: Tensor, num_class: int) -> ImageTokens:
        tokens = model.forward_features(image_BCHW)
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"timm's {self.model_name} gives a {type(tokens).__name__} of {len(tokens)} where one tensor of patches is "
                "needed: set layer to -1, or choose another model"
            )
        declared = vars(model)  # not every model of timm has the two attributes asked for below
        if tokens.ndim == 4:
            channels_first = declared.get("output_fmt", "NCHW") == "NCHW"
            tokens = tokens.flatten(2).transpose(1, 2) if channels_first else tokens.flatten(1, 2)
        num_prefix = declared.get("num_prefix_tokens", num_class)
        if tokens.shape[1] == num_prefix and self.tokens != "cls":
            raise ValueError(
                f"timm's {self.model_name} gives {num_prefix} class token(s) and no patches: set tokens to cls, layer to -1, "
                "or choose another model"
            )
        return ImageTokens(tokens[:, :num_prefix], tokens[:, num_prefix:], num_class > 0)

    def _run_to_block(self, model: Any, image_BCHW: Tensor, num_class: int) -> ImageTokens:
        arguments: dict[str, Any] = {
            "indices": [self._facts.block],
            "norm": False,
            "stop_early": True,
            "output_fmt": "NCHW",
            "intermediates_only": True,
        }
        if "return_prefix_tokens" in signature(model.forward_intermediates).parameters:
            arguments["return_prefix_tokens"] = True
        [taken] = model.forward_intermediates(image_BCHW, **arguments)
        map_BDHW, prefix_BPD = taken if isinstance(taken, tuple) else (taken, taken.new_empty(len(taken), 0, taken.shape[1]))
        return ImageTokens(prefix_BPD, map_BDHW.flatten(2).transpose(1, 2), num_class > 0 and prefix_BPD.shape[1] > 0)


def _reads_weights(model: nn.Module) -> bool:
    """Whether attention takes the weights of a projection beside a bias of its own, without calling the layer."""
    return any("q_bias" in dict(module.named_parameters(recurse=False)) for module in model.modules())
