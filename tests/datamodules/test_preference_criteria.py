"""Reward criteria on the rows of a file: what each mode makes of them, row by row, and what is written down."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.answer_form import AnswerForm
from datamodules.batch import Batch, FilteredRowError
from datamodules.criteria import CriteriaMode, CriteriaUse, RewardCriterion
from datamodules.mixture import MixtureDataModule
from datamodules.preference import PreferenceDataModule
from datamodules.processor import Processor
from datamodules.scorers import Response, Scorer
from datamodules.source import Source
from datamodules.toxicity import ToxicityScorer
from tests.datamodules.lightning_fakes import Model, make_trainer
from tests.datamodules.loader_fakes import make_row, same, write_rows

PAIRS = AnswerForm("pairs")


class GradeScorer(Scorer):
    """The number that an answer ends with, in hundredths; an answer without a number has none."""

    name = "grade"

    def __call__(self, responses: Sequence[Response]) -> list[float | None]:
        numbers = [response.response.rpartition(" ")[2] for response in responses]
        return [int(number) / 100 if number.isdigit() else None for number in numbers]


class RedScorer(Scorer):
    """How red the picture is."""

    name = "red"
    needs_media = True

    def __call__(self, responses: Sequence[Response]) -> list[float | None]:
        return [next((each.getpixel((0, 0))[0] / 255 for each in r.media.get("image", ())), None) for r in responses]  # type: ignore[union-attr,index]


GRADE = RewardCriterion(GradeScorer(), floor=0.1)


def pair(number: int, chosen: str, rejected: Any, **columns: Any) -> str:
    return json.dumps(make_row(number, f"{number}.png", chosen) | {"rejected_response": rejected} | columns)


LINES = [
    pair(0, "good 90", "bad 20"),  # 0.7 better
    pair(1, "good 30", "bad 80", margin=2.0),  # 0.5 worse
    pair(2, "good 50", "bad 45"),  # 0.05 better: not clearly
    pair(3, "good", "bad 80", margin=3.0),  # nothing is known of it
    pair(4, "good 40", ["bad 95", "bad 10"]),
    pair(5, "good 5", "bad 2"),  # below the floor, both
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", len(LINES), dict(enumerate(LINES)))


def make(
    rows: Path, processor: Processor, mode: CriteriaMode = "monitor", form: AnswerForm = PAIRS, **options: Any
) -> PreferenceDataModule:
    defaults: dict[str, Any] = {"batch_size": 6, "num_workers": 0, "shuffle": False, "reward_criteria": [GRADE]}
    return PreferenceDataModule(
        train_path=str(rows),
        criteria_use=CriteriaUse(mode=mode, min_difference=0.1),
        processor=processor,
        answer_form=form,
        **(defaults | options),
    )


def batch_of(data: PreferenceDataModule) -> Batch:
    data.setup("fit")
    (batch,) = data.train_dataloader()
    return batch


def graded(batch: Batch) -> list[tuple[str, list[float | None]]]:
    """For each row of the data its line and the grades of its answers, the chosen one first."""
    answers = batch["answers"]
    grades = [None if math.isnan(grade) else round(grade, 2) for grade in answers["scores_A"]["grade"].tolist()]
    found: dict[str, list[float | None]] = {}
    for example, grade in zip(answers["example_A"], grades, strict=True):
        found.setdefault(str(batch["examples"][example]["line"]), []).append(grade)
    return [*found.items()]


def test_monitor_changes_nothing_but_knows_the_scores(rows: Path, row_processor: Processor) -> None:
    batch, plain = batch_of(make(rows, row_processor)), batch_of(make(rows, row_processor, reward_criteria=None))
    assert graded(batch) == [
        ("1", [0.9, 0.2]),
        ("2", [0.3, 0.8]),
        ("3", [0.5, 0.45]),
        ("4", [None, 0.8]),
        ("5", [0.4, 0.95, 0.1]),
        ("6", [0.05, 0.02]),
    ]
    assert batch["answers"].pop("changes") == [] and list(batch["answers"].pop("scores_A")) == ["grade"]
    assert same(batch, plain)


def test_filter_skips_by_name_and_is_no_fault_of_the_data(rows: Path, row_processor: Processor, tmp_path: Path) -> None:
    data = make(rows, row_processor, "filter", max_skipped=0.0)
    model = Model()
    make_trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    (batch,) = model.trained
    assert graded(batch) == [("1", [0.9, 0.2]), ("4", [None, 0.8]), ("5", [0.4, 0.1])]
    assert data.row_counts() == {"rows": 6, "trained": 3, "skipped": 3, "not_reached": 0, "dropped_tokens": 0}
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(row["line"], row["filtered"]) for row in skipped] == [(2, True), (3, True), (6, True)]
    assert skipped[0]["reason"] == (
        "the chosen answer scores 0.3 and the rejected answer 0.8, but is to be better by criteria_use.min_difference = 0.1"
    )
    assert skipped[2]["reason"] == "the chosen answer has grade 0.05, below its floor of 0.1"
    (changed,) = [json.loads(line) for line in (tmp_path / "changed.jsonl").read_text().splitlines()]
    assert changed["line"] == 5
    assert changed["reason"].startswith("left out: the chosen answer scores 0.4 and rejected answer 1 0.95")


def test_a_file_of_which_nothing_is_left(tmp_path: Path, row_processor: Processor) -> None:
    rows = write_rows(tmp_path / "none.jsonl", 2, {n: pair(n, "good 10", "bad 90") for n in range(2)})
    data = make(rows, row_processor, "filter", max_skipped=0.0)
    with pytest.raises(ValueError, match=r"0 of 2 rows .* none is left \(data\.reward_criteria left out 2\)"):
        batch_of(data)


def test_relabel_exchanges_and_writes_it_down(
    rows: Path, row_processor: Processor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, model = make(rows, row_processor, "relabel"), Model()
    make_trainer(tmp_path, max_epochs=2).fit(model, datamodule=data)
    for batch in model.trained:
        assert graded(batch) == [
            ("1", [0.9, 0.2]),
            ("2", [0.8, 0.3]),
            ("3", [0.5, 0.45]),
            ("4", [None, 0.8]),
            ("5", [0.95, 0.4, 0.1]),
            ("6", [0.05, 0.02]),
        ]
        assert batch["answers"]["roles"][:4] == ["chosen", "rejected"] * 2
        assert batch["answers"]["margin_P"].tolist() == [0, 0, 0, 3, 0, 0, 0]  # that of an exchanged pair means nothing
    changed = [json.loads(line) for line in (tmp_path / "changed.jsonl").read_text().splitlines()]
    assert [row["line"] for row in changed] == [2, 5]
    assert changed[0]["reason"] == (
        "exchanged: the rejected answer is better than the chosen answer by 0.5 (the chosen answer: grade 0.3, the rejected "
        "answer: grade 0.8)"
    )
    assert "reward criteria changed 2 row(s), 2 so far" in caplog.text
    assert data.row_counts()["trained"] == 6 and not (tmp_path / "skipped.jsonl").exists()
    kept = row_processor.tokenizer.decode(model.trained[0]["tokens_BT"][1])
    assert kept.index("bad 80") < kept.index("good 30")


def test_weight_is_by_the_difference(rows: Path, row_processor: Processor) -> None:
    weight_P = batch_of(make(rows, row_processor, "weight"))["answers"]["weight_P"]
    gains = [0.7, -0.5, 0.05, 0, -0.55, 0.3, 0]  # the last: both are below the floor
    assert torch.allclose(weight_P, 2 * torch.sigmoid(torch.tensor(gains) / 0.1))


def test_margin_is_the_difference_but_not_below_0(rows: Path, row_processor: Processor) -> None:
    form = AnswerForm("pairs", takes_margin=True)
    margin_P = batch_of(make(rows, row_processor, "margin", form))["answers"]["margin_P"]
    assert torch.allclose(margin_P, torch.tensor([0.7, 0, 0.05, 3, 0, 0.3, 0]))


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_build_makes_pairs_of_the_best_and_the_worst(form: str, tmp_path: Path, row_processor: Processor) -> None:
    def row(number: int, answers: Any) -> str:
        if form == "prompt":
            return json.dumps({"prompt": f"<image>What is {number}?", "answers": answers, "images": [f"{number}.png"]})
        built = make_row(number, f"{number}.png")
        return json.dumps(built | {"messages": built["messages"][:1], "answers": answers})

    lines = [
        row(0, ["a 50", "b 20", "c 90", "d 20"]),
        row(1, ["a 50", "b 45"]),  # too near
        row(2, ["a 5", "b 2", "c 1"]),  # below the floor
        row(3, ["a 40"]),
        row(4, ["a", "b"]),  # without scores
        row(5, ["a 60", "b 30"]),
    ]
    rows = write_rows(tmp_path / "sampled.jsonl", 6, dict(enumerate(lines)))
    data, model = make(rows, row_processor, "build", max_skipped=0.2, val_path=str(rows)), Model()
    make_trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    (batch,) = model.trained
    assert graded(batch) == [("1", [0.9, 0.2]), ("6", [0.6, 0.3])]
    assert batch["answers"]["roles"] == ["chosen", "rejected"] * 2
    text = row_processor.tokenizer.decode(batch["tokens_BT"][0])
    assert text.index("c 90") < text.index("b 20") and "d 20" not in text and "a 50" not in text
    skipped = {row["line"]: row for row in map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())}
    assert {line: row.get("filtered", False) for line, row in skipped.items()} == {2: True, 3: True, 4: False, 5: True}
    assert "makes a pair of the row's 'answers', a list of at least two texts, got a list" in skipped[4]["reason"]
    assert "even the best of the 3 answers has grade 0.05, below its floor" in skipped[3]["reason"]
    assert "no reward criterion scores all of the 2 answers" in skipped[5]["reason"]
    (val,) = data.val_dataloader()  # type: ignore[misc]
    assert graded(val) == graded(batch)


def test_evaluation_is_only_monitored(rows: Path, row_processor: Processor) -> None:
    data = make(rows, row_processor, "relabel", val_path=str(rows))
    data.setup("fit")
    (batch,) = data.val_dataloader()  # type: ignore[misc]
    assert dict(graded(batch))["2"] == [0.3, 0.8]


def test_feedback(tmp_path: Path, row_processor: Processor) -> None:
    lines = {0: pair(0, "good 20", "bad 80")}
    for number, (answer, label) in enumerate([("a 2", True), ("a 2", False), ("a 70", True)], 1):
        lines[number] = json.dumps(make_row(number, f"{number}.png", answer) | {"label": label})
    rows = write_rows(tmp_path / "feedback.jsonl", 4, lines)
    relabelled = batch_of(make(rows, row_processor, "relabel", AnswerForm("feedback")))
    assert graded(relabelled)[0] == ("1", [0.8, 0.2]) and relabelled["answers"]["roles"][:2] == ["desirable", "undesirable"]
    kept = batch_of(make(rows, row_processor, "filter", AnswerForm("feedback"), max_skipped=0.0))
    assert graded(kept) == [("3", [0.02]), ("4", [0.7])]
    with pytest.raises(ValueError, match="mode weight is about pairs"):
        batch_of(make(rows, row_processor, "weight", AnswerForm("feedback")))


def test_scores_that_need_media_get_them_decoded(rows: Path, row_processor: Processor) -> None:
    from PIL import Image

    for number in range(6):
        Image.new("RGB", (8, 8), (51 * number, 0, 0)).save(rows.parent / f"{number}.png")
    batch = batch_of(make(rows, row_processor, reward_criteria=[RewardCriterion(RedScorer())]))
    score_A, example_A = batch["answers"]["scores_A"]["red"], batch["answers"]["example_A"]
    line_A = torch.tensor([batch["examples"][example]["line"] for example in example_A])
    assert torch.allclose(score_A, (line_A - 1) / 5)


def test_workers_give_what_one_process_gives(rows: Path, row_processor: Processor, tmp_path: Path) -> None:
    criteria = [GRADE, RewardCriterion(ToxicityScorer(), weight=0.5)]
    batches = []
    for num_workers in (0, 2):
        data = make(rows, row_processor, "relabel", batch_size=2, num_workers=num_workers, reward_criteria=criteria, shuffle=True)
        data.setup("fit")
        batches.append([*data.train_dataloader()])
        data.teardown("fit")
    changes = [[[c.reason for c in batch["answers"].pop("changes")] for batch in each] for each in batches]
    assert changes[0] == changes[1] and sum(map(len, changes[0])) == 2
    for one, other in zip(*batches, strict=True):
        scores = one["answers"].pop("scores_A"), other["answers"].pop("scores_A")
        assert all(torch.equal(scores[0][name], scores[1][name]) or scores[0][name].isnan().any() for name in scores[0])
        assert same(one, other)


def test_a_criterion_that_tells_nothing_apart_is_reported_once(
    rows: Path, row_processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    criteria = [GRADE, RewardCriterion(ToxicityScorer()), RewardCriterion(RedScorer(), name="none")]
    write_rows(rows, 6, {n: json.dumps(make_row(n, None, f"a {n}") | {"rejected_response": f"b {n}"}) for n in range(6)})
    data = make(rows, row_processor, reward_criteria=criteria)
    data.setup("fit")
    for _ in range(2):
        for _ in data.train_dataloader():
            pass
    assert caplog.text.count("tells nothing apart") == 2
    assert "the reward criterion toxicity gave the score 1 to each of 12 answers" in caplog.text
    assert "the reward criterion none gave no score to each of 12 answers" in caplog.text


def test_what_cannot_be_meant_is_refused(rows: Path, row_processor: Processor) -> None:
    with pytest.raises(ValueError, match=r"mode is filter, but data\.reward_criteria has none|is empty"):
        make(rows, row_processor, "filter", reward_criteria=None)
    with pytest.raises(ValueError, match="mode is margin, but the loss reads no margin"):
        batch_of(make(rows, row_processor, "margin"))
    with pytest.raises(ValueError, match="this one compares none"):
        batch_of(make(rows, row_processor, form=AnswerForm()))

    class Wrong(GradeScorer):
        def __call__(self, responses: Sequence[Response]) -> list[float | None]:
            return [1.5] * len(responses)

    with pytest.raises(ValueError, match=r"criterion grade gave \[1\.5, 1\.5\] .* in \[0, 1\], or None"):
        batch_of(make(rows, row_processor, reward_criteria=[RewardCriterion(Wrong())]))


def test_a_filtered_row_is_one_that_is_named(rows: Path, row_processor: Processor) -> None:
    dataset = make(rows, row_processor, "filter").source_dataset("train", "")
    with pytest.raises(FilteredRowError, match=r"rows\.jsonl:2: the chosen answer scores 0\.3"):
        dataset[1]


@pytest.mark.parametrize(("mode", "file"), [("filter", "skipped.jsonl"), ("relabel", "changed.jsonl")])
def test_a_mixture_judges_the_rows_of_all_its_sources(
    mode: CriteriaMode, file: str, tmp_path: Path, row_processor: Processor
) -> None:
    lines = {"web": LINES[:3], "birds": [LINES[1], LINES[0]]}
    sources = {}
    for name, own in lines.items():
        (tmp_path / name).mkdir()
        sources[name] = Source(train_path=str(write_rows(tmp_path / name / "rows.jsonl", len(own), dict(enumerate(own)))))
    criteria: dict[str, Any] = {"reward_criteria": [GRADE], "criteria_use": CriteriaUse(mode=mode)}
    data = MixtureDataModule(sources, batch_size=5, num_workers=0, processor=row_processor, answer_form=PAIRS, **criteria)
    model = Model()
    make_trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    named = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
    worse = {("web", 2), ("birds", 1)}
    assert {(row["source"], row["line"]) for row in named} == worse | ({("web", 3)} if mode == "filter" else set())
    (batch,) = model.trained
    grades = batch["answers"]["scores_A"]["grade"].view(-1, 2)
    assert len(grades) == (2 if mode == "filter" else 5)
    assert (grades[:, 0] > grades[:, 1]).all()
