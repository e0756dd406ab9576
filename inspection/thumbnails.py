"""What a finding is about, to look at: a small picture, a strip of frames, or the outline of a sound.

Shape suffixes: F frames, S samples.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from datamodules.batch import RowError
from datamodules.media import Decoded
from datamodules.media_audio import Waveform
from datamodules.media_video import Clip
from datamodules.thumbnails import data_uri
from inspection.findings import Place
from inspection.plots import waveform
from inspection.reader import media_of_row
from inspection.records import Part

SIDE = 128
STRIP = 3
SPANS = 160


class Thumbnails:
    """Thumbnails of media, decoded again when they are asked for.

    Args:
        parts: The files that the media stand in.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._made: dict[Place, str] = {}

    def __call__(self, place: Place) -> str:
        """HTML of the medium at a place; of a row as a whole its first medium. Empty where there is none that can be read."""
        if place not in self._made:
            self._made[place] = self._make(place)
        return self._made[place]

    def _make(self, place: Place) -> str:
        dataset = self.parts[place.part].dataset
        try:
            samples = dataset.samples(place.row)
            media = media_of_row(samples)[place.medium or 0 :][:1]
            for sample in samples:
                decoded = dataset.decode(sample)
                for modality, items in decoded.items():
                    for medium, (_, item) in zip(sample.media(modality), items, strict=True):
                        if medium in media:
                            return draw(item)
        except RowError:
            return ""  # the reason beside it says what is wrong
        return ""


def draw(decoded: Decoded) -> str:
    """HTML of a medium."""
    match decoded:
        case Clip():
            numbers = np.linspace(0, len(decoded.frames_FHW3) - 1, STRIP).round().astype(int)
            frames = [Image.fromarray(decoded.frames_FHW3[number]) for number in numbers]
            return f'<span class="strip">{"".join(_picture(frame, SIDE * 3 // 4) for frame in frames)}</span>'
        case Waveform():
            spans = np.array_split(decoded.samples_S, min(SPANS, len(decoded.samples_S)))
            clipped = [np.clip(span_S, -1, 1) for span_S in spans]
            return waveform([float(span_S.min()) for span_S in clipped], [float(span_S.max()) for span_S in clipped])
        case _:
            return _picture(decoded, SIDE)


def _picture(image: Image.Image, side: int) -> str:
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.BILINEAR)
    return f'<img src="{data_uri(small)}" alt="">'
