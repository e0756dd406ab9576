"""wav2vec 2.0 and its kin: encoders of raw waveforms.

Shape suffixes: V windows, T samples, L features of a window, C channels of the convolutions, D width.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from encoders.audio_base import AudioEncoder
from encoders.audio_transforms import Samples
from encoders.hf import load_model, num_blocks, read_config, read_feature_extractor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODEL_TYPES = ("wav2vec2", "hubert", "wavlm")
"""Types of model, by transformers' names."""


class Wav2Vec2Encoder(AudioEncoder):
    """wav2vec 2.0 (Baevski et al. 2020, arXiv 2006.11477), HuBERT (Hsu et al. 2021, arXiv 2106.07447), and WavLM (Chen et al.
    2021, arXiv 2110.13900): about 50 features a second.

    Each sound gives the features that it gives alone, of all checkpoints. In transformers those whose `feat_extract_norm` is
    `group` take no mask, since their first norm is over time and counts the padding; here it counts what is real, and the
    attention sees nothing else. What draws random numbers of its own in training (LayerDrop and masked features) is off: it
    would leave weights without a gradient, which DDP refuses, and examples would depend on the process.

    Args:
        normalise: Give each sound a mean of 0 and a variance of 1; None: as the checkpoint's feature extractor says.
        window_seconds: Longer sounds are cut into windows of this length. Within one, time and memory grow with its square.
    """

    def __init__(self, *args: Any, normalise: bool | None = None, window_seconds: float = 30.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if window_seconds < 1:
            raise ValueError(f"window_seconds must be at least 1, got {window_seconds}")
        self.normalise = normalise
        self.window_seconds = window_seconds

    @cached_property
    def transform(self) -> Samples:
        config: Any = self._config
        options = read_feature_extractor(self.name_or_path)
        normalise = options.get("do_normalize") if self.normalise is None else self.normalise
        if normalise is None:
            raise ValueError(
                f"{self.name_or_path} does not say whether its sounds are normalised (it has no preprocessor_config.json with "
                "do_normalize): save its feature extractor beside the weights, or set normalise"
            )
        sample_rate = options.get("sampling_rate", 16_000)
        least = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            least = (least - 1) * stride + kernel
        return Samples(round(self.window_seconds * sample_rate), least, normalise, sample_rate)

    @cached_property
    def _config(self) -> "PreTrainedConfig":
        config: Any = read_config(self.name_or_path)
        if config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"name_or_path {self.name_or_path!r} is a model of type {config.model_type!r}, and Wav2Vec2Encoder takes "
                f"{', '.join(MODEL_TYPES)}: give such a checkpoint, or another encoder"
            )
        options = config.to_dict()
        for option in ("add_adapter", "conv_pos_batch_norm"):
            if options.get(option):
                raise ValueError(
                    f"{self.name_or_path} has {option} in its config.json, which is not supported: give another checkpoint"
                )
        config.num_hidden_layers = num_blocks(self.layer, config.num_hidden_layers, self.name_or_path)
        config.layerdrop = config.mask_time_prob = config.mask_feature_prob = 0.0
        return config

    def build(self) -> None:
        adapted = {target.rpartition(".")[2] for target in self.tune.lora.target_modules} if self.tune.mode == "lora" else set()
        if self._config.model_type == "wavlm" and adapted & {"q_proj", "k_proj", "v_proj", "out_proj"}:
            raise ValueError(
                "WavLM's attention takes the weights of its projections without calling them, so that adapters on them would do "
                "nothing: set lora.target_modules of the audio encoder to intermediate_dense and output_dense"
            )
        if self._config.model_type == "wavlm" and self.compute_dtype is not None and self.dtype != torch.float32:
            raise ValueError(
                "WavLM's attention takes the weights of its projections without calling them, so that nothing could widen them: "
                "set compute_dtype of the audio encoder to null"
            )
        super().build()

    def _load(self) -> nn.Module:
        from transformers import AutoModel

        if self.pretrained:
            model: Any = load_model(AutoModel, self.name_or_path, self._config, self.dtype)
        else:
            model = AutoModel.from_config(self._config, dtype=torch.float32)
        if self.layer is not None and model.config.do_stable_layer_norm:
            model.encoder.layer_norm = nn.Identity()  # in the other models it stands before the blocks
        return model

    def _num_features(self, num_steps: Any) -> Any:
        config: Any = self._config
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            num_steps = (num_steps - kernel) // stride + 1
        return num_steps

    def _run(self, model: Any, windows_VT: Tensor, mask_VT: Tensor | None) -> Tensor:
        """As `forward` of transformers, without its masked features, and with a first norm that counts no padding."""
        first, *others = model.feature_extractor.conv_layers
        if mask_VT is None or model.config.feat_extract_norm != "group":
            hidden_VCL = first(windows_VT[:, None])
        else:
            lengths_V = (mask_VT.sum(1) - model.config.conv_kernel[0]) // model.config.conv_stride[0] + 1
            hidden_VCL = first.activation(_norm_over_time(first.conv(windows_VT[:, None]), lengths_V, first.layer_norm))
        for layer in others:
            hidden_VCL = layer(hidden_VCL)
        projected = model.feature_projection(hidden_VCL.transpose(1, 2))
        hidden_VLD = projected[0] if isinstance(projected, tuple) else projected
        is_real_VL = None
        if mask_VT is not None:
            lengths_V = self._num_features(mask_VT.sum(1))
            is_real_VL = torch.arange(hidden_VLD.shape[1], device=lengths_V.device) < lengths_V[:, None]
        return model.encoder(hidden_VLD, attention_mask=is_real_VL).last_hidden_state


def _norm_over_time(hidden_VCL: Tensor, lengths_V: Tensor, norm: nn.GroupNorm) -> Tensor:
    """The group norm of wav2vec 2.0, in which each channel is a group, over the first `lengths_V` places of each window."""
    is_real_V1L = (torch.arange(hidden_VCL.shape[2], device=lengths_V.device) < lengths_V[:, None])[:, None]
    real_VCL = hidden_VCL.to(torch.promote_types(hidden_VCL.dtype, torch.float32)).masked_fill(~is_real_V1L, 0)
    mean_VC1 = real_VCL.sum(2, keepdim=True) / lengths_V[:, None, None]
    centred_VCL = (real_VCL - mean_VC1).masked_fill(~is_real_V1L, 0)
    variance_VC1 = centred_VCL.square().sum(2, keepdim=True) / lengths_V[:, None, None]
    normed_VCL = (centred_VCL * (variance_VC1 + norm.eps).rsqrt()).to(hidden_VCL.dtype)
    return normed_VCL * norm.weight[:, None] + norm.bias[:, None]
