"""Asks a trained model about pictures, clips and sounds: `python -m deployment.ask runs/demo "What is this?" my.jpg`."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.batch import MODALITIES, Modality, Origin, RowError
from datamodules.collate import collate
from datamodules.content import Media
from datamodules.conversation import parse_row
from datamodules.media import Decoded, MediaLimits, decode
from datamodules.processor import Processor
from datamodules.sources import MediaRoot
from models.checkpoint import read_checkpoint
from models.language import Generation
from models.multimodal import MultiModalModel


def load(path: Path, trust_remote_code: bool = False) -> tuple[MultiModalModel, Processor]:
    """The model and the processor of a run, ready to answer.

    Args:
        path: A checkpoint, which holds both; or the folder of a run, for its newest checkpoint.
        trust_remote_code: Allow a model that was trained with this option to run its code here too.

    Raises:
        ValueError: There is no checkpoint, or it cannot be used.
    """
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    return MultiModalModel.from_saved(checkpoint, trust_remote_code), Processor.from_files(checkpoint["processor"])


def ask(
    model: MultiModalModel,
    processor: Processor,
    question: str,
    media: Mapping[Modality, Sequence[Path]] | None = None,
    options: Generation = Generation(),  # it is frozen
) -> str:
    """Asks one question and returns the answer: the one that `predict` gives to such a row.

    Args:
        model: The model, built.
        processor: Its processor.
        question: The question; media stand before it, or where it says <image>, <video> and <audio>.
        media: Files by modality, in the order of their places; None: none.
        options: How to decode.

    Raises:
        ValueError: A file cannot be used, or there are not as many as places, or the model takes no such media.
    """
    files = {modality: list((media or {}).get(modality, [])) for modality in MODALITIES}
    for modality in reversed(MODALITIES):
        if f"<{modality}>" not in question:
            question = f"<{modality}>" * len(files[modality]) + question
    row = {
        "messages": [{"role": "user", "content": question}],
        **{f"{modality}s": [str(path) for path in paths] for modality, paths in files.items()},
    }
    try:
        sample = parse_row(row, Origin("question", 1), require_answer=False)
        processor.check_media(sample)
        decoded = {
            modality: [(str(path), _open(medium, path, processor)) for medium, path in zip(named, files[modality], strict=True)]
            for modality in MODALITIES
            if (named := sample.media(modality))
        }
        example = processor(sample, decoded, generate=True)
    except RowError as error:
        raise ValueError(error.reason) from error
    batch = collate([example], processor.pad_id, "left")
    answer = model.generate(batch, options, processor.eos_ids, processor.pad_id)[0]
    return processor.decode(answer).strip()


def _open(medium: Media, path: Path, processor: Processor) -> Decoded:
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    path = path.resolve()  # a file that the user names is the user's own, also where a link leads
    transform = processor.encoders[medium.modality].transform
    return decode(replace(medium, source=path.name), MediaRoot(path.parent), MediaLimits(), transform)


def main(args: Sequence[str] | None = None) -> None:
    """The command line of `ask`."""
    parser = argparse.ArgumentParser(prog="python -m deployment.ask", description="Asks a trained model about media.")
    parser.add_argument("run", type=Path, help="run folder, such as runs/demo, or a checkpoint")
    parser.add_argument("question", help="the question; media stand before it, or where it says <image>, <video>, <audio>")
    parser.add_argument("images", type=Path, nargs="*", help="picture files")
    parser.add_argument(
        "--video", type=Path, action="append", default=[], metavar="FILE", help="a video file; repeat it for more"
    )
    parser.add_argument(
        "--audio", type=Path, action="append", default=[], metavar="FILE", help="a sound file; repeat it for more"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length of the answer in tokens (64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding; above 0 tokens are drawn (0)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model: read it first")
    given = parser.parse_intermixed_args(args)  # pictures may also come behind an option
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options = Generation(given.max_new_tokens, given.temperature)
        model, processor = load(given.run, given.trust_remote_code)
        media: dict[Modality, list[Path]] = {"image": given.images, "video": given.video, "audio": given.audio}
        answer = ask(model, processor, given.question, media, options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{answer}\n")


if __name__ == "__main__":
    main()
