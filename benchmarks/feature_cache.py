"""What the feature cache saves: two epochs with it and without it, for images, clips and sounds.

A language model of the shape of SmolLM2-135M with LoRA; DINOv2-small for images and for the frames of clips, Whisper-tiny for
sounds; random weights, media made on the spot. The losses of both runs are compared bit by bit. CPU-seconds of one thread.

Run: python benchmarks/feature_cache.py
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from transformers import Dinov2Config, LlamaConfig, WhisperConfig
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/feature_cache.py` finds the packages

from datamodules.base import MultiModalDataModule
from datamodules.cache import CacheOptions
from encoders.audio import WhisperEncoder
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.sampling import FrameSampling
from encoders.tuning import LoRA, Tune
from encoders.video import VideoEncoder
from lightning_modules.multimodal import MultiModalLitModule
from models.language import LanguageModel

KINDS = ("image", "video", "audio")
TOKENIZER = Path(__file__).parents[1] / "demo/tiny/llm"


def write_models(folder: Path, num_layers: int) -> None:
    """Configurations of real shapes; the weights are drawn when they are built."""
    shutil.copytree(TOKENIZER, folder / "llm")
    vocabulary = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]
    llm = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    llm.save_pretrained(folder / "llm")
    Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518).save_pretrained(folder / "dinov2")
    WhisperConfig(encoder_layers=4, encoder_attention_heads=6, d_model=384, encoder_ffn_dim=1536).save_pretrained(
        folder / "whisper"
    )


def write_rows(folder: Path, kind: str, num_rows: int) -> Path:
    """Rows with one medium each: an image of 512 × 384, a clip of 4 seconds in 320 × 240, or a sound of 2 to 5 seconds."""
    rng = np.random.default_rng(len(kind))
    lines = []
    for number in range(num_rows):
        match kind:
            case "image":
                name = f"{number}.jpg"
                Image.fromarray(_blobs(rng, 384, 512)).save(folder / name)
            case "video":
                name = f"{number}.mp4"
                _write_clip(folder / name, rng)
            case _:
                import soundfile

                name = f"{number}.wav"
                soundfile.write(folder / name, rng.normal(0, 0.1, int(16_000 * rng.uniform(2, 5))), 16_000)
        messages = [{"role": "user", "content": f"<{kind}>What?"}, {"role": "assistant", "content": f"A {number % 7}."}]
        lines.append(json.dumps({"messages": messages, f"{kind}s": [name]}) + "\n")
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(lines))
    return path


def _blobs(rng: np.random.Generator, height: int, width: int) -> Any:
    return np.kron(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))


def _write_clip(path: Path, rng: np.random.Generator) -> None:
    import av

    pixels = _blobs(rng, 240, 320)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 240, 320, "yuv420p"
        for number in range(100):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(pixels, 3 * number, axis=1), format="rgb24")))
        file.mux(stream.encode(None))


def make_module(folder: Path, cache: CacheOptions | None) -> MultiModalLitModule:
    lora = Tune(mode="lora", lora=LoRA(target_modules=("q_proj", "v_proj")))
    dinov2 = str(folder / "dinov2")
    frames = HFVisionEncoder(name_or_path=dinov2, pretrained=False, image_size=112, pool=4)
    return MultiModalLitModule(
        LanguageModel(str(folder / "llm"), pretrained=False, tune=lora),
        image_encoder=HFVisionEncoder(name_or_path=dinov2, pretrained=False, image_size=224, pool=4),
        image_projector=MLPProjector(),
        video_encoder=VideoEncoder(frames=frames, sampling=FrameSampling(num_frames=8), num_layers=1),
        video_projector=MLPProjector(),
        audio_encoder=WhisperEncoder(name_or_path=str(folder / "whisper"), pretrained=False, stack=8),
        audio_projector=MLPProjector(),
        feature_cache=cache,
    )


class Epochs(Callback):
    """CPU-seconds of each epoch, and the loss of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


def run(folder: Path, rows: Path, cache: CacheOptions | None, batch_size: int) -> tuple[Epochs, dict[str, torch.Tensor]]:
    """Two epochs, in a new order each."""
    torch.manual_seed(7)
    module, epochs = make_module(folder, cache), Epochs()
    data = MultiModalDataModule(train_path=str(rows), batch_size=batch_size, num_workers=0, processor=module.processor)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[epochs],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    return epochs, {name: weight.detach().clone() for name, weight in module.named_parameters() if weight.requires_grad}


def main() -> None:
    """Prints a line a modality, then the figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24, help="rows of each modality")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--llm-layers", type=int, default=30, help="30 as SmolLM2-135M; fewer for a quick look")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    seconds = {"without": 0.0, "with": 0.0}
    figures: dict[str, Any] = {"rows": args.rows, "bit_identical": True}
    print(f"{args.rows} rows      {'without':>9}{'1st with':>10}{'2nd with':>10}  CPU-s  speed-up  identical  MB on disk")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_models(folder, args.llm_layers)
            rows = write_rows(folder, kind, args.rows)
            plain, expected = run(folder, rows, None, args.batch_size)
            cached, got = run(folder, rows, CacheOptions(str(folder / "cache")), args.batch_size)
            megabytes = sum(path.stat().st_size for path in (folder / "cache").rglob("*.safetensors")) / 1e6
        identical = plain.losses == cached.losses and all(torch.equal(got[name], weight) for name, weight in expected.items())
        speedup = plain.seconds[1] / cached.seconds[1]
        print(
            f"{kind:<12}{plain.seconds[1]:>9.1f}{cached.seconds[0]:>10.1f}{cached.seconds[1]:>10.1f}{speedup:>16.2f}  "
            f"{identical!s:>9}{megabytes:>12.1f}",
            flush=True,
        )
        seconds["without"] += plain.seconds[1]
        seconds["with"] += cached.seconds[1]
        figures[f"{kind}_second_epoch_speedup"] = round(speedup, 3)
        figures["bit_identical"] &= identical
    figures["second_epoch_speedup"] = round(seconds["without"] / seconds["with"], 3)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
