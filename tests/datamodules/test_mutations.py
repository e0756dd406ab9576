"""Hundreds of broken files of ten formats: none crashes or hangs a run, each bad row is named, and the others do not notice."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.batch import Batch
from datamodules.content import Media
from datamodules.dataset import MultiModalDataset
from datamodules.media import MediaLimits, decode, probe
from datamodules.media_audio import AudioLimits, Waveform
from datamodules.media_image import ImageLimits
from datamodules.media_video import Clip, VideoLimits
from datamodules.modality import MODALITIES, Modality
from datamodules.processor import Processor
from datamodules.sources import MediaError, MediaRoot
from datamodules.video_reader import Library
from encoders.sampling import FrameSampling
from tests.datamodules.loader_fakes import EvenProjector, PixelEncoder, ids, make_loader, same
from tests.datamodules.mutations import FORMATS, good, mutant
from tests.tiny import make_tokenizer

MAX_SECONDS = 5.0
ALARMS = ("crashes its decoder", "makes its decoder fail", "took longer")
"""What is said of a file that no reader has refused itself, and no limit."""


class Digest:
    """Any medium as 16 numbers, which are others as soon as a bit of it is."""

    sampling = FrameSampling(num_frames=4)
    sample_rate = 16_000
    min_samples = 1

    def __call__(self, decoded: Any) -> Tensor:
        match decoded:
            case Clip():
                content = decoded.frames_FHW3.tobytes() + decoded.times_F.tobytes()
            case Waveform():
                content = decoded.samples_S.tobytes()
            case _:
                content = decoded.mode.encode() + str(decoded.size).encode() + decoded.tobytes()
        return torch.tensor(list(hashlib.blake2b(content, digest_size=16).digest())).float().view(1, 16)


class DigestEncoder(PixelEncoder):
    transform = Digest()  # type: ignore[assignment]


def limits(reader: Library = "decord", isolate: bool = True) -> MediaLimits:
    own: dict[str, Any] = {"max_decode_seconds": MAX_SECONDS, "max_memory_bytes": 1_000_000_000}
    return MediaLimits(ImageLimits(**own), VideoLimits(**own, reader=reader), AudioLimits(**own), isolate)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, "chatml")
    encoders = {modality: DigestEncoder() for modality in MODALITIES}
    return Processor(str(folder), encoders=encoders, projectors={modality: EvenProjector() for modality in MODALITIES})


def write_mutants(folder: Path, seeds: range, modalities: tuple[Modality, ...]) -> list[str]:
    """Files of all formats, broken and good ones, in an order that mixes them."""
    names = []
    for extension, modality in FORMATS.items():
        if modality in modalities:
            for seed in seeds:
                names.append(f"bad-{seed}.{extension}")
                (folder / names[-1]).write_bytes(mutant(extension, seed))
            for number in range(3):
                names.append(f"good-{number}.{extension}")
                (folder / names[-1]).write_bytes(good(extension))
    return [names[number] for number in np.random.default_rng(1).permutation(len(names))]


def row_of(name: str) -> str:
    modality = FORMATS[name.rpartition(".")[2]]
    messages = [{"role": "user", "content": f"<{modality}>What is it?"}, {"role": "assistant", "content": "That."}]
    return json.dumps({"id": name, "messages": messages, f"{modality}s": [name]})


def load(folder: Path, lines: list[str], processor: Processor, limits: MediaLimits) -> tuple[list[Batch], dict[int, str]]:
    """The batches of an epoch, and what is said of the rows that are in none."""
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    loader = make_loader(MultiModalDataset(str(path), str(folder), processor, limits=limits), batch_size=8, folder=folder)
    batches = list(loader)
    counts = loader.row_counts()
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    (folder / "skipped.jsonl").unlink()
    assert counts["trained"] + counts["skipped"] == len(lines) and counts["skipped"] == len(skipped)
    assert {row["file"] for row in skipped} == {str(path)}
    return batches, {row["line"] - 1: row["reason"] for row in skipped}


def contents(batches: list[Batch]) -> dict[str, list[float]]:
    """What became of each row's medium."""
    return {
        example["id"]: batch[modality]["media"][item].flatten().tolist()  # type: ignore[literal-required]
        for batch in batches
        for modality in MODALITIES
        if modality in batch
        for row, item in zip(batch[modality]["row_O"].tolist(), batch[modality]["item_O"].tolist(), strict=True)  # type: ignore[literal-required]
        for example in [batch["examples"][row]]
    }


