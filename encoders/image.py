"""The vision encoders: any timm model, and the vision models of transformers."""

from encoders.image_hf import HFVisionEncoder
from encoders.image_timm import TimmEncoder

__all__ = ["HFVisionEncoder", "TimmEncoder"]
