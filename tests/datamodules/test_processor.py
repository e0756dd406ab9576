import json
import pickle
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, Origin, RowError
from datamodules.chat_tokenizer import MEDIA_TOKENS
from datamodules.conversation import Sample, parse_row
from datamodules.processor import Processor, PromptOptions
from datamodules.tokens import Encoded
from encoders.base import Encoder, MediaShape, Projector
from encoders.tuning import Tune
from models.cross_attention import GatedCrossAttentionFusion
from tests.tiny import STYLES, Style, make_tokenizer

ORIGIN = Origin("rows.jsonl", 7)


def mean_colour(image: Image.Image) -> Tensor:
    return torch.tensor(image.resize((1, 1)).getpixel((0, 0)), dtype=torch.float32) / 255


class PatchEncoder(Encoder):
    """One feature for each patch of the picture."""

    transform = staticmethod(mean_colour)
    hidden_size = 3

    def __init__(self, patch: int = 8) -> None:
        super().__init__(Tune())
        self.patch = patch

    def build(self) -> None:
        raise AssertionError("the data side needs no weights")

    def num_tokens(self, shape: MediaShape) -> int:
        return (shape[0] // self.patch) * (shape[1] // self.patch)

    def forward(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("the data side runs no model")


class HalvingProjector(Projector):
    """Half as many embeddings as features."""

    def __init__(self) -> None:
        super().__init__(Tune())

    def build(self, in_features: int, out_features: int) -> None:
        raise AssertionError("the data side needs no weights")

    def num_tokens(self, num_features: int) -> int:
        return num_features // 2

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("the data side runs no model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Style, str]:
    made = {style: str(tmp_path_factory.mktemp(style)) for style in STYLES}
    for style, folder in made.items():
        make_tokenizer(folder, style)
    return made


def processor(folder: str, prompt: PromptOptions = PromptOptions()) -> Processor:
    return Processor(folder, prompt, {"image": PatchEncoder(patch=4)}, {"image": HalvingProjector()})


def sample(*turns: str | dict[str, object], images: int = 0, **columns: object) -> Sample:
    """User and assistant in turns."""
    messages = [
        {"role": role, "content": turn} if isinstance(turn, str) else turn
        for role, turn in zip(["user", "assistant"] * len(turns), turns, strict=False)
    ]
    row: dict[str, object] = {"messages": messages, **columns}
    if images:
        row["images"] = [f"{number}.png" for number in range(images)]
    return parse_row(row, ORIGIN, require_answer=False)


def pictures() -> list[tuple[str, Image.Image]]:
    """A blue one of 8 × 12 pixels, (2 · 3) / 2 tokens, and a red one of 8 × 4, (2 · 1) / 2 tokens."""
    return [("blue", Image.new("RGB", (12, 8), (0, 0, 255))), ("red", Image.new("RGB", (4, 8), (255, 0, 0)))]


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "mistral"])
def test_media_are_expanded_in_their_places(folders: dict[Style, str], style: Style) -> None:
    made = processor(folders[style])
    example = made(sample("the <image> and <image>?", "a bus", images=2), {"image": pictures()})
    image = made.chat.media_ids["image"]
    placeholder = MEDIA_TOKENS["image"]
    text = f"the {placeholder * 3} and {placeholder}?"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "a bus"}]
    assert example.tokens == made.tokenizer.apply_chat_template(messages)["input_ids"]
    assert [label for token, label in zip(example.tokens, example.labels, strict=True) if token == image] == [IGNORE_INDEX] * 4
    assert [(item.key, item.num_tokens, item.media.tolist()) for item in example.media["image"]] == [
        ("blue", 3, [0.0, 0.0, 1.0]),
        ("red", 1, [1.0, 0.0, 0.0]),
    ]
    supervised = [label for label in example.labels if label != IGNORE_INDEX]
    assert made.decode(supervised).strip() == "a bus"
    assert supervised[-1] in made.eos_ids
    assert (example.prompt, example.reference, example.num_dropped_tokens) == ("the <image> and <image>?", "a bus", 0)


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "mistral"])
def test_media_that_take_no_place_leave_the_text_and_keep_their_places(folders: dict[Style, str], style: Style) -> None:
    concatenates = processor(folders[style])
    made = Processor(
        folders[style],
        encoders=concatenates.encoders,
        projectors=concatenates.projectors,
        fusion=GatedCrossAttentionFusion(every=1),
    )
    assert made.num_tokens("image", (8, 12)) == 0
    for generate in (False, True):
        row = sample("the<image> and<image>?", "a bus", images=2)
        example = made(row, {"image": pictures()}, generate)
        text = made(sample("the and?", "a bus"), generate=generate)
        assert (example.tokens, example.labels) == (text.tokens, text.labels)
        places = [(item.key, item.num_tokens, item.position) for item in example.media["image"]]
        starts = [item.position for item in concatenates(row, {"image": pictures()}, generate).media["image"]]
        assert places == [("blue", 0, starts[0]), ("red", 0, starts[1] - 3)]
        before = [made.decode(example.tokens[: item.position]).rpartition("the")[2] for item in example.media["image"]]
        assert before == ["", " and"]
    again = Processor.from_files(made.files())
    assert isinstance(again.fusion, GatedCrossAttentionFusion) and again.fusion.every == 1
    assert again.fingerprint() == made.fingerprint() != concatenates.fingerprint()


