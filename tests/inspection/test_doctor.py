"""The doctor on data in which each fault is planted once: it finds each of them and nothing else, in whatever way it runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from inspection.scorers import PairScorer
from tests.inspection.planted import plant, write_config
from train import main


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "expected.json").write_text(
        json.dumps([[split, line, sorted(kinds)] for (split, line), kinds in plant(folder).items()])
    )
    return folder


def run(folder: Path, out: Path, *options: str, **data: Any) -> dict[str, Any]:
    """The report of a run, as JSON."""
    config = write_config(folder, **data)
    main(["doctor", "--config", str(config), "--json", str(out), *options])
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(planted: Path) -> dict[str, Any]:
    page, clean = str(planted / "page.html"), str(planted / "clean/out.jsonl")
    return run(planted, planted / "report.json", "--html", page, "--clean", clean)


def test_each_planted_fault_is_found_and_nothing_else(planted: Path, report: dict[str, Any]) -> None:
    found: dict[tuple[str, int], set[str]] = {}
    for finding in report["findings"]:
        found.setdefault((finding["split"], finding["line"]), set()).add(finding["kind"])
    expected = {(split, line): set(kinds) for split, line, kinds in json.loads((planted / "expected.json").read_text())}
    assert found == expected
    assert len(report["findings"]) == len(expected)
    assert report["counts"] == {kind: sum(kind in kinds for kinds in expected.values()) for kind in report["counts"]}


def test_a_finding_says_where_and_why(report: dict[str, Any]) -> None:
    reasons = {finding["medium"]: finding["reason"] for finding in report["findings"] if "medium" in finding}
    assert re.fullmatch(r"the variance of the Laplacian is [\d.]+, below blur = 100", reasons["blurred.png"])
    assert re.fullmatch(r"the same content as good0.png of \S+train.jsonl:1", reasons["copy.bmp"])
    near = r"nearly the same content \(\d of 64 bits apart\) as val1.png of \S+val.jsonl:2 \(val\)"
    assert re.fullmatch(near, reasons["near_leak.jpg"])
    assert next(f["reason"] for f in report["findings"] if (f["split"], f["line"]) == ("train", 6)).startswith("not JSON")


def test_the_rows_add_up_and_those_that_pass_are_written_byte_for_byte(planted: Path, report: dict[str, Any]) -> None:
    passed = {}
    for name, split in (("out.jsonl", "train"), ("out.val.jsonl", "val")):
        rejected = {f["line"] for f in report["findings"] if f["split"] == split and f["kind"] in report["reject"]}
        lines = (planted / f"{split}.jsonl").read_bytes().splitlines(keepends=True)
        expected = [line for number, line in enumerate(lines, 1) if number not in rejected]
        passed[split] = len(expected)
        assert (planted / "clean" / name).read_bytes() == b"".join(expected)
    rejected_rows = [json.loads(line) for line in (planted / "clean/out.rejected.jsonl").read_text().splitlines()]
    assert report["rows"] == 34
    assert report["passed"] == sum(passed.values())
    assert report["rejected"] == len(rejected_rows) == report["rows"] - report["passed"]
    assert [part["rows"] == part["passed"] + part["rejected"] for part in report["parts"]] == [True, True]
    assert {tuple(row) for row in rejected_rows} == {("split", "file", "line", "reasons")}


def test_the_rows_that_pass_pass_again(planted: Path, report: dict[str, Any], tmp_path: Path) -> None:
    options = {"train_path": str(planted / "clean/out.jsonl"), "val_path": str(planted / "clean/out.val.jsonl")}
    again = run(planted, tmp_path / "report.json", **options, media_root=str(planted))
    assert again["rejected"] == 0
    assert again["rows"] == report["passed"]


def test_the_report_does_not_depend_on_the_workers(planted: Path, report: dict[str, Any], tmp_path: Path) -> None:
    run(planted, tmp_path / "report.json", num_workers=2)
    one, two = (json.loads(path.read_text()) for path in (planted / "report.json", tmp_path / "report.json"))
    shared = ("model.prompt.max_length", "data.limits.image.max_pixels")
    assert [line["option"] for line in two["recommended"]] == [*shared, "data.max_skipped"]  # one has no cleaned files
    one["recommended"], two["recommended"] = one["recommended"][:2], two["recommended"][:2]
    assert one == two


def test_what_it_recommends_is_a_configuration(planted: Path, report: dict[str, Any], tmp_path: Path) -> None:
    from inspection.recommend import Line, as_yaml

    lines = {line["option"]: line["value"] for line in report["recommended"]}
    assert lines["data.limits.image.max_pixels"] == str(120 * 120)
    assert lines["data.train_path"] == str(planted / "clean/out.jsonl")
    assert lines["data.media_root"] == str(planted)
    assert int(lines["model.prompt.max_length"]) > 64
    assert "data.max_skipped" not in lines  # there is nothing left to skip in the files that pass
    (tmp_path / "more.yaml").write_text(as_yaml([Line(**line) for line in report["recommended"]]), encoding="utf-8")
    assert yaml.safe_load((tmp_path / "more.yaml").read_text())["data"]["init_args"]["limits"] == {"image": {"max_pixels": 14400}}
    config = write_config(planted)
    main(["doctor", "--config", str(config), "--config", str(tmp_path / "more.yaml"), "--json", str(tmp_path / "report.json")])
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["parts"][0]["file"] == str(planted / "clean/out.jsonl")


def test_the_page_shows_every_finding_and_needs_nothing_beside_itself(planted: Path, report: dict[str, Any]) -> None:
    page = (planted / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|https?://|<script|@import|url\(""", page)
    assert len(re.findall(r'<div class="card(?: pair)?">', page)) == len(report["findings"])
    assert page.count("prefers-color-scheme: dark") == 1
    media = [f for f in report["findings"] if "medium" in f]
    assert page.count("<img src=") >= len(media)
    assert page.count('class="sound"') >= 3
    assert page.count("<figure>") == 4  # a row, its text, sharpness, level; each kind of media has one length


