"""Whisper's encoder.

Shape suffixes: N sounds, V windows, T mel frames, M mel bands, L features of a window, D width.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from encoders.audio_base import AudioEncoder
from encoders.audio_transforms import LogMel
from encoders.hf import load_model, num_blocks, read_config, read_feature_extractor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ENCODER_NAMES = {r"^(model\.)?encoder\.": ""}
"""What stands before the encoder's weights in a checkpoint of the whole model."""


class WhisperEncoder(AudioEncoder):
    """The encoder of Whisper (Radford et al. 2022, arXiv 2212.04356): 50 features a second, of windows of 30 seconds.

    Whisper was trained on 30 seconds only: shorter sounds are filled with silence, to which it attends without a mask. Here a
    short sound is computed on its own length, at a fraction of the time, and takes as many features as it lasts. They are those
    of the 30 seconds if nothing attended to the silence, exactly, and differ from those that do: with whisper-tiny.en on real
    speech by 0.43 of a feature's norm in sounds of 1 second, 0.17 in 5 and 0.10 in 10.

    Args:
        pad_to_30s: Fill the last window with silence, as Whisper was trained: 1,500 features, however short the sound is.
    """

    def __init__(self, *args: Any, pad_to_30s: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad_to_30s = pad_to_30s

    @cached_property
    def transform(self) -> LogMel:
        config: Any = self._config
        options = read_feature_extractor(self.name_or_path)
        num_mels = options.get("feature_size", config.num_mel_bins)
        if num_mels != config.num_mel_bins:
            raise ValueError(
                f"{self.name_or_path} has a preprocessor of {num_mels} mel bands and a model of {config.num_mel_bins}: "
                "give a checkpoint whose preprocessor_config.json belongs to its config.json"
            )
        return LogMel(
            num_mels,
            window=2 * config.max_source_positions,
            pad=self.pad_to_30s,
            sample_rate=options.get("sampling_rate", 16_000),
            num_fft=options.get("n_fft", 400),
            hop=options.get("hop_length", 160),
        )

    @cached_property
    def _config(self) -> "PreTrainedConfig":
        config: Any = read_config(self.name_or_path)
        if config.model_type != "whisper":
            raise ValueError(
                f"name_or_path {self.name_or_path!r} is a model of type {config.model_type!r}, and WhisperEncoder takes whisper: "
                "give such a checkpoint, or another encoder"
            )
        config.encoder_layers = num_blocks(self.layer, config.encoder_layers, self.name_or_path)
        return config

    def build(self) -> None:
        super().build()
        self.model.embed_positions.requires_grad_(False)  # sinusoids, which Whisper does not train

    def _load(self) -> nn.Module:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as HFWhisperEncoder

        config: Any = self._config
        if self.pretrained:
            model: Any = load_model(HFWhisperEncoder, self.name_or_path, config, self.dtype, key_mapping=_ENCODER_NAMES)
        else:
            model = HFWhisperEncoder(config)
        if self.layer is not None:
            model.layer_norm = nn.Identity()
        return model

    def _num_features(self, num_steps: Any) -> Any:
        return (num_steps + 1) // 2  # the second convolution has a stride of 2

    def _run(self, model: Any, windows_VT: Tensor, mask_VT: Tensor | None) -> Tensor:
        """As `forward` of transformers, which takes windows of 30 seconds only, and no mask."""
        from transformers.masking_utils import create_bidirectional_mask

        mel_VMT = windows_VT.transpose(1, 2)
        if mask_VT is not None:  # the convolutions see zeros past the end of a sound, as they do at the end of a window
            mel_VMT = mel_VMT.masked_fill(~mask_VT[:, None], 0)
        hidden_VDT = F.gelu(model.conv1(mel_VMT))
        if mask_VT is not None:
            hidden_VDT = hidden_VDT.masked_fill(~mask_VT[:, None], 0)
        hidden_VLD = F.gelu(model.conv2(hidden_VDT)).transpose(1, 2)
        hidden_VLD = hidden_VLD + model.embed_positions.weight[: hidden_VLD.shape[1]]
        hidden_VLD = F.dropout(hidden_VLD, model.dropout, model.training)
        is_real_VL = None if mask_VT is None else mask_VT[:, ::2]
        attention_mask = create_bidirectional_mask(config=model.config, inputs_embeds=hidden_VLD, attention_mask=is_real_VL)
        for layer in model.layers:
            hidden_VLD = layer(hidden_VLD, attention_mask)
        return model.layer_norm(hidden_VLD)
