"""What the demo is scored by: accuracy on media never seen, before and after, with a goal for each modality."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from demo.motion import STEPS
from demo.pictures import CLASSES
from demo.rows import Modality
from demo.speech import WORDS


@dataclass(frozen=True)
class Task:
    """What one modality is asked.

    Args:
        source: Its source in configs/sft/demo.yaml, which also is the name of its folder in the cache.
        title: What is scored.
        choices: Answers to choose from.
        goal: The accuracy that the demo is made for.
    """

    source: str
    title: str
    choices: int
    goal: float

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.choices

    @property
    def floor(self) -> float:
        """The accuracy below which nothing was learned: one and a half times chance.

        Between it and the goal lies what processors make of the same seed: they round differently, and a run of five minutes
        may come upon what a modality means early or late.
        """
        return 1.5 * self.chance


TASKS: dict[Modality, Task] = {
    "image": Task("fashion", "clothes in pictures", len(CLASSES), 0.75),
    "video": Task("motion", "directions in clips", len(STEPS), max(0.6, 3 / len(STEPS))),
    "audio": Task("speech", "words in recordings", len(WORDS), max(0.6, 3 / len(WORDS))),
}
"""By modality; the goals of clips and sounds are three times chance, and at least 60 %."""


def scores_of(task: Task, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The figures of a modality.

    Args:
        task: What it was asked.
        before: The metrics of the test before training, by their logged names.
        after: Those after training.
    """
    name = f"test/{task.source}"
    return {
        "accuracy_before": before[f"{name}/accuracy"],
        "accuracy_after": after[f"{name}/accuracy"],
        "exact_match_before": before[f"{name}/exact_match"],
        "exact_match_after": after[f"{name}/exact_match"],
        "media_gain": after[f"{name}/media_gain"],
        "loss_before": before[f"{name}/loss"],
        "loss_after": after[f"{name}/loss"],
        "chance": task.chance,
        "goal": task.goal,
    }


def below_goal(report: Mapping[str, Any]) -> str:
    """What to say where a score is below its goal, in one line; empty where none is.

    Args:
        report: The figures by modality.
    """
    below = _below(report, "goal")
    return below and f"below the goal: {below}; another run (`--seed_everything`) may end elsewhere"


def failed(report: Mapping[str, Any]) -> str:
    """What to say where a modality was not learned, in one paragraph; empty where each was.

    Args:
        report: The figures by modality.
    """
    below = _below(report, "floor")
    return below and (
        f"the demo trained, but learned next to nothing of: {below}. What the repository ships is far above, so look at what was "
        "changed: configs/sft/demo.yaml, the weights and data in .cache/demo (`make clean` makes them anew) or the code"
    )


def _below(report: Mapping[str, Any], bound: Literal["goal", "floor"]) -> str:
    bounds = {modality: task.goal if bound == "goal" else task.floor for modality, task in TASKS.items()}
    return ", ".join(
        f"{task.title} {report[modality]['accuracy_after']:.1%} ({bound} {bounds[modality]:.0%})"
        for modality, task in TASKS.items()
        if not report[modality]["accuracy_after"] >= bounds[modality]
    )


def summary(report: Mapping[str, Any]) -> str:
    """The figures as a table for the terminal."""
    lines = [f"{'held-out accuracy':<24}before    after   chance   media gain"]
    for modality, task in TASKS.items():
        scores = report[modality]
        lines.append(
            f"{task.title:<22}{scores['accuracy_before']:>7.1%} -> {scores['accuracy_after']:>6.1%}   {task.chance:>6.1%}   "
            f"{scores['media_gain']:>6.2f} nats a token"
        )
    exact = ", ".join(f"{report[modality]['exact_match_after']:.1%}" for modality in TASKS)
    lines.append(f"{'named word for word':<24}{exact} (free answers)")
    minutes, memory = report["seconds"] / 60, report["peak_memory_bytes"] / 2**30
    lines.append(f"{'took':<24}{minutes:.1f} minutes, {report['cpu_seconds']:.0f} CPU-seconds, {memory:.1f} GiB at the peak")
    return "\n".join(lines)
