"""Rows of all kinds in one batch, and what is measured of them by source."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.base import MultiModalDataModule
from datamodules.batch import MODALITIES, Batch
from datamodules.mixture import MixtureDataModule
from datamodules.source import Source
from lightning_modules.losses import AnswerScores
from lightning_modules.multimodal import MultiModalLitModule, Stage
from models.media_shuffle import shuffle_media
from tests.encoders.audio_fakes import save_audio_model
from tests.lightning_modules.media_fakes import make_all, write_media_rows
from tests.lightning_modules.run_fakes import make_trainer

KINDS = ("i", "", "aiv", "a", "v", "iva", "ai", "av", "aa")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    save_audio_model("whisper", folder)
    return folder


@pytest.fixture(scope="module")
def module(tiny_llm: Path, tiny_clip: Path, whisper: Path) -> MultiModalLitModule:
    """A built module, whose space-time attention counts."""
    made = make_all(tiny_llm, tiny_clip, whisper)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        made.configure_model()
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    return made.eval()


@pytest.fixture(scope="module")
def data(module: MultiModalLitModule, tmp_path_factory: pytest.TempPathFactory) -> MultiModalDataModule:
    path = str(write_media_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", KINDS))
    return MultiModalDataModule(train_path=path, test_path=path, batch_size=4, num_workers=0, processor=module.processor)


@pytest.fixture(scope="module")
def mixed(data: MultiModalDataModule) -> Batch:
    """All rows in one batch."""
    dataset = data.dataset("test")
    return data.collate([dataset[row] for row in range(len(dataset))])


@pytest.fixture(scope="module")
def alone(data: MultiModalDataModule) -> list[Batch]:
    """Each row in a batch of its own."""
    dataset = data.dataset("test")
    return [data.collate([dataset[row]]) for row in range(len(dataset))]


def test_a_row_has_the_same_loss_in_a_mixed_batch_as_alone(module: MultiModalLitModule, mixed: Batch, alone: list[Batch]) -> None:
    assert all(mixed[modality]["mask"] is not None for modality in ("video", "audio"))  # they have different lengths
    together = module.score(mixed).nll_B
    torch.testing.assert_close(together, torch.cat([module.score(batch).nll_B for batch in alone]), rtol=1e-5, atol=1e-5)
    assert len({round(float(nll), 3) for nll in together}) == len(KINDS)


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(module: MultiModalLitModule, mixed: Batch, alone: list[Batch]) -> None:
    def gradients(batches: list[Batch]) -> dict[str, Tensor]:
        module.zero_grad()
        for batch in batches:
            loss = module.step(batch, "train")
            assert loss is not None
            loss[0].backward()
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    together, one_by_one = gradients([mixed]), gradients(alone)
    assert together.keys() == one_by_one.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    for name, gradient in together.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, one_by_one[name], rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)


def test_each_medium_lands_at_its_own_placeholders(module: MultiModalLitModule, mixed: Batch) -> None:
    """By modality, row and occurrence, in reading order: found with each medium encoded alone."""
    with torch.no_grad(), module.model.fused(mixed, module.model.encode(mixed)) as embeddings_BTD:
        for modality, (encoder, projector) in module.model.towers().items():
            media = mixed[modality]
            is_own_BT = mixed["tokens_BT"] == module.processor.chat.media_ids[modality]
            found: dict[int, list[Tensor]] = {}
            for item, row, count in zip(media["item_O"], media["row_O"], media["num_tokens_O"], strict=True):
                mask_T = slice(None) if media["mask"] is None else media["mask"][item]
                embeddings_1MD, _ = projector(*encoder(media["media"][item][mask_T][None], None))
                assert embeddings_1MD.shape[1] == count
                found.setdefault(int(row), []).append(embeddings_1MD[0])
            assert is_own_BT.any(1).nonzero().flatten().tolist() == sorted(found)
            for row, embeddings in found.items():
                torch.testing.assert_close(embeddings_BTD[row, is_own_BT[row]], torch.cat(embeddings), rtol=1e-4, atol=1e-5)


def test_media_are_exchanged_within_their_modality_only(module: MultiModalLitModule, mixed: Batch) -> None:
    shuffled = shuffle_media(mixed)
    assert shuffled is not None
    for modality in MODALITIES:
        before, after = mixed[modality], shuffled[modality]
        assert after["media"] is before["media"]
        moved_O = before["item_O"] != after["item_O"]
        assert moved_O.any()
        sizes = dict(zip(before["item_O"].tolist(), before["num_tokens_O"].tolist(), strict=True))
        assert [sizes[item] for item in after["item_O"].tolist()] == before["num_tokens_O"].tolist()
    assert torch.isfinite(module.score(shuffled).nll_B).all()


class Metrics:
    """What rows one by one say."""

    def __init__(self, scores: list[AnswerScores], rows: list[int]) -> None:
        self.nll = sum(float(scores[row].nll_B) for row in rows)
        self.count = sum(int(scores[row].count_B) for row in rows)
        self.exact = sum(bool(scores[row].exact_B) for row in rows) / len(rows)


class MoreMetrics(MultiModalLitModule):
    """As a researcher adds a metric."""

    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        if stage != "train" and batch["examples"]:
            lines = torch.tensor([float(example["line"]) for example in batch["examples"]])
            self.measure(batch, {"line": (lines, torch.ones_like(lines))})
        return super().step(batch, stage)


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[dict[str, Source]]:
    kinds = {"pictures": ["i", "i", "i", "i"], "sounds": ["a", "", "a", ""], "both": ["ia", "ia", "a", "a", "i"]}
    paths = {name: str(write_media_rows(tmp_path / f"{name}.jsonl", rows, answer=name)) for name, rows in kinds.items()}
    yield {name: Source(train_path=path, val_path=path, test_path=path) for name, path in paths.items()}


def test_an_evaluation_measures_by_source(
    tiny_llm: Path, tiny_clip: Path, whisper: Path, sources: dict[str, Source], tmp_path: Path
) -> None:
    torch.manual_seed(4)
    module = make_all(tiny_llm, tiny_clip, whisper, MoreMetrics)
    data = MixtureDataModule(sources, batch_size=3, num_workers=0, processor=module.processor)
    trainer = make_trainer(tmp_path)
    (metrics,) = trainer.test(module, data, verbose=False)
    dataset = data.test_dataset
    scores = [module.score(data.collate([dataset[row]])) for row in range(len(dataset))]
    places = {"pictures": range(4), "sounds": range(4, 8), "both": range(8, 13)}
    for prefix, rows in {"": range(13), **{f"{name}/": rows for name, rows in places.items()}}.items():
        expected = Metrics(scores, list(rows))
        assert metrics[f"test/{prefix}loss"] == pytest.approx(expected.nll / expected.count, rel=1e-5)
        assert metrics[f"test/{prefix}exact_match"] == expected.exact
    assert [metrics[f"test/{prefix}line"] for prefix in ("pictures/", "sounds/", "both/")] == [2.5, 2.5, 3.0]
    assert metrics["test/line"] == pytest.approx((10 + 10 + 15) / 13)
    gains = {name.removeprefix("test/") for name in metrics if "gain" in name}
    assert {"media_gain", "media_gain_image", "media_gain_audio", "pictures/media_gain_image"} <= gains
    assert not gains & {"media_gain_video", "pictures/media_gain_audio", "sounds/media_gain_image"}
    assert not any("accuracy" in name for name in metrics)  # no row has choices
    (alone,) = trainer.test(
        module, MixtureDataModule({"both": sources["both"]}, num_workers=0, processor=module.processor), verbose=False
    )
    assert not any(name.startswith("test/both/") for name in alone)  # one source says what all rows say


def test_media_gain_of_a_modality_is_over_the_rows_that_lose_it_alone(module: MultiModalLitModule, tmp_path: Path) -> None:
    path = str(write_media_rows(tmp_path / "gain.jsonl", ["i", "a", "i", "a", "i", "a"]))  # three sounds as long
    data = MultiModalDataModule(test_path=path, batch_size=6, num_workers=0, processor=module.processor)
    (metrics,) = make_trainer(tmp_path).test(module, data, verbose=False)
    dataset = data.dataset("test")
    batch = data.collate([dataset[row] for row in range(6)])
    gains: dict[str, float] = {}
    before = module.score(batch)
    for modality in ("image", "audio"):
        item_O = batch[modality]["item_O"]
        other: Any = batch | {modality: batch[modality] | {"item_O": item_O.roll(-1)}}
        gains[modality] = float((module.score(other).nll_B - before.nll_B).sum())
    count = int(before.count_B[:3].sum())
    assert metrics["test/media_gain_image"] == pytest.approx(gains["image"] / count, rel=1e-3)
    assert metrics["test/media_gain_audio"] == pytest.approx(gains["audio"] / count, rel=1e-3)
    assert metrics["test/media_gain"] == pytest.approx((gains["image"] + gains["audio"]) / (2 * count), rel=1e-3)
    assert abs(gains["image"]) > 1e-3 and abs(gains["audio"]) > 1e-3
