import json
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.augment import ImageAugment, rng
from datamodules.batch import IGNORE_INDEX, Example, RowError
from datamodules.collate import Collate
from datamodules.conversation import parse_row
from datamodules.dataset import MultiModalDataset
from datamodules.media import MediaLimits
from datamodules.media_image import ImageLimits, decode_image
from datamodules.portion import Portion
from datamodules.processor import Processor, PromptOptions
from datamodules.row_dataset import RowKey
from datamodules.sampler import GlobalBatches, RowSampler
from datamodules.sources import MediaRoot
from tests.datamodules.loader_fakes import ids, make_processor, make_row, pixels, same, write_rows

JITTER = ImageAugment(crop_scale=(0.3, 0.9), flip=0.5, brightness=0.5)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 6)


def make(
    path: Path, processor: Processor, augment: ImageAugment | None = None, rows: list[int] | None = None
) -> MultiModalDataset:
    return MultiModalDataset(str(path), str(path.parent), processor, augment=augment, seed=11, rows=rows)


def picture(example: Example) -> torch.Tensor:
    return example.media["image"][0].media


def test_a_row_becomes_what_the_processor_makes_of_it(path: Path, processor: Processor) -> None:
    dataset = make(path, processor)
    assert len(dataset) == 6
    for number in range(6):
        sample = parse_row(json.loads(path.read_text().splitlines()[number]), dataset.file.origin(number))
        image = decode_image(f"{number}.png", MediaRoot(path.parent), ImageLimits())
        expected = processor(sample, {"image": [("", image)]})
        got = dataset[number]
        assert (got.id, got.origin, got.tokens, got.labels) == (str(number), expected.origin, expected.tokens, expected.labels)
        assert torch.equal(picture(got), picture(expected))


def test_the_lines_of_its_rows(path: Path, processor: Processor) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["", *lines[:3], "  ", "", *lines[3:]]))  # rows 0 to 5 stand in lines 2, 3, 4, 7, 8, 9
    for rows, expected in ((None, [2, 3, 4, 7, 8, 9]), ([0, 2, 3, 5], [2, 4, 7, 9]), ([4], [8])):
        dataset = make(path, processor, rows=rows)
        assert [line for line in range(12) if dataset.has_line(line)] == expected


def test_prompts_for_generation_need_no_answer(path: Path, processor: Processor) -> None:
    question = {"id": "q", "messages": [{"role": "user", "content": "What is it?"}]}
    path.write_text(json.dumps(question) + "\n" + json.dumps(make_row(1)) + "\n")
    prompts = MultiModalDataset(str(path), str(path.parent), processor, generate=True)
    assert [prompts[row].reference for row in (0, 1)] == ["", "It is 1."]
    assert set(prompts[0].labels) <= {IGNORE_INDEX} and "It is" not in processor.decode(prompts[1].tokens)
    with pytest.raises(RowError, match=r"rows\.jsonl:1: there is no answer"):
        make(path, processor)[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "not JSON"),
        (json.dumps(make_row(3, "nowhere.png")), "nowhere.png does not exist"),
        (json.dumps(make_row(3, "bad.png")), "bad.png"),
        (json.dumps(make_row(3, "3.png", answer="very " * 900)), "above prompt.max_length"),
        (json.dumps({"id": 3, "image": "3.png"}), "none of the known forms"),
    ],
)
def test_a_bad_row_is_named_and_costs_one_row(path: Path, processor: Processor, line: str, reason: str) -> None:
    (path.parent / "bad.png").write_bytes(b"not a picture")
    write_rows(path, 6, lines={3: line})
    dataset = make(path, processor)
    with pytest.raises(RowError) as caught:
        dataset[3]
    assert caught.value.origin.line == 4 and caught.value.origin.file == str(path)
    assert reason in caught.value.reason and str(caught.value).startswith(f"{path}:4: ")
    items = dataset.__getitems__([RowKey(row, 0) for row in range(6)])
    assert [type(item) for item in items] == [Example] * 3 + [RowError] + [Example] * 2
    assert str(items[3]) == str(caught.value)


def test_a_picture_above_the_limits_is_a_bad_row(path: Path, processor: Processor) -> None:
    dataset = make(path, processor)
    dataset.limits = MediaLimits(image=ImageLimits(max_pixels=63))
    with pytest.raises(RowError, match=r"rows\.jsonl:1: 0\.png"):
        dataset[0]


