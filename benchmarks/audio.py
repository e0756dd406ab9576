"""What it costs to encode short sounds on their own length, and filled with silence to 30 seconds, by a random Whisper tiny.

Run: python benchmarks/audio.py
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/audio.py` finds the packages

from datamodules.collate import pad_time
from datamodules.media_audio import Waveform
from encoders.audio import WhisperEncoder

GOAL = 5.0
"""How many times cheaper a batch of sounds of 1 to 5 seconds is to be."""


def write_config(folder: str) -> None:
    """The configuration of Whisper tiny's encoder."""
    from transformers import WhisperConfig

    WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536).save_pretrained(folder)


def sounds(num_sounds: int, shortest: float, longest: float, seed: int) -> list[Waveform]:
    """Noise of random lengths, in seconds."""
    rng = np.random.default_rng(seed)
    lengths = (16_000 * rng.uniform(shortest, longest, num_sounds)).astype(int)
    return [Waveform(0.1 * rng.standard_normal(length, dtype=np.float32), 16_000) for length in lengths]


def measure(encoders: dict[str, WhisperEncoder], clips: list[Waveform], repeats: int) -> dict[str, float]:
    """CPU-seconds of transform and encoder for a batch: the best of some runs that take turns."""
    best = dict.fromkeys(encoders, float("inf"))
    for _ in range(repeats):
        for name, encoder in encoders.items():
            start = time.process_time()
            features_BND, mask_BN = encoder(*pad_time([encoder.transform(clip) for clip in clips]))
            best[name] = min(best[name], time.process_time() - start)
            tokens = [encoder.num_tokens(clip.shape) for clip in clips]
            assert tokens == ([features_BND.shape[1]] * len(clips) if mask_BN is None else mask_BN.sum(1).tolist())
    return best


def main() -> None:
    """Prints the table, then the figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sounds", type=int, default=8, help="sounds a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_config(folder)
        torch.manual_seed(args.seed)
        encoders = {
            "own": WhisperEncoder(name_or_path=folder, pretrained=False),
            "padded": WhisperEncoder(name_or_path=folder, pretrained=False, pad_to_30s=True),
        }
        for encoder in encoders.values():
            encoder.build()
        print(f"CPU-seconds of a batch of {args.sounds} sounds\n{'seconds':10}{'own length':>12}{'30 s':>10}{'times':>8}")
        with torch.inference_mode():
            for shortest, longest in ((1, 1), (1, 5), (5, 10), (20, 30)):
                best = measure(encoders, sounds(args.sounds, shortest, longest, args.seed), args.repeats)
                name = f"{shortest}" if shortest == longest else f"{shortest}-{longest}"
                times = best["padded"] / best["own"]
                figures |= {f"own_{name}s": round(best["own"], 3), f"padded_{name}s": round(best["padded"], 3)}
                figures[f"speedup_{name}s"] = round(times, 2)
                print(f"{name:10}{best['own']:12.3f}{best['padded']:10.3f}{times:8.1f}")
    print(f"goal: {GOAL} times for sounds of 1-5 seconds")
    print(json.dumps({"sounds": args.sounds, **figures}))


if __name__ == "__main__":
    main()
