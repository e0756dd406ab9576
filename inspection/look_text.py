"""Rows that are looked at, as text for the terminal: what is supervised is green, bold and underlined."""

from typing import TYPE_CHECKING

from datamodules.batch import RowError
from datamodules.media import Decoded
from datamodules.media_audio import Waveform
from datamodules.media_video import Clip
from inspection.looked_at import LookedAt, Medium
from inspection.pieces import Piece, Stretch, visible

if TYPE_CHECKING:
    from rich.text import Text

SUPERVISED, SPECIAL, MEDIUM, QUIET = "bold underline green", "dim", "bold magenta", "dim"


def row_text(row: LookedAt | RowError) -> "Text":
    """A row, or why it cannot be used."""
    from rich.text import Text

    if isinstance(row, RowError):
        return Text.assemble(
            (f"{_source(row)}{row.origin}  ", "bold"), ("cannot be used: ", "bold red"), visible(row.reason), "\n"
        )
    text = Text.assemble((f"{_source(row)}{row.origin}", "bold"), (f"  id {visible(row.id)} · {facts(row)}\n", QUIET))
    for stretches in row.rows:
        for stretch in stretches:
            text.append_text(_stretch(stretch))
    for medium in row.media:
        text.append(f"  {medium.modality} {visible(medium.name)}: {describe(medium)}\n", style=QUIET)
    return text


def facts(row: LookedAt) -> str:
    """What can be counted of a row, in words."""
    told = [f"{row.num_tokens:,} tokens", f"{row.num_supervised:,} supervised"]
    for medium in dict.fromkeys(medium.modality for medium in row.media):
        told.append(f"{sum(own.num_tokens for own in row.media if own.modality == medium):,} {medium}")
    if row.choices:
        told.append(f"choices: {visible(', '.join(row.choices))}")
    if row.num_dropped_tokens:
        told.append(f"{row.num_dropped_tokens:,} tokens cut off by max_length")
    return " · ".join(told)


def describe(medium: Medium) -> str:
    """A medium as it was decoded, and what its encoder gets of it."""
    shape = " x ".join(map(str, medium.tensor.shape))
    gets = f"; its encoder gets {shape}" if medium.tensor.numel() else ""
    return f"{_decoded(medium.decoded)}{gets}"


def _decoded(decoded: Decoded) -> str:
    match decoded:
        case Clip():
            frames, height, width = decoded.shape
            times = ", ".join(f"{time:.2f}" for time in decoded.times_F)
            return f"{frames} frames of {width} x {height} at {times} s"
        case Waveform():
            return f"{len(decoded.samples_S) / decoded.sample_rate:.2f} s at {decoded.sample_rate:,} Hz"
        case _:
            return f"{decoded.width} x {decoded.height}"


def _stretch(stretch: Stretch) -> "Text":
    from rich.text import Text

    text = Text(f"  [{stretch.role}] " if stretch.role else "  ", style=QUIET)
    for piece in stretch.pieces:
        shown = piece_name(piece)
        style = SUPERVISED if piece.supervised else {"text": "", "special": SPECIAL, "medium": MEDIUM}[piece.kind]
        text.append(shown.replace("\n", "⏎\n  "), style=style)
    text.rstrip()
    return text.append("\n")


def piece_name(piece: Piece) -> str:
    """A piece as it is written; a medium with the number of its tokens."""
    return f"<{piece.text} ×{piece.num_tokens}>" if piece.kind == "medium" else visible(piece.text)


def _source(row: LookedAt | RowError) -> str:
    return f"[{row.origin.source}] " if row.origin.source else ""
