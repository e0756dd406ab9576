"""Two processors have one fingerprint if and only if they make the same examples."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.fingerprint import differences
from datamodules.processor import Processor, PromptOptions
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector, PixelShuffleMLPProjector
from encoders.tuning import LoRA, Tune
from tests.tiny import make_tokenizer


@pytest.fixture
def make(tiny_clip: Path, tmp_path: Path) -> Callable[..., Processor]:
    tokenizer = tmp_path / "tokenizer"
    make_tokenizer(tokenizer, "chatml")

    def processor(
        tokenizer: Path = tokenizer,
        prompt: PromptOptions = PromptOptions(),
        encoder: HFVisionEncoder | None = None,
        projector: MLPProjector | PixelShuffleMLPProjector | None = None,
    ) -> Processor:
        encoder, projector = encoder or HFVisionEncoder(str(tiny_clip), layer=-2), projector or MLPProjector()
        return Processor(str(tokenizer), prompt, {"image": encoder}, {"image": projector})

    return processor


def check(now: Processor, before: Processor, expected: list[str]) -> None:
    found = differences(now, before)
    assert found == expected
    assert (now.fingerprint() == before.fingerprint()) == (not expected)


def test_how_parts_are_trained_and_where_they_lie_makes_no_other_examples(
    make: Callable[..., Processor], tiny_clip: Path, tmp_path: Path
) -> None:
    plain = make()
    lora = Tune(mode="lora", lr=1e-4, lora=LoRA(r=2))
    moved = shutil.copytree(tiny_clip, tmp_path / "moved")
    check(make(encoder=HFVisionEncoder(str(moved), layer=-1, tune=lora, dtype="bfloat16")), plain, [])
    check(make(projector=MLPProjector(depth=3, tune=Tune(lr=0.5))), plain, [])
    check(make(shutil.copytree(tmp_path / "tokenizer", tmp_path / "copy")), plain, [])
    check(Processor.from_files(plain.files()), plain, [])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PromptOptions(system="Be kind."), "prompt.system was None and is 'Be kind.'"),
        (PromptOptions(max_length=64), "prompt.max_length was 2048 and is 64"),
        (PromptOptions(on_too_long="cut"), "prompt.on_too_long was 'skip' and is 'cut'"),
        (PromptOptions(chat_template="plain"), "the chat template is another"),
    ],
)
def test_the_prompt_makes_the_examples(make: Callable[..., Processor], prompt: PromptOptions, expected: str) -> None:
    check(make(prompt=prompt), make(), [expected])


def test_so_do_tokenizer_pixels_and_tokens(make: Callable[..., Processor], tiny_clip: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "other", "llama3")
    check(make(tmp_path / "other"), make(), ["the chat template is another", "the tokenizer is another"])
    larger = HFVisionEncoder(str(tiny_clip), layer=-2, image_size=64)
    tokens = "the number of tokens of image media was [16, 16, 16] and is"
    check(make(encoder=larger), make(), ["the transform of image_encoder is another", f"{tokens} [64, 64, 64]"])
    check(make(projector=PixelShuffleMLPProjector(factor=2)), make(), [f"{tokens} [4, 4, 4]"])
    text = Processor(str(tmp_path / "tokenizer"))
    assert len(differences(text, make())) == 2
