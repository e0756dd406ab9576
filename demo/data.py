"""All data of the demo, made ready once from what the repository ships:

python -m demo.data
"""

from pathlib import Path

from demo import motion, pictures, speech
from demo.rows import Modality
from demo.weights import CACHE


def prepare_all(cache: Path = CACHE) -> dict[Modality, dict[str, Path]]:
    """Writes the rows and the media of each modality; does nothing where they are there.

    Args:
        cache: The folders `fashion`, `motion` and `speech` go in here.

    Returns:
        For `image`, `video` and `audio` the files `train`, `val` and `test` (JSONL), for `image` also `preference`, and their
        `media_root`.

    Raises:
        ValueError: A folder holds something else, or something that the repository ships is missing or damaged.
    """
    return {
        "image": pictures.prepare(cache / "fashion"),
        "video": motion.prepare(cache / "motion"),
        "audio": speech.prepare(cache / "speech"),
    }


if __name__ == "__main__":
    for modality, files in prepare_all().items():
        print(f"{modality}: {', '.join(str(file) for file in files.values())}")