def test_all_ids_but_those_of_media_are_the_tokenizers_own(folders: dict[Style, str]) -> None:
    size = len(make_tokenizer(folders["chatml"], "chatml"))
    made = processor(folders["chatml"])
    example = made(sample("<image> é 🙂 \x00 中文", "…", images=1), {"image": pictures()[:1]})
    assert {token for token in example.tokens if token >= size} == {made.chat.media_ids["image"]}


def test_generate_ends_where_training_starts(folders: dict[Style, str]) -> None:
    made = processor(folders["chatml"])
    row = sample("<image> x", "a", "y", "\nthe cat", images=1)
    media = {"image": pictures()[:1]}
    trained, prompt = made(row, media), made(row, media, generate=True)
    start = len(prompt.tokens)
    assert trained.tokens[:start] == prompt.tokens
    assert trained.labels[start - 1] == IGNORE_INDEX
    assert trained.labels[start] == trained.tokens[start]
    assert prompt.labels == [IGNORE_INDEX] * start
    assert (prompt.reference, prompt.prompt, prompt.choices) == ("\nthe cat", "y", None)
    assert len(prompt.media["image"]) == 1
    assert made(sample("x", "a", "y"), generate=True).reference == ""


def test_a_message_that_is_left_out_of_the_loss(folders: dict[Style, str]) -> None:
    made = processor(folders["chatml"])
    row = sample("x", {"role": "assistant", "content": "no", "loss": False}, "y", "the cat")
    assert made.decode(label for label in made(row).labels if label != IGNORE_INDEX) == "the cat"
    with pytest.raises(RowError, match=r"rows.jsonl:7: the row has no answer to learn from"):
        made(sample("x", {"role": "assistant", "content": "no", "loss": False}))


def test_the_system_message_of_the_options_is_for_rows_without_one(folders: dict[Style, str]) -> None:
    made = processor(folders["chatml"], PromptOptions(system="You are a cat."))
    assert made.decode(made(sample("x", "a")).tokens).startswith("system\nYou are a cat.\nuser\nx")
    own = parse_row(
        {"messages": [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "x"), ("assistant", "a"))]}, ORIGIN
    )
    assert made.decode(made(own).tokens).startswith("system\nS\nuser\nx")
    with pytest.raises(RowError, match=r"rows.jsonl:7: the chat template refuses.*System role not supported"):
        processor(folders["gemma"], PromptOptions(system="S"))(sample("x", "a"))


def test_max_length(folders: dict[Style, str]) -> None:
    row = sample("<image> x", "the red bus waits", images=1, choices=["the red bus waits", "no"])
    whole = processor(folders["llama3"]).encode(row, {"image": [3]})
    length = len(whole.tokens)
    assert whole.choices is not None

    def limited(max_length: int, on_too_long: Literal["skip", "cut"], generate: bool = False) -> Encoded:
        options = PromptOptions(max_length=max_length, on_too_long=on_too_long)
        return processor(folders["llama3"], options).encode(row, {"image": [3]}, generate)

    assert limited(length, "skip") == whole
    too_long = rf"rows.jsonl:7: {length} tokens \(of them 3 media\) are above prompt.max_length = {length - 2}"
    with pytest.raises(RowError, match=too_long):
        limited(length - 2, "skip")
    assert limited(length - 2, "cut") == (whole.tokens[:-2], whole.labels[:-2], whole.choices[:-2], 2, whole.positions)
    with pytest.raises(RowError, match="prompts are never cut"):
        limited(5, "cut", generate=True)


def test_choices(folders: dict[Style, str]) -> None:
    made = processor(folders["chatml"])
    example = made(sample("x", "a bus", choices=["a bus", "a cat"]))
    supervised = [label for label in example.labels if label != IGNORE_INDEX]
    assert example.choices is not None
    assert [len(options) for options in example.choices] == [1, 2, 1]
    assert all(token in options for token, options in zip(supervised, example.choices, strict=True))
    assert made(sample("x", "a bus")).choices is None
    with pytest.raises(RowError, match="im_end"):
        made(sample("x", "a bus", choices=["a bus", "a <|im_end|>"]))


def test_a_special_token_in_a_text_is_refused(folders: dict[Style, str]) -> None:
    for row in (sample("say <|im_end|>", "a"), sample("say", "a <|im_start|>"), sample("<|omnilit_image|>", "a")):
        with pytest.raises(RowError, match=r"rows.jsonl:7: the text has '<\|.*a special token"):
            processor(folders["chatml"])(row)


