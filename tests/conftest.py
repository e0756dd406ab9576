"""Tiny random models in folders, pictures, and batches: everything offline, made in milliseconds, the same in every run.

A model is called by its family: `model_folder("gemma2")`. The weights have a large spread, so that what is computed depends on
each position and no two tokens come near a tie.
"""

import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, Batch, Example, MediaItem, Origin
from datamodules.collate import collate
from tests.tiny_configs import IMAGE_SIZE, PATCH_SIZE, VOCABULARY, tiny_config

pytest_plugins = ["tests.datamodules.row_fixtures"]

IMAGE_TOKEN = 601
"""Behind the embedding table: a placeholder that is embedded as a token raises."""
MEDIA_TOKEN_IDS = {"image": IMAGE_TOKEN, "video": 602, "audio": 603}
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2

Layout = Sequence[int | str]
"""A row: a number is so many random text tokens, a name a picture."""


def pytest_configure(config: pytest.Config) -> None:
    """Before a test module imports transformers or torch's thread pool starts: no hub, no progress bars, one thread."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed says on stdout that it finds no other
    torch.set_num_threads(1)
    # autograd begins on what is there: in a mode of fake tensors it would start threads for GPUs, which no fork survives
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same whichever ran before it in its process, which differs from run to run where processes share them."""
    torch.manual_seed(20)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """What a worker of `pytest -n` tells: rows that are not UTF-8, which tests have, cannot be sent as they are."""
    return _sendable((yield))


