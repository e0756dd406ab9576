"""The demo: one model with real weights learns to answer about pictures, clips and speech, and is scored on media never seen.

`make demo` runs it. Figures go to runs/demo/report.json, pictures to runs/demo/contact_sheet.png and report.png. It says
where a score is below its goal, and fails where a modality was not learned.
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo.data import prepare_all
from demo.figures import draw_report, draw_sheet, num_shown
from demo.rows import Modality
from demo.scores import TASKS, below_goal, failed, scores_of, summary
from demo.weights import CACHE, convert_all

CONFIG = "configs/sft/demo.yaml"
RUN = Path("runs/demo")
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.logger", "false")


def main() -> None:
    """Prepares, scores, trains, scores again, and reports."""
    started = time.monotonic()
    say("1/4  weights and data")
    convert_all(CACHE)
    data = prepare_all(CACHE)
    if RUN.exists():
        shutil.rmtree(RUN)  # the demo's own folder: each demo is a run of its own

    from transformers.utils.logging import disable_progress_bar

    from train import main as train  # after the conversions: it takes seconds to import
    from train import quiet_lightning

    quiet_lightning()
    disable_progress_bar()  # of the loading of weights

    say("2/4  before training: pictures, clips and recordings that are held out")
    before = _test(train)
    for task in TASKS.values():
        say(f"     {task.title:<20} {before[f'test/{task.source}/accuracy']:6.1%}, chance {task.chance:.1%}")
    say("3/4  training LoRA and three projectors; the encoders and the language model are frozen")
    training_started = time.monotonic()
    train(["fit", "--config", CONFIG])
    training_seconds = time.monotonic() - training_started
    say("4/4  after training: the same held-out media")
    checkpoint = RUN / "checkpoints" / "last.ckpt"
    after = _test(train, "--ckpt_path", str(checkpoint))
    answers = _answers(train, checkpoint, data)
    report: dict[str, Any] = {modality: scores_of(task, before, after) for modality, task in TASKS.items()}
    report |= {
        "training_seconds": round(training_seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "checkpoint": str(checkpoint),
    }
    (RUN / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw_sheet(answers, {modality: files["media_root"] for modality, files in data.items()}, RUN / "contact_sheet.png")
    draw_report(report, RUN / "csv" / "version_0" / "metrics.csv", RUN / "report.png")
    _print(report, answers, data)
    if shortfall := below_goal(report):
        say(shortfall)
    if problem := failed(report):
        sys.exit(f"error: {problem}")


def say(line: str) -> None:
    """A line of progress."""
    print(line, flush=True)


def _test(train: Any, *arguments: str) -> dict[str, float]:
    cli = train(["test", "--config", CONFIG, *QUIET, *arguments])
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def _answers(train: Any, checkpoint: Path, data: Mapping[Modality, Mapping[str, Path]]) -> dict[Modality, list[dict[str, Any]]]:
    """Free answers, greedily decoded, to the first held-out rows of each modality."""
    rows: dict[Modality, list[str]] = {}
    flags: list[str] = []
    for modality, task in TASKS.items():
        rows[modality] = data[modality]["test"].read_text(encoding="utf-8").splitlines()[: num_shown(modality)]
        questions = RUN / f"questions-{task.source}.jsonl"
        questions.write_text("".join(f"{row}\n" for row in rows[modality]), encoding="utf-8")
        flags += [f"--data.sources.{task.source}.predict_path", str(questions)]
    train(["predict", "--config", CONFIG, *QUIET, *flags, "--ckpt_path", str(checkpoint)])
    lines = (RUN / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    predictions = [json.loads(line) for line in lines]
    answered = {task.source: [row for row in predictions if row["source"] == task.source] for task in TASKS.values()}
    return {
        modality: [
            {**json.loads(row), **prediction} for row, prediction in zip(rows[modality], answered[task.source], strict=True)
        ]
        for modality, task in TASKS.items()
    }


def _print(
    report: Mapping[str, Any],
    answers: Mapping[Modality, list[dict[str, Any]]],
    data: Mapping[Modality, Mapping[str, Path]],
) -> None:
    say(f"""
{summary(report)}

pictures                {RUN / "contact_sheet.png"}, {RUN / "report.png"}, {RUN / "samples.html"}
figures                 {RUN / "report.json"}
checkpoint              {report["checkpoint"]}
ask it yourself         with media of your own, or with one of the held-out ones:""")
    for modality, rows in answers.items():
        question = rows[0]["prompt"].replace(f"<{modality}>", "")
        file = _shown(data[modality]["media_root"] / rows[0][f"{modality}s"][0])
        say(f'  .venv/bin/python -m deployment.ask {RUN} "{question}" {"" if modality == "image" else f"--{modality} "}{file}')


def _shown(path: Path) -> Path:
    """A path as one types it in the repository's folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main()
