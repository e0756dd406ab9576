"""Sizes of rows are those of their examples, found without decoding, and kept."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.answer_form import AnswerForm
from datamodules.batch import RowError
from datamodules.batching import Batching
from datamodules.collate import collate
from datamodules.dataset import MultiModalDataset
from datamodules.loader import RowLoader, StatefulLoader
from datamodules.packing import RowSize, RowSizes
from datamodules.prompt_options import PromptOptions
from datamodules.row_sizes import agree_on_sizes, row_sizes
from lightning_modules.processors import make_processor
from models.multimodal import MultiModalModel
from models.pretrained import PretrainedMLLM
from tests.datamodules.loader_fakes import write_rows
from tests.lightning_modules.media_fakes import make_all, write_media_rows


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dataset(tmp_path: Path, row_processor) -> MultiModalDataset:
    """Nine rows, of which one is malformed and one lacks its picture."""
    path = write_rows(tmp_path / "rows.jsonl", 9, {3: "{"})
    rows = path.read_text().splitlines()
    longer = json.loads(rows[1])
    longer["messages"][-1]["content"] += " and a few more words"
    rows[1] = json.dumps(longer)
    lost = json.loads(rows[5])
    lost["images"] = ["lost.png"]
    rows[5] = json.dumps(lost)
    path.write_text("\n".join(rows) + "\n")
    return MultiModalDataset(str(path), str(tmp_path), row_processor)


def test_sizes_are_those_of_the_examples(dataset, monkeypatch):
    expected = []
    for row in range(len(dataset)):
        try:
            example = dataset[row]
        except RowError:
            expected.append((0, 0))
            continue
        expected.append((len(example.tokens), 2 * len(example.media.get("image", []))))
    assert expected.count((0, 0)) == 2
    assert len({tokens for tokens, _ in expected}) > 2
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("a picture was decoded"))
    before = torch.get_rng_state()
    sizes = row_sizes(dataset, num_workers=0)
    assert torch.equal(torch.get_rng_state(), before)  # or the first run of all would be another one
    assert [*zip(sizes.tokens_R.tolist(), sizes.encoded_R.tolist(), strict=True)] == expected


@pytest.mark.parametrize("family", ["own parts", "qwen2_5_vl", "qwen2_audio"])
def test_sizes_of_pictures_clips_and_sounds_are_those_of_the_processor(family, tmp_path, model_folder, tiny_llm, tiny_clip):
    kinds = ["a", "", "aa"] if family == "qwen2_audio" else ["i", "v", "", "iv", "ii"]
    if family == "own parts":
        model, kinds = make_all(tiny_llm, tiny_clip, model_folder("whisper")).model, [*kinds, "a", "iva"]
    else:
        model = MultiModalModel(PretrainedMLLM(name_or_path=str(model_folder(family))))
    processor = make_processor(model, PromptOptions(max_length=4096))
    dataset = MultiModalDataset(str(write_media_rows(tmp_path / "rows.jsonl", kinds)), str(tmp_path), processor)
    sizes = row_sizes(dataset, num_workers=0)
    assert sizes.tokens_R.tolist() == [len(dataset[row].tokens) for row in range(len(kinds))]
    assert [encoded > 0 for encoded in sizes.encoded_R.tolist()] == [kind != "" for kind in kinds]


def test_they_are_found_again_and_not_where_something_changed(dataset, cache_home, monkeypatch):
    first = row_sizes(dataset, num_workers=0)
    with monkeypatch.context() as change:
        size = MultiModalDataset.size
        change.setattr(MultiModalDataset, "size", lambda own, row: size(own, row) if row in (3, 5) else pytest.fail("read again"))
        again = row_sizes(dataset, num_workers=0)
    assert np.array_equal(first.tokens_R, again.tokens_R)
    (kept,) = (cache_home / "omnilit" / "sizes").iterdir()
    path = Path(dataset.file.path)
    path.write_text(path.read_text())  # a new time
    other = MultiModalDataset(str(path), str(path.parent), dataset.processor, rows=[0, 1, 2])
    assert len(row_sizes(other, num_workers=0).tokens_R) == 3
    assert len([*kept.parent.iterdir()]) == 2


def test_workers_find_the_same(dataset):
    alone = [dataset.size(row)[:2] if row not in (3, 5) else (0, 0) for row in range(9)]
    sizes = row_sizes(dataset, num_workers=2)
    assert [*zip(sizes.tokens_R.tolist(), sizes.encoded_R.tolist(), strict=True)] == alone


def test_answers_share_their_prompt(tmp_path, row_processor):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    question = "<image>What is the colour of the bus at the corner of the street?"
    row = {"prompt": question, "chosen": "A red bus.", "rejected": "It is blue.", "images": ["a.png"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    for shared in (True, False):
        form = AnswerForm("pairs", shared_prompt=shared)
        dataset = MultiModalDataset(str(tmp_path / "pairs.jsonl"), str(tmp_path), row_processor, answer_form=form)
        batch = collate([dataset[0]], pad_id=0)
        assert dataset.size(0) == (batch["num_tokens"], 2, *batch["tokens_BT"].shape)
        assert len(batch["tokens_BT"]) == (1 if shared else 2)


def a_trainer(ckpt_path: Path | None = None) -> SimpleNamespace:
    alone = SimpleNamespace(reduce_boolean_decision=lambda is_done: is_done, broadcast=lambda sizes: sizes)
    return SimpleNamespace(global_rank=0, ckpt_path=ckpt_path, strategy=alone, datamodule=SimpleNamespace())


def agreed(dataset: MultiModalDataset, ckpt_path: Path | None = None) -> StatefulLoader:
    loader = StatefulLoader(dataset, 1, {}, shuffle=True, batching=Batching("packed", max_tokens=60))
    agree_on_sizes(loader, a_trainer(ckpt_path))
    return loader


def test_what_could_not_be_read_is_looked_at_again(dataset, monkeypatch):
    """A start before the pictures were copied must not leave rows without a size for ever."""
    lost = row_sizes(dataset, num_workers=0).tokens_R
    assert np.flatnonzero(lost == 0).tolist() == [3, 5]
    looked_at = []
    size = MultiModalDataset.size
    monkeypatch.setattr(MultiModalDataset, "size", lambda own, row: looked_at.append(row) or size(own, row))
    Image.new("RGB", (30, 20), "red").save(dataset.media_root.path / "lost.png")
    found = row_sizes(dataset, num_workers=0).tokens_R
    assert looked_at == [3, 5]
    assert found[5] == len(dataset[5].tokens) and np.flatnonzero(found != lost).tolist() == [5]


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_run_goes_on_with_the_sizes_that_it_began_with(dataset, tmp_path, cache_home, is_folder):
    """Whoever looks at the same rows meanwhile, and whatever he finds."""
    picture, path = dataset.media_root.path / "lost.png", tmp_path / "last.ckpt"
    first = agreed(dataset)
    if is_folder:
        path.mkdir()
    checkpoint = {"SimpleNamespace": {"train": first.state_dict()}, "state_dict": {"weight": torch.rand(3)}}
    torch.save(checkpoint, path / "meta.pt" if is_folder else path)
    Image.new("RGB", (30, 20), "red").save(picture)
    assert row_sizes(dataset, num_workers=0).tokens_R[5] > 0  # as `plan` does
    other = agreed(dataset)  # another run
    assert other.sizes().tokens_R[5] > 0
    for _ in range(2):
        resumed = agreed(dataset, path)
        resumed.load_state_dict(first.state_dict())
        assert all(np.array_equal(*pair) for pair in zip(resumed.sizes(), first.sizes(), strict=True))
        assert [*resumed.batches] == [*first.batches]
        picture.unlink(missing_ok=True)  # gone again
    own = first.state_dict()["order"]["hash of the rows' sizes"]
    (kept,) = (cache_home / "omnilit" / "sizes").glob(f"*{own}.npy")
    kept.unlink()
    with pytest.raises(ValueError, match=rf"a file whose name ends in {own}\.npy. Where data and options"):
        agreed(dataset, path).load_state_dict(first.state_dict())
    other_limits = StatefulLoader(dataset, 1, {}, shuffle=True, batching=Batching("packed", max_tokens=80))
    other_limits.sizes.known = first.sizes.known
    with pytest.raises(ValueError, match=r"belongs to batching.*model\.init_from$"):
        other_limits.load_state_dict(first.state_dict())


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_rows_that_cannot_be_used_are_not_all_put_into_one_batch(kind):
    tokens = np.array([30] * 10 + [0] * 40)
    packs = Batching(kind, max_tokens=150).packs(RowSizes(tokens, np.zeros_like(tokens)))
    assert max(map(len, packs.lists())) == 5


def test_a_look_at_many_rows_is_kept_in_parts_and_the_processes_meet_meanwhile(tmp_path, row_processor, monkeypatch):
    monkeypatch.setattr("datamodules.row_sizes._SECONDS", 0.0)
    monkeypatch.setattr("datamodules.row_sizes._ROWS", 4)
    dataset = MultiModalDataset(str(write_rows(tmp_path / "rows.jsonl", 11)), str(tmp_path), row_processor)
    met = []

    class Strategy:
        def reduce_boolean_decision(self, is_done: bool) -> bool:
            met.append(is_done)
            if len(met) == 2:
                raise KeyboardInterrupt  # the run is ended in the middle
            return is_done

        def broadcast(self, sizes: RowSizes) -> RowSizes:
            return sizes

    loader = RowLoader(dataset, 1, {}, batching=Batching("packed"))
    trainer = SimpleNamespace(global_rank=0, ckpt_path=None, strategy=Strategy())
    with pytest.raises(KeyboardInterrupt):
        agree_on_sizes(loader, trainer)
    looked_at = []
    size = MultiModalDataset.size
    monkeypatch.setattr(MultiModalDataset, "size", lambda own, row: looked_at.append(row) or size(own, row))
    agree_on_sizes(loader, trainer)
    assert looked_at == [8, 9, 10] and met == [False, False, True]
    assert loader.sizes().tokens_R.tolist() == [len(dataset[row].tokens) for row in range(11)]
    other = RowLoader(dataset, 1, {}, batching=Batching("packed"))
    told = SimpleNamespace(reduce_boolean_decision=lambda is_done: is_done, broadcast=lambda sizes: loader.sizes())
    agree_on_sizes(other, SimpleNamespace(global_rank=1, ckpt_path=None, strategy=told))  # does not look itself
    assert other.sizes() is loader.sizes()


def test_many_small_sources_do_not_keep_the_processes_apart(tmp_path, row_processor, monkeypatch):
    """The timeout of their group is 10 minutes with NCCL: a minute for each of 12 sources is too long."""
    now, met = [0.0], [0.0]
    monkeypatch.setattr("datamodules.row_sizes.time", SimpleNamespace(monotonic=lambda: now[0]))
    size = MultiModalDataset.size

    def slowly(own: MultiModalDataset, row: int) -> RowSize:
        now[0] += 11.0
        return size(own, row)

    monkeypatch.setattr(MultiModalDataset, "size", slowly)

    def reduce_boolean_decision(is_done: bool) -> bool:
        met.append(now[0])
        return is_done

    strategy = SimpleNamespace(reduce_boolean_decision=reduce_boolean_decision, broadcast=lambda sizes: sizes)
    files = [write_rows(tmp_path / f"{number}.jsonl", 5) for number in range(12)]  # 55 seconds each
    sources = [MultiModalDataset(str(path), str(tmp_path), row_processor) for path in files]
    loader = SimpleNamespace(
        batches=SimpleNamespace(batching=Batching("packed")),
        dataset=SimpleNamespace(sources=sources),
        num_workers=0,
        sizes=SimpleNamespace(known=None),
    )
    agree_on_sizes(loader, SimpleNamespace(global_rank=0, ckpt_path=None, strategy=strategy))
    assert (
        max(np.diff(met)) == 110.0 and met[-1] == 12 * 55.0
    )  # two sources, as a source's rows are looked at some hundreds at a time
    assert loader.sizes.known.tokens_R.tolist() == [len(source[row].tokens) for source in sources for row in range(5)]


@pytest.mark.parametrize("answer_form", [AnswerForm("pairs", shared_prompt=False), AnswerForm("pairs", corrupt_media=True)])
def test_padded_batches_of_answers_that_share_nothing_fit(tmp_path, row_processor, answer_form):
    generator = np.random.default_rng(2)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    rows = [
        {"prompt": "<image>Say it.", "chosen": "word " * int(number), "rejected": "no", "images": ["a.png"]}
        for number in generator.integers(1, 60, 40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = MultiModalDataset(str(tmp_path / "pairs.jsonl"), str(tmp_path), row_processor, answer_form=answer_form)
    groups = Batching("padded", max_tokens=2000).packs(row_sizes(dataset, num_workers=0)).lists()
    places = [collate([dataset[int(row)] for row in group], 0)["tokens_BT"].numel() for group in groups]
    assert len(groups) > 1 and max(places) <= 2000
    assert np.median(places) > 1500


def test_a_packed_epoch_has_each_good_row_once(tmp_path, make_image_data):
    data = make_image_data(batching=Batching(kind="packed", max_tokens=120), max_skipped=0.5)
    data.setup("fit")
    batches = [*data.train_dataloader()]
    lines = sorted(example["line"] for batch in batches for example in batch["examples"])
    assert lines == [1, 2, 3, 4, 5, 6, 7]
    assert any(batch["segments_BT"].max() > 1 for batch in batches)
    assert data.row_counts() == {"rows": 7, "trained": 7, "skipped": 0, "not_reached": 0, "dropped_tokens": 0}


def test_a_packed_run_goes_on_where_it_stopped(make_image_data):
    options = {"batching": Batching(kind="packed", max_tokens=60), "batch_size": 1}

    def lines(loader) -> list[list[int]]:
        return [[example["line"] for example in batch["examples"]] for batch in loader]

    whole = make_image_data(**options)
    whole.setup("fit")
    expected = lines(whole.train_dataloader()) + lines(whole.train_dataloader())
    stopped = make_image_data(**options)
    stopped.setup("fit")
    loader = iter(stopped.train_dataloader())
    taken = [[example["line"] for example in next(loader)["examples"]] for _ in range(2)]
    state = stopped.state_dict()
    resumed = make_image_data(**options)
    resumed.setup("fit")
    resumed.load_state_dict(state)
    rest = lines(resumed.train_dataloader()) + lines(resumed.train_dataloader())
    assert taken + rest == expected
    other = make_image_data(**options | {"batching": Batching(kind="packed", max_tokens=80)})
    other.setup("fit")
    with pytest.raises(ValueError, match="batching Batching"):
        other.load_state_dict(state)
        other.train_dataloader()