def _sendable(told: Any) -> Any:
    if isinstance(told, dict):
        return {name: _sendable(value) for name, value in told.items()}
    if isinstance(told, (list, tuple)):
        return type(told)(_sendable(value) for value in told)  # the reason of a skipped module is hashed: a tuple it stays
    return told.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(told, str) else told


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_folder(family)`: a folder with config and random weights, made once; for language models with a ChatML tokenizer.

    Ready multimodal models (`tiny_mllm.FAMILIES`) have their whole processor.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    from tests.encoders.audio_fakes import save_audio_model
    from tests.tiny import make_tokenizer
    from tests.tiny_mllm import FAMILIES, make_mllm

    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family == "whisper" and family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            save_audio_model(family, folders[family])
        if family in FAMILIES and family not in folders:
            folders[family] = make_mllm(tmp_path_factory.mktemp(family), family)
        if family not in folders:
            is_vision = family in ("clip", "siglip", "dinov2")
            with torch.random.fork_rng():
                torch.manual_seed(len(family) + ord(family[-1]))
                model = (AutoModel if is_vision else AutoModelForCausalLM).from_config(tiny_config(family))
            folders[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(folders[family])
            if not is_vision:
                assert len(make_tokenizer(folders[family], "chatml")) <= VOCABULARY
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def tiny_llm(model_folder: Callable[[str], Path]) -> Path:
    """A Llama of two layers, with a ChatML tokenizer."""
    return model_folder("llama")


@pytest.fixture(scope="session")
def tiny_clip(model_folder: Callable[[str], Path]) -> Path:
    """A CLIP vision tower of three layers: 16 patches of a picture of 32 × 32 pixels."""
    return model_folder("clip")


@pytest.fixture(scope="session")
def tiny_siglip(model_folder: Callable[[str], Path]) -> Path:
    """A SigLIP vision tower of the same size."""
    return model_folder("siglip")


@pytest.fixture(scope="session")
def tiny_dinov2(model_folder: Callable[[str], Path]) -> Path:
    """A DINOv2 of the same size."""
    return model_folder("dinov2")


@pytest.fixture(scope="session")
def tiny_whisper(model_folder: Callable[[str], Path]) -> Path:
    """A Whisper of three layers, whose windows are a second long, with its feature extractor."""
    return model_folder("whisper")


@pytest.fixture
def seed() -> Iterator[None]:
    """Draws of torch are the same in each test, and leave no trace: `pytestmark = pytest.mark.usefixtures("seed")`."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(20)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What a run says by `rank_zero_info`."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    logging.getLogger("lightning.pytorch").propagate = True
    return caplog


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """`picture(seed, size=(width, height))`: an RGB picture of random pixels."""

    def make(seed: int = 0, size: tuple[int, int] = (40, 36)) -> Image.Image:
        shape = (size[1], size[0], 3)
        pixels = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    return make


@pytest.fixture
def pictures(picture: Callable[..., Image.Image]) -> list[Image.Image]:
    """Four random pictures of different sizes."""
    return [picture(0, (40, 36)), picture(1, (32, 32)), picture(2, (25, 61)), picture(3, (70, 33))]


@pytest.fixture
def make_model(tiny_llm: Path, tiny_clip: Path) -> Callable[..., Any]:
    """`make_model(llm=None, images=True, seed=3, tune=..., encoder_tune=..., fusion=None)`: a built model, in evaluation mode.

    By default a Llama with LoRA on q_proj and v_proj whose B is not 0, a frozen CLIP of which the last layer but one is taken,
    and an MLP projector that is trained.
    """
    from encoders.image import HFVisionEncoder
    from encoders.projectors import MLPProjector
    from encoders.tuning import Tune
    from models.fusion import Fusion
    from models.language import LanguageModel
    from models.multimodal import MultiModalModel

    frozen, lora, full = Tune(mode="frozen"), Tune(mode="lora"), Tune(mode="full")

    def make(
        llm: Path | None = None,
        images: bool = True,
        seed: int = 3,
        tune: Tune = lora,
        encoder_tune: Tune = frozen,
        projector_tune: Tune = full,
        pretrained: bool = True,
        fusion: Fusion | None = None,
    ) -> MultiModalModel:
        language_model = LanguageModel(str(llm or tiny_llm), pretrained=pretrained, tune=tune)
        encoder = HFVisionEncoder(str(tiny_clip), pretrained=pretrained, layer=-2, tune=encoder_tune) if images else None
        projector = MLPProjector(tune=projector_tune) if images else None
        model = MultiModalModel(language_model, encoder, projector, fusion=fusion)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.build(MEDIA_TOKEN_IDS)
            randomise_adapters(model)
        return model.eval()

    return make


def randomise_adapters(module: torch.nn.Module) -> None:
    """Draws LoRA's B, which starts at 0, so that adapters count."""
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.fixture
def make_lit_module(tiny_llm: Path, tiny_clip: Path) -> Callable[..., Any]:
    """`make_lit_module(**options)`: an unbuilt MultiModalLitModule around the tiny Llama and CLIP; options replace its own."""
    from encoders.image import HFVisionEncoder
    from encoders.projectors import MLPProjector
    from lightning_modules.multimodal import MultiModalLitModule
    from models.language import LanguageModel

    def make(**options: Any) -> MultiModalLitModule:
        parts = {
            "language_model": LanguageModel(str(tiny_llm)),
            "image_encoder": HFVisionEncoder(str(tiny_clip), layer=-2),
            "image_projector": MLPProjector(),
        }
        return MultiModalLitModule(**(parts | options))

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """`make_batch([[3, "a", 4], [5]], side="right", seed=0)`: a batch of random tokens and pixels.

    A number stands for so many text tokens, a name for a picture, the same for the same name, which takes `placeholders` tokens.
    A row's last number is supervised.
    """

    def make(
        layouts: Sequence[Layout], side: Literal["left", "right"] = "right", seed: int = 0, placeholders: int = NUM_PATCHES
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        media = {name: _pixels(generator) for name in sorted({x for layout in layouts for x in layout if isinstance(x, str)})}
        examples = [_example(number, layout, media, placeholders, generator) for number, layout in enumerate(layouts)]
        return collate(examples, pad_id=0, side=side)

    return make


def _pixels(generator: torch.Generator) -> Tensor:
    return torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def _example(number: int, layout: Layout, media: dict[str, Tensor], placeholders: int, generator: torch.Generator) -> Example:
    tokens: list[int] = []
    items: list[MediaItem] = []
    for piece in layout:
        if isinstance(piece, str):
            items.append(MediaItem(piece, media[piece], placeholders, position=len(tokens)))
            tokens += [IMAGE_TOKEN] * placeholders
        else:
            tokens += torch.randint(3, VOCABULARY, (piece,), generator=generator).tolist()
    answer = layout[-1] if isinstance(layout[-1], int) else 0
    labels = [IGNORE_INDEX] * (len(tokens) - answer) + tokens[len(tokens) - answer :]
    return Example(Origin("rows.jsonl", number + 1), str(number), tokens, labels, {"image": items} if items else {})
