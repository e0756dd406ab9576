"""A ready model from the command line: trained, interrupted and resumed, validated, asked, and started from."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deployment.ask import ask, load
from models.checkpoint import read_checkpoint
from models.language import Generation
from tests.lightning_modules.media_fakes import write_media_rows
from tests.lightning_modules.run_fakes import short_run
from train import main

ROOT = Path(__file__).parents[2]


class Runs:
    """Runs of the tiny Qwen2.5-VL on rows with images, clips and text."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.rows = write_media_rows(folder / "rows.jsonl", ["i", "iv", "", "i", "v", "ii"])
        self.model = model

    def __call__(self, command: str, name: str, *arguments: str) -> None:
        """`runs("fit", "name of the run folder", "--flag=value")`"""
        config = f"""
checkpoint: {{monitor: val/loss, save_top_k: -1}}
samples: {{num_samples: 2}}
model:
  class_path: MultiModalLitModule
  init_args:
    language_model:
      class_path: PretrainedMLLM
      init_args:
        name_or_path: {self.model}
        tune: {{mode: lora, lr: 1.0e-2, lora: {{dropout: 0.1}}}}
        projector_tune: {{mode: full, lr: 1.0e-3}}
        sampling: {{num_frames: 4}}
    generation: {{max_new_tokens: 6}}
data:
  class_path: ImageDataModule
  init_args: {{train_path: {self.rows}, val_path: {self.rows}, batch_size: 2, num_workers: 1}}
"""
        path = self.folder / "config.yaml"
        path.write_text(short_run(self.folder / name, max_epochs=2) + config, encoding="utf-8")
        main([command, f"--config={path}", *arguments])

    def checkpoints(self, name: str) -> list[Path]:
        """Those of a run but the last, in order."""
        files = [path for path in (self.folder / name / "checkpoints").glob("*.ckpt") if path.name != "last.ckpt"]
        return sorted(files, key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def runs(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("ready"), model_folder("qwen2_5_vl"))
    made("fit", "whole")
    return made


def test_a_run_leaves_what_every_run_does(runs: Runs) -> None:
    folder = runs.folder / "whole"
    parts = {row["part"]: row for row in json.loads((folder / "parts.json").read_text())}
    modes = {name: (row["mode"], row["trainable"] > 0) for name, row in parts.items()}
    assert modes == {
        "language_model": ("lora", True),
        "language_model.model.model.visual": ("frozen", False),
        "language_model.model.model.visual.merger": ("full", True),
        "fusion": ("frozen", False),
    }
    assert parts["language_model.model.model.visual.merger"]["class"] == "Qwen2_5_VLPatchMerger"
    assert json.loads((folder / "summary.json").read_text())["trained"] == 6
    rows = list(csv.DictReader((folder / "csv/version_0/metrics.csv").open()))
    gains = {name: [float(row[name]) for row in rows if row[name]] for name in rows[0] if name.startswith("val/")}
    assert len(gains["val/loss"]) == 2 and gains["val/loss"][1] < gains["val/loss"][0] and gains["val/media_gain"]
    assert "what?" in (folder / "samples.html").read_text() and (folder / "processor/processor_config.json").is_file()
    state = read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"]
    assert all("lora_" in name or ".merger." in name for name in state)


def test_a_resumed_run_ends_with_the_same_weights(runs: Runs) -> None:
    first, _ = runs.checkpoints("whole")
    runs("fit", "resumed", f"--ckpt_path={first}")
    whole, resumed = (read_checkpoint(runs.folder / name / "checkpoints/last.ckpt") for name in ("whole", "resumed"))
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)
    started = read_checkpoint(first)["state_dict"]
    assert any(not torch.equal(started[name], tensor) for name, tensor in resumed["state_dict"].items())


def test_it_answers_when_asked_as_in_prediction(runs: Runs) -> None:
    runs("predict", "whole", "--ckpt_path=last", f"--data.predict_path={runs.rows}")
    (path,) = (runs.folder / "whole").glob("predictions*.jsonl")
    answers = {row["id"]: row["response"] for row in map(json.loads, path.read_text().splitlines())}
    model, processor = load(runs.folder / "whole")
    picture = runs.folder / "rows-3-0.png"
    answer = ask(model, processor, "Row 3: <image> what?", {"image": [picture]}, options=Generation(max_new_tokens=6))
    assert answer == answers["3"]


def test_another_run_starts_from_it_with_more_to_train(runs: Runs) -> None:
    last = runs.folder / "whole/checkpoints/last.ckpt"
    tower = '--model.language_model.vision_tune={"mode": "lora", "lr": 1.0e-3, "lora": {"target_modules": ["qkv"]}}'
    runs("fit", "warm", f"--model.init_from={last}", tower, "--trainer.max_steps=1", "--model.language_model.tune.lr=1e-9")
    before, after = (read_checkpoint(path)["state_dict"] for path in (last, runs.folder / "warm/checkpoints/last.ckpt"))
    assert {name for name in after.keys() - before.keys() if "qkv.lora" in name} == after.keys() - before.keys() != set()
    adapters = [name for name in before if "language_model.layers" in name and "lora" in name]
    assert adapters and all(torch.allclose(before[name], after[name], atol=1e-6) for name in adapters)


def test_a_run_that_would_see_other_pixels_is_not_resumed(runs: Runs) -> None:
    first, _ = runs.checkpoints("whole")
    size = '--model.language_model.image_resize={"shortest_edge": 784, "longest_edge": 1568}'
    with pytest.raises(ValueError, match="image"):
        runs("fit", "other", f"--ckpt_path={first}", size)
