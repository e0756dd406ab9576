"""Asks a trained model about pictures: `python -m deployment.ask runs/demo "What is this?" my.jpg`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from datamodules.batch import Origin
from datamodules.collate import collate
from datamodules.conversation import Media, Message, Sample, Text
from datamodules.media import ImageLimits, decode_image
from datamodules.processor import Processor
from datamodules.sources import MediaRoot
from models.language import Generation
from models.multimodal import MultiModalModel


def load(run: Path, checkpoint: Path | None = None) -> tuple[MultiModalModel, Processor]:
    """The model and the processor of a run, ready to answer.

    Args:
        run: The run folder.
        checkpoint: One of its checkpoints; None: the newest.

    Raises:
        ValueError: The folder holds no run, or the checkpoint cannot be used.
    """
    if checkpoint is None:
        checkpoint = run / "checkpoints" / "last.ckpt"
    if not (run / "processor").is_dir():
        raise ValueError(f"{run} is not the folder of a run: expected {run / 'processor'}, which a fit writes. Give --run")
    return MultiModalModel.from_checkpoint(checkpoint), Processor.load(run / "processor")


def ask(run: Path, question: str, pictures: Sequence[Path] = (), options: Generation = Generation()) -> str:
    """Asks one question and returns the answer.

    Args:
        run: The run folder.
        question: The question; pictures stand before it, or where it says <image>.
        pictures: Picture files.
        options: How to decode.

    Raises:
        ValueError: The run, its checkpoint or a picture cannot be used, or the pictures are not as many as the places.
    """
    # a file that the user names here is the user's own: its folder is its media root
    decoded = [(str(path), decode_image(path.name, MediaRoot(path.parent), ImageLimits())) for path in pictures]
    pieces = question.split("<image>") if "<image>" in question else [""] * len(pictures) + [question]
    if len(pieces) != len(pictures) + 1:
        raise ValueError(f"the question says <image> {len(pieces) - 1} times, but {len(pictures)} picture(s) were given")
    content: list[Text | Media] = [Text(pieces[0])]
    for path, text in zip(pictures, pieces[1:], strict=True):
        content += [Media("image", str(path)), Text(text)]
    sample = Sample(Origin("question", 1), "question", (Message("user", tuple(content)),))
    model, processor = load(run)
    example = processor(sample, {"image": decoded} if decoded else {}, generate=True)
    batch = collate([example], processor.pad_id, "left")
    answer = model.generate(batch, options, processor.eos_ids, processor.pad_id)[0]
    return processor.decode(answer).strip()


def main(args: Sequence[str] | None = None) -> None:
    """The command line of `ask`."""
    parser = argparse.ArgumentParser(prog="python -m deployment.ask", description="Asks a trained model about pictures.")
    parser.add_argument("run", type=Path, help="run folder, such as runs/demo")
    parser.add_argument("question", help="the question; pictures stand before it, or where it says <image>")
    parser.add_argument("pictures", type=Path, nargs="*", help="picture files")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length of the answer in tokens (64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding; above 0 tokens are drawn (0)")
    given = parser.parse_args(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        answer = ask(given.run, given.question, given.pictures, Generation(given.max_new_tokens, given.temperature))
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{answer}\n")


if __name__ == "__main__":
    main()
