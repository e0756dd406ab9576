"""The pictures that the demo leaves: a contact sheet of held-out media with the model's answers, and the course of the training.

Shape suffixes: F frames, H height, W width, S samples, T mel frames, M mel bands.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from demo.motion import FRAMES
from demo.rows import Modality
from demo.scores import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN: dict[Modality, str] = {"image": "pictures", "video": "clips", "audio": "recordings"}
"""What the media of the demo are called."""
GRIDS: dict[Modality, tuple[int, int]] = {"image": (2, 8), "video": (2, 3), "audio": (2, 6)}
"""Rows and columns of each part of the contact sheet."""
HEIGHTS = (3.1, 2.8, 3.1)
"""Of the parts, in inches."""
STRIP_FRAMES = 4
"""Frames of a clip in the sheet: as many as the model sees."""
ARROWS = {"left": "←", "right": "→", "up": "↑", "down": "↓"}
RIGHT, WRONG, GREY = "#1a7f37", "#c62828", "#555555"
COLOURS: dict[Modality, str] = {"image": "#1f5fa8", "video": "#b25e00", "audio": "#6a3d9a"}


def draw_sheet(answers: Mapping[Modality, Sequence[Mapping[str, Any]]], media_roots: Mapping[Modality, Path], path: Path) -> None:
    """Draws held-out media with the right answer and the model's: pictures, clips as their frames, sounds as mel spectrograms.

    Args:
        answers: By modality rows with their `response`, `reference`, `right` and `prompt`.
        media_roots: By modality the folder that the media of these rows lie below.
        path: The file that is written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, sum(HEIGHTS)), layout="constrained")
    draw = {"image": _draw_picture, "video": _draw_clip, "audio": _draw_sound}
    parts: Any = figure.subfigures(len(answers), 1, height_ratios=HEIGHTS)
    for part, (modality, rows) in zip(parts, answers.items(), strict=True):
        right = sum(row["right"] for row in rows)
        question = rows[0]["prompt"].replace(f"<{modality}>", "")
        part.suptitle(f"Held-out {SHOWN[modality]}: “{question}”   {right} of {len(rows)} right", size=13)
        axes: Iterator[Axes] = part.subplots(*GRIDS[modality]).flat
        for axis, row in zip(axes, rows, strict=True):
            draw[modality](axis, media_roots[modality], row[f"{modality}s"][0])
            axis.set_title(_named(row["response"]), color=RIGHT if row["right"] else WRONG, size=11, weight="bold", pad=3)
            axis.set_xlabel(f"right: {_named(row['reference'])}", size=8, color=GREY, labelpad=2)
            axis.set_xticks([])
            axis.set_yticks([])
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)  # the grain of the clips would take half a megabyte


def num_shown(modality: Modality) -> int:
    """How many rows of a modality the contact sheet has room for."""
    rows, columns = GRIDS[modality]
    return rows * columns


def _named(answer: str) -> str:
    return f"{ARROWS[answer]} {answer}" if answer in ARROWS else answer or "(nothing)"


def _draw_picture(axis: "Axes", media_root: Path, file: str) -> None:
    from matplotlib import image

    axis.imshow(image.imread(media_root / file), cmap="gray", interpolation="nearest")


def _draw_clip(axis: "Axes", media_root: Path, file: str) -> None:
    import av

    with av.open(str(media_root / file)) as container:
        frames_FHW3 = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    middles = (np.arange(STRIP_FRAMES) + 0.5) * FRAMES / STRIP_FRAMES
    gap_HW3 = np.full((frames_FHW3.shape[1], 4, 3), 255, np.uint8)
    pieces = [piece for number in middles.astype(int) for piece in (frames_FHW3[number], gap_HW3)]
    axis.imshow(np.concatenate(pieces[:-1], axis=1))
    axis.set_frame_on(False)


def _draw_sound(axis: "Axes", media_root: Path, file: str) -> None:
    import soundfile
    import torch

    from encoders.audio_transforms import LogMel

    samples_S, sample_rate = soundfile.read(media_root / file, dtype="float32")
    mel_TM = LogMel(80, window=3000).frames(torch.from_numpy(samples_S)).numpy()
    seconds, bands = len(samples_S) / sample_rate, mel_TM.shape[1]
    axis.imshow(mel_TM.T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, bands))
    times_S = np.arange(len(samples_S)) / sample_rate
    axis.plot(times_S, -0.25 * bands + 0.2 * bands * samples_S / np.abs(samples_S).max(), color=COLOURS["audio"], linewidth=0.4)
    axis.set_ylim(-0.5 * bands, bands)


def draw_report(report: Mapping[str, Any], metrics: Path, path: Path) -> None:
    """Draws the loss of each training step, accuracy on validation rows, and accuracy on held-out media before and after.

    Args:
        report: The figures by modality.
        metrics: What CSVLogger wrote.
        path: The file that is written.
    """
    from matplotlib.figure import Figure

    with metrics.open(newline="", encoding="utf-8") as file:
        logged = list(csv.DictReader(file))
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    loss, course, bars = figure.subplots(1, 3, width_ratios=[4, 3, 4])
    loss.plot(*_points(logged, "train/loss"), color="#404040", linewidth=1)
    loss.set(xlabel="step", ylabel="loss (nats a token)", title="training, all three together", ylim=(0, None))
    for place, (modality, task) in enumerate(TASKS.items()):
        scores, colour = report[modality], COLOURS[modality]
        steps, values = _points(logged, f"val/{task.source}/accuracy")
        course.plot([0, *steps], [scores["accuracy_before"], *values], color=colour, marker="o", label=modality)
        drawn = bars.bar(
            [place - 0.2, place + 0.2], [scores["accuracy_before"], scores["accuracy_after"]], 0.38, color=["#b0b0b0", colour]
        )
        bars.bar_label(drawn, [f"{scores['accuracy_before']:.0%}", f"{scores['accuracy_after']:.0%}"])
        for level, style in ((task.chance, ":"), (task.goal, "--")):
            bars.plot([place - 0.42, place + 0.42], [level] * 2, color="#222222", linestyle=style, linewidth=1)
    course.set(xlabel="step", title="accuracy on validation rows", ylim=(0, 1.05))
    course.legend(frameon=False)
    bars.set(ylim=(0, 1.12), title="held-out, before and after (chance ···, goal - -)")
    bars.set_xticks(range(len(TASKS)), [task.title for task in TASKS.values()], size=9)
    for axis in (loss, course, bars):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _points(logged: Sequence[Mapping[str, str]], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it was logged."""
    rows = [row for row in logged if row.get(metric)]
    return [int(row["step"]) for row in rows], [float(row[metric]) for row in rows]