def check_named(names: list[str], skipped: dict[int, str]) -> None:
    for row, reason in skipped.items():
        assert names[row].startswith("bad") and names[row] in reason
        assert not any(alarm in reason for alarm in ALARMS), reason
    num_bad = sum(name.startswith("bad") for name in names)
    assert 0.5 * num_bad < len(skipped) < 0.95 * num_bad  # many are broken, and some are not broken enough


def test_bad_rows_are_named_and_the_batches_of_the_others_do_not_change(tmp_path: Path, processor: Processor) -> None:
    names = write_mutants(tmp_path, range(40), MODALITIES)
    batches, skipped = load(tmp_path, [row_of(name) for name in names], processor, limits("pyav"))
    check_named(names, skipped)
    # the same file with those rows gone for another reason, and the others read in this process
    lines = ['{"id": "gone"}' if row in skipped else row_of(name) for row, name in enumerate(names)]
    expected, missing = load(tmp_path, lines, processor, limits("pyav", isolate=False))
    assert missing.keys() == skipped.keys() and ids(batches) == ids(expected)
    for batch, other in zip(batches, expected, strict=True):
        batch["skipped"], other["skipped"] = [], []
        assert same(batch, other)
    # and a file of the others alone, but for its last row
    lines = [row_of(name) for row, name in enumerate(names) if row not in skipped]
    alone, missing = load(tmp_path, [*lines, "{}"], processor, limits("pyav", isolate=False))
    assert list(missing) == [len(lines)] and contents(alone) == contents(batches)


def test_decord_reads_each_clip_that_it_reads_to_the_same_bits(tmp_path: Path, processor: Processor) -> None:
    """It decodes ahead of what is asked for, in a thread: whether it sees damage behind the last frame wanted is chance."""
    names = write_mutants(tmp_path, range(40), ("video",))
    lines = [row_of(name) for name in names]
    both = []
    for isolate in (True, False):
        batches, skipped = load(tmp_path, lines, processor, limits("decord", isolate))
        if isolate:
            check_named(names, skipped)
        both.append(
            {
                example["id"]: batch["video"]["media"][item].tolist()
                for batch in batches
                if "video" in batch
                for example, item in zip(batch["examples"], batch["video"]["item_O"], strict=True)
            }
        )
        lines = ['{"id": "gone"}' if row in skipped else line for row, line in enumerate(lines)]
    read, read_again = both
    assert read_again.items() <= read.items() and len(read_again) >= 0.8 * len(read)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extension", "reader"), [*((extension, "decord") for extension in FORMATS), ("mp4", "pyav"), ("avi", "pyav")]
)
def test_thousands_of_broken_files(extension: str, reader: Library, tmp_path: Path) -> None:
    """4,800 files, each probed and decoded: read, or refused in a text that names it, in time, and by the reader itself."""
    root, num_bad, num_good = MediaRoot(tmp_path), 0, 0
    for seed in range(1000, 1400):
        name = f"{seed}.{extension}"
        (tmp_path / name).write_bytes(mutant(extension, seed))
        for function in (probe, decode):
            start = time.monotonic()
            try:
                function(Media(FORMATS[extension], name), root, limits(reader), Digest())
                num_good += 1
            except MediaError as error:
                assert name in str(error) and not any(alarm in str(error) for alarm in ALARMS), error
                num_bad += 1
            assert time.monotonic() - start < MAX_SECONDS
    assert min(num_bad, num_good) > 0


def test_a_mutant_is_a_function_of_its_seed() -> None:
    for extension in FORMATS:
        mutants = [mutant(extension, seed) for seed in range(30)]
        assert mutants == [mutant(extension, seed) for seed in range(30)]
        assert len(set(mutants)) > 25 and good(extension) not in mutants[:5]