def test_augmentation_is_a_function_of_seed_epoch_and_row(path: Path, processor: Processor) -> None:
    dataset, plain = make(path, processor, JITTER), make(path, processor)
    keys = [RowKey(row, epoch) for epoch in (0, 3) for row in range(6)]
    once = {key: dataset[key] for key in keys}
    for key in reversed(keys):
        again = dataset[key]
        assert torch.equal(picture(again), picture(once[key]))
        assert again.media["image"][0].key == once[key].media["image"][0].key
    assert len({example.media["image"][0].key for example in once.values()}) == len(keys)
    assert len({str(picture(example).tolist()) for example in once.values()}) == len(keys)
    image = decode_image("4.png", MediaRoot(path.parent), ImageLimits())
    assert torch.equal(picture(once[RowKey(4, 3)]), pixels(JITTER(image, rng(11, 3, 4, 0))))
    assert torch.equal(picture(plain[RowKey(4, 3)]), pixels(image))


def test_a_held_out_row_keeps_its_augmentation(path: Path, processor: Processor) -> None:
    whole, part = make(path, processor, JITTER), make(path, processor, JITTER, rows=[1, 4, 5])
    assert len(part) == 3 and part[1].id == "4"
    assert torch.equal(picture(part[RowKey(1, 2)]), picture(whole[RowKey(4, 2)]))


def test_a_picture_has_one_key_unless_it_is_changed(path: Path, processor: Processor) -> None:
    row = make_row(0, "0.png")
    row["messages"][0]["content"] = "<image><image>What?"
    row["images"] = ["0.png", "0.png"]
    path.write_text(json.dumps(row) + "\n" + json.dumps(make_row(1, "0.png")) + "\n")

    def num_keys(augment: ImageAugment | None) -> int:
        dataset = make(path, processor, augment)
        return len({item.key for number in (0, 1) for item in dataset[number].media["image"]})

    assert num_keys(None) == 1
    assert num_keys(ImageAugment(crop_scale=(1, 1), brightness=0, contrast=0, saturation=0)) == 1
    assert num_keys(JITTER) == 3


def test_what_is_wrong_for_all_rows_is_said_at_once(path: Path, processor: Processor) -> None:
    folder = str(path.parent)
    with pytest.raises(ValueError, match=r"prompt_template 'Q: \{question' is malformed"):
        MultiModalDataset(str(path), folder, processor, prompt_template="Q: {question")
    with pytest.raises(ValueError, match=r"media_root .*/pictures does not exist"):
        MultiModalDataset(str(path), f"{folder}/pictures", processor)
    with pytest.raises(ValueError, match=r"missing\.jsonl cannot be read"):
        MultiModalDataset(f"{folder}/missing.jsonl", folder, processor)


def test_flat_rows_take_the_prompt_template(path: Path, processor: Processor) -> None:
    path.write_text(json.dumps({"image": "2.png", "question": "Which?", "answer": "That."}) + "\n")
    example = MultiModalDataset(str(path), str(path.parent), processor, prompt_template="Q: {question}")[0]
    assert (example.prompt, example.reference) == ("<image>Q: Which?", "That.")
    assert torch.equal(picture(example), pixels(decode_image("2.png", MediaRoot(path.parent), ImageLimits())))


def test_a_pickled_dataset_gives_the_same_rows(path: Path, processor: Processor) -> None:
    dataset = make(path, processor, JITTER, rows=[5, 0, 2])
    copy = pickle.loads(pickle.dumps(dataset))
    for key in (RowKey(0, 1), RowKey(2, 0)):
        assert copy[key].tokens == dataset[key].tokens
        assert torch.equal(picture(copy[key]), picture(dataset[key]))


@pytest.mark.slow
def test_spawned_workers_give_the_same_batches(path: Path, tmp_path: Path) -> None:
    """As on macOS, where workers get what they need by pickle."""
    write_rows(path, 6, lines={2: "{"})
    dataset = make(path, make_processor(tmp_path / "tokenizer", PromptOptions(system="Be brief.")), JITTER)

    def batches(num_workers: int) -> list:
        return list(
            DataLoader(
                dataset,
                batch_sampler=GlobalBatches(RowSampler([Portion(6)], True, seed=1), 2),
                collate_fn=Collate(dataset.processor.pad_id, "right"),
                num_workers=num_workers,
                multiprocessing_context="spawn" if num_workers else None,
            )
        )

    here, there = batches(0), batches(2)
    assert sorted(row for batch in ids(here) for row in batch) == ["0", "1", "3", "4", "5"]
    assert all(same(left, right) for left, right in zip(here, there, strict=True))
