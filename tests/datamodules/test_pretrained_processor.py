"""The data side of ready models: counts from headers, what is learnt, what is refused, and coming back from files."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.batch import IGNORE_INDEX, RowError
from datamodules.collate import collate
from datamodules.fingerprint import differences
from datamodules.media_video import Clip
from datamodules.parts import media_shape
from datamodules.pretrained_processor import PretrainedProcessor
from datamodules.processor import Processor
from datamodules.prompt_options import PromptOptions
from datamodules.ready_chat import ReadyChat, load_ready
from datamodules.ready_media import metadata
from encoders.sampling import FrameSampling
from encoders.tuning import Tune
from models.pretrained import PretrainedMLLM
from tests.mllm_rows import Row, decoded, example_of, media_of, rows_of, sample_of
from tests.tiny_mllm import FAMILIES, LLAVA_TEMPLATE, QWEN_VL_TEMPLATE

Make = Callable[..., PretrainedProcessor]


@pytest.fixture
def make(model_folder: Callable[[str], Path]) -> Make:
    """`make(family, prompt=PromptOptions(), **options of the model)`."""

    def processor(family: str, prompt: PromptOptions = PromptOptions(), **options: Any) -> PretrainedProcessor:
        folder = str(model_folder(family))
        return PretrainedProcessor(folder, prompt, PretrainedMLLM(name_or_path=folder, **options))

    return processor


def question(*content: Any, answer: str = "A dog.") -> Row:
    return [("user", list(content)), ("assistant", [answer])]


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_are_counted_from_the_shape_alone_and_stand_where_the_items_say(family: str, make: Make) -> None:
    processor = make(family)
    for row in rows_of(family):
        example = example_of(row, processor)
        for modality, items in example.media.items():
            names = media_of(row, modality)
            shapes = [media_shape(decoded(modality, name)) for name in names]
            # Gemma 3's template has another word for an image than its processor
            ids = {processor.chat.media_ids[modality]} & processor.chat.placeholder_ids or processor.chat.placeholder_ids
            if not (family == "llava_onevision" and len(names) > 1):  # which takes several images otherwise than one
                assert [item.num_tokens for item in items] == [processor.num_tokens(modality, shape) for shape in shapes]
            assert [item.key for item in items] == names
            for item in items:
                assert example.tokens[item.position] in ids and example.tokens[item.position - 1] not in ids
            assert sum(item.num_tokens for item in items) == sum(token in ids for token in example.tokens)
        counts = {m: [item.num_tokens for item in items] for m, items in example.media.items()}
        planned = processor.encode(sample_of(row), counts)
        writes_more = {"qwen3_vl": "video", "gemma3": "image"}  # the times of frames; line breaks around an image
        if writes_more.get(family) not in counts:
            assert planned.tokens == example.tokens and planned.labels == example.labels


def test_the_answers_that_are_in_the_loss_are_learnt_and_no_other(make: Make) -> None:
    processor = make("qwen2_5_vl", PromptOptions(system="You are a bus."))
    row = rows_of("qwen2_5_vl")[2]
    sample = sample_of(row)
    first, second = [message for message in sample.messages if message.role == "assistant"]
    half = replace(sample, messages=tuple(replace(m, supervised=m is second) for m in sample.messages))
    media: Any = {"image": [(name, decoded("image", name)) for name in media_of(row, "image")]}
    whole, part = processor(sample, media), processor(half, media)
    assert whole.tokens == part.tokens
    assert _learnt(processor, whole) == ["The cat is white.<|im_end|>", "It is a picture of a boat.<|im_end|>"]
    assert _learnt(processor, part) == ["It is a picture of a boat.<|im_end|>"]
    asked = processor(sample, media, generate=True)
    assert asked.tokens == whole.tokens[: len(asked.tokens)] and asked.reference == second.text
    assert set(asked.labels) <= {IGNORE_INDEX} and first.text in processor.tokenizer.decode(asked.tokens)
    text = processor.tokenizer.decode(whole.tokens)
    assert text.startswith("<|im_start|>system\nYou are a bus.<|im_end|>\n<|im_start|>user\nIs <|vision_start|><|image_pad|>")
    assert processor.decode(whole.tokens).count("<image>") == 3


def _learnt(processor: Processor, example: Any) -> list[str]:
    spans, before = [], IGNORE_INDEX
    for label in example.labels:
        if label != IGNORE_INDEX:
            spans += [[]] if before == IGNORE_INDEX else []
            spans[-1].append(label)
        before = label
    return [processor.tokenizer.decode(span) for span in spans]


def test_choices_are_those_of_the_last_answer(make: Make) -> None:
    processor = make("llava")
    sample = replace(sample_of(question(("image", "60x80"), "Cat or dog?", answer="cat")), choices=("cat", "dog"))
    example = processor(sample, {"image": [("a", decoded("image", "60x80"))]})
    assert example.choices is not None
    firsts = [processor.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("cat", "dog")]
    assert example.choices[0] == sorted(firsts) and len(example.choices) == sum(x != IGNORE_INDEX for x in example.labels)


def test_it_comes_back_from_its_files_and_into_workers(make: Make, tmp_path: Path) -> None:
    processor = make("qwen2_5_vl", PromptOptions(max_length=600), image_resize={"shortest_edge": 784, "longest_edge": 3136})
    processor.save(tmp_path)
    row = rows_of("qwen2_5_vl")[4]
    expected = example_of(row, processor)
    for copy in (Processor.load(tmp_path), pickle.loads(pickle.dumps(processor))):
        example = example_of(row, copy)
        assert isinstance(copy, PretrainedProcessor) and copy.fingerprint() == processor.fingerprint()
        assert example.tokens == expected.tokens and example.token_types == expected.token_types
        torch.testing.assert_close(example.inputs, expected.inputs, rtol=0, atol=0)
    assert json.loads((tmp_path / "processor.json").read_text())["prompt"]["max_length"] == 600


def test_the_fingerprint_is_of_what_makes_other_examples(make: Make) -> None:
    processor = make("qwen2_5_vl")
    same = make("qwen2_5_vl", tune=Tune(mode="full", lr=1.0), vision_tune=Tune(mode="lora"))
    assert processor.fingerprint() == same.fingerprint()
    smaller = make("qwen2_5_vl", image_resize={"shortest_edge": 784, "longest_edge": 3136})
    assert any("image" in difference for difference in differences(smaller, processor))
    denser = make("qwen2_5_vl", sampling=FrameSampling(num_frames=9))
    assert any("video" in difference for difference in differences(denser, processor))
    assert processor.num_tokens("image", (200, 200)) == 4 * smaller.num_tokens("image", (200, 200)) == 16


def test_true_times_reach_the_model(make: Make) -> None:
    pixels = np.zeros((4, 56, 56, 3), np.uint8)
    uneven = Clip(pixels, np.array([10.0, 10.5, 12.0, 13.0]))
    told = metadata(uneven)
    assert told.timestamps == pytest.approx([10.0, 10.5, 12.0, 13.0], abs=1e-6)
    assert told.sampled_fps == pytest.approx(1.0, rel=1e-6)  # a frame a second in the mean
    (text,) = make("qwen3_vl").prepare("video", [uneven]).replacements
    assert text.startswith("<10.2 seconds><|vision_start|>") and "<12.5 seconds>" in text
    inputs = make("qwen2_5_vl").prepare("video", [uneven, Clip(pixels[:1], np.array([3.0]))]).inputs
    torch.testing.assert_close(inputs["second_per_grid_ts"], torch.tensor([2.0, 2.0]))


def test_media_that_the_model_cannot_read_whole_cost_their_row(make: Make) -> None:
    seen, heard = make("qwen2_5_vl"), make("qwen2_audio")
    with pytest.raises(RowError, match="has audio in it, but .* takes image and video only"):
        example_of(question(("audio", "1.0"), "What?"), seen)
    with pytest.raises(RowError, match=r"a sound of 4.10 s is longer than the 4 s that the model hears"):
        example_of(question(("audio", "4.1"), "What?"), heard)
    with pytest.raises(RowError, match="so small that the model gives it no token"):
        example_of(question(("audio", "0.01"), "What?"), heard)
    with pytest.raises(RowError, match="aspect ratio"):
        example_of(question(("image", "10x3000"), "What?"), seen)
    with pytest.raises(RowError, match="special token"):
        example_of(question("What is <|image_pad|>?"), seen)
    with pytest.raises(RowError, match=r"above prompt.max_length = 20"):
        example_of(question(("image", "60x80"), "What?"), make("qwen2_5_vl", PromptOptions(max_length=20)))


def test_a_long_answer_is_cut_where_asked_for_and_a_medium_never(make: Make) -> None:
    row = question(("image", "60x80"), "What?", answer="The animal is a small brown dog on the water at the street.")
    whole = example_of(row, make("qwen2_5_vl"))
    cut = example_of(row, make("qwen2_5_vl", PromptOptions(max_length=len(whole.tokens) - 4, on_too_long="cut")))
    assert cut.tokens == whole.tokens[:-4] and cut.num_dropped_tokens == 4 and len(cut.token_types or []) == len(cut.tokens)
    with pytest.raises(RowError, match="would cut a medium"):
        within = whole.media["image"][0].position + 2
        example_of(row, make("qwen2_5_vl", PromptOptions(max_length=within, on_too_long="cut")))


def test_rows_that_share_media_share_their_inputs(make: Make) -> None:
    processor = make("qwen2_5_vl")
    rows = [
        question(("image", "60x80"), "What?"),
        question("Why?"),
        question(("image", "60x80"), "Where?"),
        question(("image", "60x80"), ("image", "90x40"), "Who?"),
    ]
    batch = collate([example_of(row, processor) for row in rows], processor.pad_id)
    assert list(batch["image"]["inputs"]) == [(0,), (0, 1)]
    assert batch["image"]["row_O"].tolist() == [0, 2, 3, 3] and batch["image"]["media"].numel() == 0


@pytest.mark.parametrize("trim", [False, True])
def test_what_a_medium_becomes_is_written_after_the_template(trim: bool, make: Make, tmp_path: Path) -> None:
    """A template that trims a message must not trim what the processor writes for a medium (Gemma 3 begins it with two lines)."""
    template = QWEN_VL_TEMPLATE.replace("{{ content.text }}", "{{ content.text | trim }}") if trim else QWEN_VL_TEMPLATE
    (tmp_path / "chat.jinja").write_text(template.replace("<|vision_start|><|image_pad|>", "<|image_pad|>"))
    ready = load_ready(make("qwen2_5_vl").name_or_path, str(tmp_path / "chat.jinja"))
    chat = ReadyChat(ready, "test").with_media({"image": ["\n\n<|vision_start|><|image_pad|><|image_pad|>"]})
    tokens = chat.write([("user", "<|omnilit_image|>What? "), ("assistant", "A dog.")], [1])
    expected = "user\n\n\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>What?" + ("" if trim else " ") + "<|im_end|>"
    assert expected in ready.tokenizer.decode(tokens.ids)
    (span,) = tokens.spans
    assert ready.tokenizer.decode(tokens.ids[span.start : span.stop]) == "A dog.<|im_end|>"


def test_the_tokenizer_puts_its_first_token_where_the_template_does_not(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """LLaVA 1.5: `<s>` comes from the tokenizer, not from the template."""
    from tokenizers import processors
    from transformers import AutoProcessor

    ready = AutoProcessor.from_pretrained(model_folder("llava"))
    bos = ("<|endoftext|>", ready.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    ready.tokenizer.bos_token = bos[0]
    single = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    ready.tokenizer.backend_tokenizer.post_processor = single
    ready.chat_template = "{% for message in messages %}" + LLAVA_TEMPLATE.removeprefix("{% for message in messages %}")
    ready.save_pretrained(tmp_path)
    row = question(("image", "60x80"), "What?")
    example = example_of(row, PretrainedProcessor(str(tmp_path), PromptOptions(), PretrainedMLLM(name_or_path=str(tmp_path))))
    chat = [
        {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0]} for p in content]}
        for role, content in row
    ]
    loaded = AutoProcessor.from_pretrained(tmp_path)
    expected = loaded(text=loaded.apply_chat_template(chat), images=[[decoded("image", "60x80")]])["input_ids"][0]
    assert example.tokens == list(expected) and example.tokens[0] == bos[1] != example.tokens[1]


def test_templates_and_folders_that_do_not_fit_are_refused(make: Make, tiny_llm: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jinja").write_text(QWEN_VL_TEMPLATE.replace("message.content is string", "true"))
    with pytest.raises(ValueError, match="takes only a text as the content of some message"):
        example_of(question("What?"), make("qwen2_5_vl", PromptOptions(chat_template=str(tmp_path / "text.jinja"))))
    with pytest.raises(ValueError, match="plain has no place for media"):
        make("qwen2_5_vl", PromptOptions(chat_template="plain")).chat  # noqa: B018
    with pytest.raises(ValueError, match="it is no ready multimodal model"):
        PretrainedProcessor(str(tiny_llm), PromptOptions(), PretrainedMLLM(name_or_path=str(tiny_llm))).chat  # noqa: B018
    with pytest.raises(ValueError, match="no processor 'nowhere'"):
        PretrainedProcessor("nowhere", PromptOptions(), PretrainedMLLM(name_or_path="nowhere")).chat  # noqa: B018