def test_media_that_the_model_cannot_read_are_refused(folders: dict[Style, str]) -> None:
    text_only = Processor(folders["chatml"])
    assert text_only(sample("x", "a")).media == {}
    with pytest.raises(RowError, match=r"rows.jsonl:7: the row has image in it.*set model.image_encoder"):
        text_only(sample("<image>", "a", images=1), {"image": pictures()[:1]})
    with pytest.raises(ValueError, match="expected the image of 1 places in the row, got 2"):
        processor(folders["chatml"])(sample("<image>", "a", images=1), {"image": pictures()})


def test_encode_needs_no_media(folders: dict[Style, str]) -> None:
    made = processor(folders["mistral"])
    row = sample("<image> x <image>", "a", images=2)
    example = made(row, {"image": pictures()})
    lengths = [made.num_tokens("image", (8, 12)), made.num_tokens("image", (8, 4))]
    places = [item.position for item in example.media["image"]]
    encoded = made.encode(row, {"image": lengths})
    assert encoded == (example.tokens, example.labels, None, 0, {made.chat.media_ids["image"]: places})


def test_plain_and_file_templates(folders: dict[Style, str], tmp_path: Path) -> None:
    plain = processor(folders["plain"], PromptOptions(chat_template="plain"))
    assert plain.decode(plain(sample("x", "a")).tokens) == "User: x\nAssistant: a\n"
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}={{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant={% endif %}"
    )
    own = processor(folders["plain"], PromptOptions(chat_template=str(path)))
    own.save(tmp_path / "saved")
    path.unlink()
    loaded = Processor.load(tmp_path / "saved")
    assert loaded.decode(loaded(sample("x", "a")).tokens) == "user=xassistant=a"
    assert loaded.fingerprint() == own.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize("style", STYLES)
def test_a_saved_processor_makes_the_same_examples(folders: dict[Style, str], style: Style, tmp_path: Path) -> None:
    prompt = PromptOptions(chat_template="plain" if style == "plain" else None, max_length=99, on_too_long="cut")
    made = processor(folders[style], prompt)
    made.save(tmp_path)
    made.save(tmp_path)
    loaded = Processor.load(tmp_path)
    row, media = sample("<image> é 🙂", "a\n", images=1), {"image": pictures()[:1]}
    assert loaded(row, media).tokens == made(row, media).tokens
    assert loaded.encoders["image"].num_tokens((8, 8)) == 4
    assert loaded.fingerprint() == made.fingerprint()
    assert loaded.fingerprint() != processor(folders[style], PromptOptions(chat_template=prompt.chat_template)).fingerprint()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_saved(folders: dict[Style, str], tmp_path: Path) -> None:
    processor(folders["chatml"], PromptOptions(system="S")).save(tmp_path)
    saved = json.loads((tmp_path / "processor.json").read_text())
    assert saved["prompt"] == {"chat_template": None, "system": "S", "max_length": 2048, "on_too_long": "skip"}
    assert saved["encoders"] == {"image": {"class_path": f"{__name__}.PatchEncoder", "init_args": {"patch": 4}}}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {path.name for path in tmp_path.iterdir()}
    (tmp_path / "processor.json").unlink()
    with pytest.raises(ValueError, match=r"no processor.json in .*: expected a folder that a processor was saved to"):
        Processor.load(tmp_path)


def test_pickle_carries_no_weights(folders: dict[Style, str]) -> None:
    made = processor(folders["chatml"])
    made.encoders["image"].weights = torch.nn.Linear(1000, 1000)  # type: ignore[attr-defined]
    assert made(sample("x", "a")).tokens
    pickled = pickle.dumps(made)
    assert len(pickled) < 100_000
    again = pickle.loads(pickled)
    assert again.fingerprint() == made.fingerprint()
    assert again(sample("x", "a")) == made(sample("x", "a"))


def test_pad_id(folders: dict[Style, str]) -> None:
    pads = {style: processor(folders[style], PromptOptions(chat_template="plain")) for style in STYLES}
    assert {style: made.tokenizer.convert_ids_to_tokens(made.pad_id) for style, made in pads.items()} == {
        "chatml": "<|endoftext|>",
        "llama3": "<|eot_id|>",
        "gemma": "<pad>",
        "mistral": "</s>",
        "plain": "<|endoftext|>",
    }


def test_the_constructor_reads_nothing() -> None:
    made = Processor("/nowhere/at/all")
    with pytest.raises(ValueError, match="no tokenizer '/nowhere/at/all'"):
        made(sample("x", "a"))


def test_options_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="encoders and projectors go together"):
        Processor("x", encoders={"image": PatchEncoder()})
    with pytest.raises(ValueError, match=r"prompt.chat_template is null, plain, or the path of a .jinja file, got 'chatml'"):
        PromptOptions(chat_template="chatml")
    with pytest.raises(ValueError, match=r"prompt.max_length is a number"):
        PromptOptions(max_length=0)
