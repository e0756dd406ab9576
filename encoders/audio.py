"""The encoders of sound: Whisper, and wav2vec 2.0 with its kin HuBERT and WavLM."""

from encoders.audio_wav2vec2 import Wav2Vec2Encoder
from encoders.audio_whisper import WhisperEncoder

__all__ = ["Wav2Vec2Encoder", "WhisperEncoder"]