def test_kinds_and_thresholds_are_the_users(planted: Path, tmp_path: Path) -> None:
    report = run(planted, tmp_path / "report.json", "--reject=[unreadable]", "--thresholds.near_bits=0", "--thresholds.blur=0")
    assert report["rejected"] == report["counts"]["unreadable"]
    assert "blurred" not in report["counts"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--thresholds.near_bits=40"], "thresholds.near_bits is a number of bits from 0 to 16, got 40"),
        (["--thresholds.black=2"], "thresholds.black is a share, in \\[0, 1\\], got 2.0"),
    ],
)
def test_a_mistake_is_named(planted: Path, options: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{expected}$"):
        main(["doctor", "--config", str(write_config(planted)), *options])


def test_it_does_not_write_over_what_it_reads(planted: Path) -> None:
    before = (planted / "val.jsonl").read_bytes()
    for out in ("train.jsonl", "x/../val.jsonl"):
        with pytest.raises(ValueError, match="one of the files that are read: give another name"):
            main(["doctor", "--config", str(write_config(planted)), "--clean", str(planted / out)])
    assert (planted / "val.jsonl").read_bytes() == before


def test_each_source_of_a_mixture_has_files_of_its_own(tmp_path: Path) -> None:
    main(["doctor", "--config", "configs/sft/tiny_all.yaml", "--clean", str(tmp_path / "out.jsonl"), "--reject=[unreadable]"])
    sources = {"shapes": Path("demo/tiny"), "clips": Path("demo/tiny/clips"), "tones": Path("demo/tiny/tones")}
    for name, folder in sources.items():
        assert (tmp_path / f"out.{name}.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()
        assert (tmp_path / f"out.{name}.val.jsonl").read_bytes() == (folder / "val.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        "out.rejected.jsonl",
        *(f"out.{name}{split}.jsonl" for name in sources for split in ("", ".val")),
    }


def test_rows_that_are_held_out_are_rows_of_validation(planted: Path, tmp_path: Path) -> None:
    report = run(planted, tmp_path / "report.json", val_path=None, val_fraction=0.2)
    train, val = report["parts"]
    assert (train["file"], train["rows"] + val["rows"]) == (val["file"], 31)
    assert val["rows"] > 0
    assert sum(finding["kind"] == "unreadable" for finding in report["findings"]) == 5


def test_a_scorer_is_chosen_by_its_class(planted: Path, tmp_path: Path) -> None:
    scorer = "--scorer=tests.inspection.test_doctor.Reader"
    report = run(planted, tmp_path / "report.json", scorer, "--scorer.min_score=0.5")
    found = [finding["line"] for finding in report["findings"] if finding["kind"] == "mismatch"]
    assert found == [15, 16]
    assert next(f["reason"] for f in report["findings"] if f["kind"] == "mismatch").startswith("the scorer gives 0.250, below")


class Reader(PairScorer):
    """Pictures do not fit a text that says `seen`."""

    def score(self, media: Any, text: str) -> float | None:
        if not isinstance(media, Image.Image):
            return None
        return 0.25 if "seen" in text else 0.75
