"""The demo: real weights learn to name real pictures, scored on pictures never seen before and after.

`make demo` runs it. Figures go to runs/demo/report.json, pictures to runs/demo/contact_sheet.png and report.png.
"""

import csv
import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from demo.pictures import CLASSES, prepare
from demo.weights import CACHE, convert_all

CONFIG = "configs/sft/demo.yaml"
RUN = Path("runs/demo")
SHEET_ROWS = 20
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.logger", "false")


def main() -> None:
    """Prepares, scores, trains, scores again, and reports."""
    started = time.monotonic()
    say("1/4  weights and pictures")
    convert_all(CACHE)
    data = prepare(CACHE / "fashion")
    if RUN.exists():
        shutil.rmtree(RUN)  # the demo's own folder: each demo is a run of its own

    from train import main as train  # after the conversions: it takes seconds to import
    from train import quiet_lightning

    quiet_lightning()

    say("2/4  before training: a 10-way question about 500 pictures never seen")
    before = _test(train)
    say(f"     accuracy {before['test/accuracy']:.1%} (chance is 10 %)")
    say("3/4  training a projector and LoRA; the encoder and the language model are frozen")
    training_started = time.monotonic()
    train(["fit", "--config", CONFIG])
    training_seconds = time.monotonic() - training_started
    say("4/4  after training: the same pictures")
    checkpoint = RUN / "checkpoints" / "last.ckpt"
    after = _test(train, "--ckpt_path", str(checkpoint))
    answers = _answers(train, checkpoint, data["test"])
    image_scores = {
        "accuracy_before": before["test/accuracy"],
        "accuracy_after": after["test/accuracy"],
        "exact_match_after": after["test/exact_match"],
        "media_gain": after["test/media_gain"],
        "loss_before": before["test/loss"],
        "loss_after": after["test/loss"],
    }
    report = {
        "image": image_scores,
        "training_seconds": round(training_seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "checkpoint": str(checkpoint),
    }
    (RUN / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _draw_sheet(answers, data["media_root"])
    _draw_curve(image_scores)
    _print(report)


def say(line: str) -> None:
    """A line of progress."""
    print(line, flush=True)


def _test(train: Any, *arguments: str) -> dict[str, float]:
    cli = train(["test", "--config", CONFIG, *QUIET, *arguments])
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def _answers(train: Any, checkpoint: Path, test_file: Path) -> list[dict[str, Any]]:
    """Free answers, greedily decoded, to the first held-out rows."""
    rows = test_file.read_text(encoding="utf-8").splitlines()[:SHEET_ROWS]
    questions = RUN / "questions.jsonl"
    questions.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    paths = ["--data.predict_path", str(questions), "--ckpt_path", str(checkpoint)]
    train(["predict", "--config", CONFIG, *QUIET, *paths])
    predictions = (RUN / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**json.loads(row), **json.loads(prediction)} for row, prediction in zip(rows, predictions, strict=True)]


def _draw_sheet(answers: list[dict[str, Any]], media_root: Path) -> None:
    """A contact sheet: held-out pictures with the question, the right answer and the model's answer."""
    from matplotlib import image
    from matplotlib.figure import Figure

    columns = 5
    figure = Figure(figsize=(11, 2.75 * (len(answers) // columns)), layout="constrained")
    right = sum(answer["right"] for answer in answers)
    figure.suptitle(
        f"Held-out pictures: “{answers[0]['prompt'].replace('<image>', '')}”  {right} of {len(answers)} named right", size=13
    )
    axes = figure.subplots(-(-len(answers) // columns), columns).flat
    for axis, answer in zip(axes, answers, strict=False):
        colour = "#1a7f37" if answer["right"] else "#c62828"
        axis.imshow(image.imread(media_root / answer["images"][0]), cmap="gray", interpolation="nearest")
        axis.set_title(answer["response"] or "(nothing)", color=colour, size=12, weight="bold")
        axis.set_xlabel(f"right: {answer['reference']}", size=9, color="#555555")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(RUN / "contact_sheet.png", dpi=110)


def _draw_curve(scores: dict[str, float]) -> None:
    """The training loss, and accuracy before and after."""
    from matplotlib.figure import Figure

    with (RUN / "csv" / "version_0" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        points = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row.get("train/loss")]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=[3, 2])
    curve.plot(*zip(*points, strict=True), color="#1f5fa8")
    curve.set(xlabel="step", ylabel="loss (nats a token)", title="training", ylim=(0, None))
    values = [scores["accuracy_before"], scores["accuracy_after"]]
    drawn = bars.bar(["before", "after"], values, color=["#b0b0b0", "#1a7f37"], width=0.6)
    bars.bar_label(drawn, [f"{value:.0%}" for value in values])
    bars.axhline(1 / len(CLASSES), color="#888888", linestyle=":", label="chance")
    bars.set(ylim=(0, 1), title="held-out accuracy, 10-way")
    bars.legend(loc="upper left", frameon=False)
    for axis in (curve, bars):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RUN / "report.png", dpi=110)


def _print(report: dict[str, Any]) -> None:
    scores = report["image"]
    minutes, memory = report["seconds"] / 60, report["peak_memory_bytes"] / 2**30
    say(f"""
held-out accuracy   {scores["accuracy_before"]:6.1%} -> {scores["accuracy_after"]:.1%}   (10-way, chance 10 %)
named exactly                 {scores["exact_match_after"]:.1%}   (free answer, word for word)
media gain          {scores["media_gain"]:6.2f} nats a token: what the right picture is worth against another one
took                {minutes:6.1f} minutes, {memory:.1f} GiB at the peak

pictures            {RUN / "contact_sheet.png"}, {RUN / "report.png"}, {RUN / "samples.html"}
figures             {RUN / "report.json"}
checkpoint          {report["checkpoint"]}
ask it yourself     .venv/bin/python -m deployment.ask {RUN} "What is this?" my_picture.jpg
""")


if __name__ == "__main__":
    main()
