from pathlib import Path

import pytest
import yaml

from demo.data import prepare_all
from demo.scores import TASKS, below_goal, failed, scores_of, summary

ROOT = Path(__file__).parents[2]


def metrics(accuracy: float) -> dict[str, float]:
    """Of a test of all sources; each metric has a value of its own."""
    names = [f"test/{task.source}/{metric}" for task in TASKS.values() for metric in ("exact_match", "media_gain", "loss")]
    accuracies = {f"test/{task.source}/accuracy": accuracy + place / 100 for place, task in enumerate(TASKS.values())}
    return {name: 1.5 + place for place, name in enumerate(names)} | accuracies | {"test/accuracy": 0.123}


def report(accuracy: float) -> dict:
    scores = {modality: scores_of(task, metrics(0.25), metrics(accuracy)) for modality, task in TASKS.items()}
    return scores | {"seconds": 330.0, "cpu_seconds": 512.4, "peak_memory_bytes": 3 * 2**30}


def test_the_goals_are_those_that_were_set():
    assert {modality: task.goal for modality, task in TASKS.items()} == {"image": 0.75, "video": 0.75, "audio": 0.6}
    assert all(task.goal >= 3 * task.chance for task in TASKS.values())
    assert [task.choices for task in TASKS.values()] == [10, 4, 36]


def test_the_recipe_has_the_tasks_as_its_sources(tmp_path, monkeypatch):
    sources = yaml.safe_load((ROOT / "configs/sft/demo.yaml").read_text())["data"]["init_args"]["sources"]
    monkeypatch.setattr("demo.motion.SPLIT_EMOJI", {"train": 1, "val": 1, "test": 1})
    prepared = prepare_all(tmp_path / "demo")
    assert list(sources) == [task.source for task in TASKS.values()]
    for modality, task in TASKS.items():
        options = {f"{split}_path": prepared[modality][split] for split in ("train", "val", "test")}
        for option, path in (options | {"media_root": prepared[modality]["media_root"]}).items():
            assert sources[task.source][option] == f".cache/demo/{path.relative_to(tmp_path / 'demo')}"


def test_scores_are_those_of_the_own_source():
    scores = scores_of(TASKS["audio"], metrics(0.03), metrics(0.9))
    assert (scores["accuracy_before"], scores["accuracy_after"]) == pytest.approx((0.05, 0.92))
    assert (scores["exact_match_after"], scores["media_gain"], scores["loss_after"]) == (7.5, 8.5, 9.5)


def test_a_score_below_its_goal_is_named_and_no_other():
    assert below_goal(report(0.9)) == failed(report(0.9)) == ""
    shortfall = below_goal(report(0.745))  # 74.5 % of pictures, 75.5 % of clips, 76.5 % of words
    assert "clothes in pictures 74.5% (goal 75%)" in shortfall
    assert "clips" not in shortfall and "words" not in shortfall and "\n" not in shortfall
    assert "words in recordings 27.0% (goal 60%)" in below_goal(report(0.25))


def test_what_was_not_learned_fails():
    problem = failed(report(0.145))  # 14.5 % of pictures, 15.5 % of clips, 16.5 % of words
    assert "clothes in pictures 14.5% (floor 15%), directions in clips 15.5% (floor 38%)" in problem
    assert "words" not in problem and "\n" not in problem
    assert "words in recordings 4.0% (floor 4%)" in failed(report(0.02))
    assert failed(report(float("nan"))).count("nan") == 3


def test_the_summary_says_all_figures():
    text = summary(report(0.85))
    assert [line.split() for line in text.splitlines()][1][:6] == ["clothes", "in", "pictures", "25.0%", "->", "85.0%"]
    assert "10.0%" in text and "2.8%" in text and "5.5 minutes, 512 CPU-seconds, 3.0 GiB" in text
