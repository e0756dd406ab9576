"""The kinds of media there are; apart, so that a process that only decodes need not import torch."""

from typing import Literal

Modality = Literal["image", "video", "audio"]
MODALITIES: tuple[Modality, ...] = ("image", "video", "audio")
