"""Rows that are looked at, as one page that needs nothing beside itself.

Shape suffixes: C channels, H height, W width, F frames, S samples, T times, M mel bands.
"""

from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.batch import RowError
from datamodules.media_audio import Waveform
from datamodules.media_video import Clip
from datamodules.thumbnails import data_uri
from inspection.look_text import describe, facts, piece_name
from inspection.looked_at import LookedAt, Medium
from inspection.page_style import STYLE
from inspection.pieces import Stretch
from inspection.plots import waveform

SIDE = 160
"""Longest side of a picture on the page, in pixels; smaller ones are shown this large, pixel by pixel."""

OWN_STYLE = """
article { padding: 1rem 0 1.2rem; border-top: 1px solid var(--line); }
article h2 { margin: 0 0 .2rem; padding: 0; border: 0; }
.tokens { margin: .6rem 0; padding: .7rem .9rem; background: var(--head); border: 1px solid var(--line); border-radius: 6px;
  font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens + .tokens { margin-top: -.3rem; }
.role { margin-right: .5rem; color: var(--quiet); font: 12px system-ui, sans-serif; }
.supervised { color: var(--good); font-weight: 700; text-decoration: underline; text-underline-offset: 3px; }
.special { opacity: .6; }
.medium { padding: 0 .35rem; border-radius: 4px; color: var(--back); background: var(--image-tokens); }
.medium.video { background: var(--video-tokens); } .medium.audio { background: var(--audio-tokens); }
.looked { display: flex; flex-wrap: wrap; gap: 1.2rem; margin-top: .5rem; }
.looked figure { max-width: 100%; }
.looked figcaption { margin-top: .3rem; color: var(--quiet); font-size: .8rem; max-width: 34rem; overflow-wrap: anywhere; }
.shots { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-start; }
.shots span { display: block; text-align: center; color: var(--quiet); font-size: .75rem; }
.shots img { display: block; border: 1px solid var(--line); border-radius: 3px; image-rendering: pixelated; }
.looked .sound { width: 320px; height: 80px; }
.bad { color: #b3261e; } @media (prefers-color-scheme: dark) { .bad { color: #f2a39a; } }
"""


def make_page(title: str, rows: Sequence[LookedAt | RowError]) -> str:
    """The page.

    Args:
        title: Its head.
        rows: In order; those that cannot be used with their reasons.
    """
    body = "\n".join(map(_row, rows)) or "<p>No row to look at.</p>"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}{OWN_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n<p>What training gets of each row. Tokens with a loss are "
        '<span class="supervised">green, bold and underlined</span>, special tokens are <span class="special">pale</span>, '
        f"and media show how many tokens they take.</p>\n{body}\n</body></html>\n"
    )


def _row(row: LookedAt | RowError) -> str:
    source = f"{escape(row.origin.source)}: " if row.origin.source else ""
    head = f"<h2>{source}{escape(str(row.origin))}"
    if isinstance(row, RowError):
        return f'<article>{head}</h2><p><b class="bad">Cannot be used:</b> {escape(row.reason)}</p></article>'
    tokens = "".join(_stretch(stretch) for stretches in row.rows for stretch in stretches)
    media = f'<div class="looked">{"".join(map(_medium, row.media))}</div>' if row.media else ""
    return f"<article>{head}<small>id {escape(row.id)} · {escape(facts(row))}</small></h2>{tokens}{media}</article>"


def _stretch(stretch: Stretch) -> str:
    role = f'<span class="role">{escape(stretch.role)}</span>' if stretch.role else ""
    pieces = []
    for piece in stretch.pieces:
        kinds = [piece.kind] * (piece.kind != "text") + [piece.text] * (piece.kind == "medium")
        classes = " ".join([*kinds, *["supervised"] * piece.supervised])
        text = escape(piece_name(piece))
        pieces.append(f'<span class="{classes}" title="{piece.num_tokens} tokens">{text}</span>' if classes else text)
    return f'<div class="tokens">{role}{"".join(pieces)}</div>'


def _medium(medium: Medium) -> str:
    match medium.decoded:
        case Clip():
            labels = [f"{time:.2f} s" for time in medium.decoded.times_F]
            shots = [Image.fromarray(frame) for frame in medium.decoded.frames_FHW3]
            shown = [f"<span>{_picture(shot)}{label}</span>" for shot, label in zip(shots, labels, strict=True)]
        case Waveform():
            shown = [_outline(medium.decoded.samples_S)]
            if medium.tensor.ndim == 2:
                shown.append(f"<span>{_picture(_heat(medium.tensor))}what the encoder gets</span>")
        case _:
            shown = [f"<span>{_picture(medium.decoded.convert('RGB'))}decoded</span>"]
            if medium.tensor.ndim == 3:
                shown.append(f"<span>{_picture(_pixels(medium.tensor))}what the encoder gets</span>")
    caption = f"<b>{escape(medium.modality)}</b> {escape(medium.name)}: {escape(describe(medium))}"
    return f'<figure><div class="shots">{"".join(shown)}</div><figcaption>{caption}</figcaption></figure>'


def _outline(samples_S: np.ndarray) -> str:
    spans = [np.clip(span_S, -1, 1) for span_S in np.array_split(samples_S, min(320, len(samples_S)))]
    return waveform([float(span_S.min()) for span_S in spans], [float(span_S.max()) for span_S in spans])


def _pixels(image_CHW: Tensor) -> Image.Image:
    """A normalised picture, made visible: its least value is black, its greatest white."""
    low, high = image_CHW.aminmax()
    image_HWC = ((image_CHW - low) / (high - low).clamp_min(1e-6)).movedim(0, -1).mul(255).to(torch.uint8).numpy()
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)


def _heat(mel_TM: Tensor) -> Image.Image:
    """A spectrogram: time from left to right, low bands below."""
    return _pixels(mel_TM.T.flip(0)[None].float())


def _picture(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    scale = SIDE / max(small.size)
    width, height = (max(1, round(side * scale)) for side in small.size)
    return f'<img src="{data_uri(small)}" width="{width}" height="{height}" alt="">'
