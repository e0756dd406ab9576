"""The command line from end to end, on the tiny recipe."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from train import main

TINY = "configs/sft/tiny.yaml"
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.num_sanity_val_steps", "0"]
LORA = [
    "--model.language_model.tune.mode=lora",
    "--model.language_model.tune.lora.dropout=0.2",
    "--model.language_model.pretrained=false",
    "--data.augment=ImageAugment",
]


def fit(folder: Path, *arguments: str) -> Any:
    return main(["fit", "--config", TINY, "--trainer.default_root_dir", str(folder), *QUIET, *arguments])


def losses(folder: Path) -> dict[int, float]:
    with (folder / "csv/version_0/metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    fit(folder, "--trainer.max_epochs=16", "--trainer.check_val_every_n_epoch=8")
    return folder


def test_the_tiny_recipe_learns_to_look(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["metrics"]["val/accuracy"] >= 0.75
    assert summary["metrics"]["val/media_gain"] > 0.1
    assert (summary["rows"], summary["trained"], summary["skipped"]) == (32, 32, 0)
    assert summary["media"] == {"image": 32, "video": 0, "audio": 0}


def test_a_run_leaves_what_is_needed_to_use_it(finished: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    expected = {
        "config.yaml",
        "model.json",
        "parts.json",
        "csv/version_0/metrics.csv",
        "samples.html",
        "summary.json",
        "checkpoints/last.ckpt",
    }
    assert expected | {"processor/processor.json", "processor/tokenizer.json"} <= names
    checkpoint = torch.load(finished / "checkpoints/last.ckpt", weights_only=True)
    parts = {name.split(".")[0] for name in checkpoint["state_dict"]}
    assert parts == {"language_model", "image_encoder", "image_projector"}  # none of them can be read from elsewhere


def test_validate_and_predict_use_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    last = str(finished / "checkpoints/last.ckpt")
    there = ["--trainer.default_root_dir", str(tmp_path), "--ckpt_path", last, *QUIET]
    cli = main(["validate", "--config", TINY, *there])
    summary = json.loads((finished / "summary.json").read_text())
    assert float(cli.trainer.callback_metrics["val/loss"]) == pytest.approx(summary["metrics"]["val/loss"], rel=1e-5)
    main(["predict", "--config", TINY, *there, "--data.predict_path=demo/tiny/val.jsonl"])
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    right = sum(row["right"] for row in rows)
    assert len(rows) == 8
    assert right / 8 == pytest.approx(summary["metrics"]["val/exact_match"])  # teacher forcing said the same


@pytest.mark.parametrize(("workers", "step"), [(0, 3), (0, 4), (1, 6)])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path: Path, workers: int, step: int) -> None:
    options = ["--trainer.max_steps=10", "--trainer.check_val_every_n_epoch=1", f"--data.num_workers={workers}", *LORA]
    saving = ["--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1", "--checkpoint.monitor=null"]
    fit(tmp_path / "whole", *options, *saving)
    saved = next((tmp_path / "whole/checkpoints").glob(f"*-step={step}.ckpt"))
    fit(tmp_path / "resumed", *options, *saving, "--ckpt_path", str(saved))
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "resumed")
    assert min(resumed) == step  # it did not start again
    assert {at: whole[at] for at in resumed} == resumed
    ends = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "resumed")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 10
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(tensor, ends[1]["state_dict"][name]), name


def test_a_warm_start_takes_weights_only(finished: Path, tmp_path: Path) -> None:
    last = finished / "checkpoints/last.ckpt"
    cli = fit(tmp_path, "--model.init_from", str(last), "--trainer.max_steps=1", "--model.warmup_ratio=0.9")
    assert cli.trainer.global_step == 1
    assert losses(tmp_path)[0] < 0.8 * losses(finished)[0]


def test_a_second_run_into_the_folder_is_refused(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"(?s)already holds a run.*--ckpt_path last"):
        fit(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.train_path=nowhere.jsonl"], "nowhere.jsonl"),
        (["--data.media_root=nowhere"], "nowhere"),
        (["--model.language_model.name_or_path=./nowhere"], "nowhere"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["--ckpt_path=last"], "holds no checkpoint"),
        (["--model.init_from=nowhere.ckpt"], "nowhere.ckpt"),
        (["--model.language_model.tune.mode=lora", "--model.language_model.tune.lora.target_modules=[qq]"], "q_proj"),
        (["--model.image_encoder.model_name=vit_nonsense"], "vit_nonsense"),
        (["--trainer.max_epochs=-1"], "trainer.max_steps"),
    ],
)
def test_what_a_user_can_cause_is_a_value_error_that_names_it(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, *arguments)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--trainer.max_step=3"], "trainer.max_steps"),
        (["--model.image_encoder.layerr=3"], "layer"),
        (["--model.language_model.tune.lora.rank=3"], ""),
        (["--data.batchsize=3"], "batch_size"),
        (["--model=MultiModalLit"], "MultiModalLitModule"),
    ],
)
def test_a_typo_is_refused_with_the_nearest_name(
    tmp_path: Path, arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        fit(tmp_path, *arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert hint in error


def test_a_typo_in_a_yaml_is_refused_with_the_nearest_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model:\n  init_args:\n    image_projector:\n      init_args:\n        dept: 3\n")
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", "--config", str(overlay))
    assert "depth" in capsys.readouterr().err.splitlines()[-1]
