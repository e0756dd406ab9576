"""Every recipe and every overlay trains and validates, offline: tiny local parts take the place of those from the hub.

A new recipe needs an entry in `RECIPES`; a new overlay one in `OVERLAYS`, if it brings parts of its own.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from models.checkpoint import read_checkpoint
from tests.lightning_modules.media_fakes import write_media_rows
from train import main

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"

Flags = dict[str, str]
"""Options by name; `{siglip}` in a value is the folder of the tiny model of that family (the fixture `model_folder`), and
`{sounds}` that of the rows of that name."""

ROWS = {"pictures": "i", "clips": "v", "sounds": "a", "texts": ""}
"""What is in each row of a folder of rows, as `write_media_rows` has it."""

SHORT: Flags = {
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.max_epochs": "1",
    "trainer.limit_train_batches": "4",
    "trainer.limit_val_batches": "1",
    "trainer.val_check_interval": "1.0",
    "trainer.check_val_every_n_epoch": "1",
    "trainer.num_sanity_val_steps": "0",
    "trainer.enable_progress_bar": "false",
    "samples.num_samples": "1",
    "data.batch_size": "2",
    "data.eval_batch_size": "2",
    "data.num_workers": "0",
}
"""An optimizer step of four batches, or four of one, then a validation."""

IMAGES: Flags = {"data.train_path": "demo/tiny/train.jsonl", "data.media_root": "demo/tiny"}
SIGLIP: Flags = {"model.language_model.name_or_path": "{llama}", "model.image_encoder.name_or_path": "{siglip}", **IMAGES}
DINOV2: Flags = {
    "model.image_encoder.name_or_path": "{dinov2}",
    "model.image_encoder.image_size": "32",
    "model.image_encoder.layer": "2",
}


def _source(name: str, rows: str) -> Flags:
    option = f"data.sources.{name}"
    return {
        f"{option}.train_path": f"{{{rows}}}/rows.jsonl",
        f"{option}.media_root": f"{{{rows}}}",
        f"{option}.val_fraction": "0.25",
    }


DEMO: Flags = {
    "model.language_model.name_or_path": "{llama}",
    "model.video_encoder.frames.name_or_path": "{dinov2}",
    "model.video_encoder.frames.image_size": "32",
    "model.video_encoder.frames.layer": "2",
    "model.audio_encoder.name_or_path": "{whisper}",
    "model.feature_cache.folder": "{pictures}/features",
    **{
        f"data.sources.{name}.{option}": f"{{{rows}}}{path}"
        for name, rows in (("fashion", "pictures"), ("motion", "clips"), ("speech", "sounds"))
        for option, path in (("train_path", "/rows.jsonl"), ("val_path", "/rows.jsonl"), ("media_root", ""))
    },
    "data.batch_size": "6",  # so that the one step has media of all kinds
}
"""Everything of the demo but the encoder of its pictures, which an overlay replaces."""

RECIPES: dict[str, Flags] = {
    "tiny": {},
    "tiny_all": {"data.batch_size": "6"},
    "demo": DEMO | DINOV2,
    "image": SIGLIP,
    "image_stage1": SIGLIP,
    "audio": {
        "model.language_model.name_or_path": "{llama}",
        "model.audio_encoder.name_or_path": "{whisper}",
        "data.train_path": "{sounds}/rows.jsonl",
        "data.media_root": "{sounds}",
        "data.val_fraction": "0.25",
    },
    "video": {
        "model.language_model.name_or_path": "{llama}",
        "model.video_encoder.frames.name_or_path": "{siglip}",
        "data.train_path": "{clips}/rows.jsonl",
        "data.media_root": "{clips}",
        "data.val_fraction": "0.25",
    },
    "qwen_vl": {
        "model.language_model.name_or_path": "{qwen2_5_vl}",
        **_source("images", "pictures"),
        **_source("clips", "clips"),
    },
    "qwen_audio": {
        "model.language_model.name_or_path": "{qwen2_audio}",
        "data.train_path": "{sounds}/rows.jsonl",
        "data.media_root": "{sounds}",
        "data.val_fraction": "0.25",
    },
    "all": {
        "model.language_model.name_or_path": "{llama}",
        "model.image_encoder.name_or_path": "{siglip}",
        "model.video_encoder.frames.name_or_path": "{siglip}",
        "model.video_encoder.num_heads": "2",
        "model.audio_encoder.name_or_path": "{whisper}",
        **_source("images", "pictures"),
        **_source("clips", "clips"),
        **_source("speech", "sounds"),
        **_source("text", "texts"),
        "data.batch_size": "6",  # so that the one step has media of all kinds
    },
}
"""What to replace in each recipe."""

OVERLAYS: dict[str, tuple[str, Flags]] = {
    "adapter/qlora": ("image", SIGLIP | {"model.language_model.name_or_path": "{llama_64}"}),
    "encoder/efficientnet": (
        "demo",
        DEMO | {"model.image_encoder.model_name": "test_efficientnet", "model.image_encoder.pretrained": "false"},
    ),
}
"""The recipe under an overlay, and what to replace in the two; the other overlays come on top of `image`."""

NEEDS = {"adapter/qlora": "bitsandbytes"}
"""What an overlay needs to be installed."""

LEFT = {
    "logger/csv": "csv/version_0/metrics.csv",
    "logger/wandb": "wandb/offline-run-*/*.wandb",
    "debug/profile": "csv/version_0/fit-profile.txt",
}
"""What an overlay must leave in the run folder."""

ELSEWHERE = ("sft", "sweeps", "strategy")
OVERLAY_NAMES = sorted(
    f"{path.parent.name}/{path.stem}" for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in ELSEWHERE
)
"""Those of `strategy` want several processes: tests/lightning_modules/test_strategies.py has them."""


class Folders(dict[str, Path]):
    """What stands for a name in braces.

    Args:
        path: Where rows are written, when they are first asked for.
        model_folder: The fixture.
    """

    def __init__(self, path: Path, model_folder: Callable[[str], Path]) -> None:
        super().__init__()
        self.path, self.model_folder = path, model_folder

    def __missing__(self, name: str) -> Path:
        if name not in ROWS:
            return self.model_folder(name)
        folder = self.path / name
        if not folder.exists():
            folder.mkdir()
            write_media_rows(folder / "rows.jsonl", [ROWS[name]] * 12)
        return folder


Train = Callable[[Sequence[str], Flags], Path]


@pytest.fixture
def train(tmp_path: Path, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """`train(["sft/image", "debug/fast"], flags)`: trains by the command line, and returns the run folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(configs: Sequence[str], flags: Flags) -> Path:
        given = {"trainer.default_root_dir": str(tmp_path / "run"), **SHORT, **flags}
        options = [f"--{name}={value.format_map(Folders(tmp_path, model_folder))}" for name, value in given.items()]
        cli = main(["fit", *(f"--config=configs/{config}.yaml" for config in configs), *options])
        assert cli.trainer.global_step >= 1
        assert math.isfinite(cli.trainer.callback_metrics["train/loss"])
        assert math.isfinite(cli.trainer.callback_metrics["val/loss"])
        (optimizer,) = cli.trainer.optimizers
        assert {parameter for group in optimizer.param_groups for parameter in group["params"]} == set(optimizer.state)
        return Path(given["trainer.default_root_dir"])

    yield run
    if "wandb" in sys.modules:
        import wandb

        wandb.finish()  # or the next logger would go on with this run


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONFIGS / "sft").glob("*.yaml")))
def test_a_recipe_trains(recipe: str, train: Train) -> None:
    assert recipe in RECIPES, f"give tests/test_recipes.py an entry for configs/sft/{recipe}.yaml: what to replace in it"
    folder = train([f"sft/{recipe}"], RECIPES[recipe])
    assert (folder / "checkpoints/last.ckpt").is_file() and (folder / "samples.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_recipe_run_twice_gives_the_same_weights(recipe: str, train: Train, tmp_path: Path) -> None:
    """Bit for bit, after three steps, and the same state of the optimizer; the second run reads what the first put in caches."""
    flags = RECIPES[recipe] | {"trainer.limit_train_batches": "3", "trainer.accumulate_grad_batches": "1"}
    sums = []
    for number in range(2):
        folder = train([f"sft/{recipe}"], flags | {"trainer.default_root_dir": str(tmp_path / f"{number}")})
        checkpoint = read_checkpoint(folder / "checkpoints/last.ckpt")
        assert checkpoint["global_step"] == 3
        sums.append({name: _sha256(weight) for name, weight in checkpoint["state_dict"].items()})
        sums[-1] |= {
            f"{name} of {parameter}": _sha256(value)
            for parameter, state in checkpoint["optimizer_states"][0]["state"].items()
            for name, value in state.items()
        }
    assert len(sums[0]) > 4 and sums[0] == sums[1]


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("overlay", OVERLAY_NAMES)
def test_an_overlay_trains(overlay: str, train: Train) -> None:
    if overlay in NEEDS:
        pytest.importorskip(NEEDS[overlay])
    recipe, flags = OVERLAYS.get(overlay, ("image", RECIPES["image"]))
    folder = train([f"sft/{recipe}", overlay], flags)
    assert overlay not in LEFT or list(folder.glob(LEFT[overlay]))


OBJECTIVES = sorted(path.stem for path in (CONFIGS / "objective").glob("*.yaml"))
ON_RECIPES = [
    *(("tiny_all", objective) for objective in OBJECTIVES),
    *((recipe, "dpo") for recipe in ("tiny", "qwen_vl", "video", "audio")),
    ("all", "kto"),
    ("demo", "mdpo"),
]
"""The others are slow; each objective is an overlay of `image` too."""
TRAINED_ON = {"tiny": {"image"}, "video": {"video"}, "audio": {"audio"}, "tiny_all": {"image", "video", "audio"}}
"""What each objective must have been given: so all of them take steps on images, clips and sounds."""


@pytest.mark.parametrize(("recipe", "objective"), ON_RECIPES)
def test_an_objective_trains(recipe: str, objective: str, train: Train) -> None:
    folder = train([f"sft/{recipe}", f"objective/{objective}"], RECIPES[recipe])
    media = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["media"]
    assert TRAINED_ON.get(recipe, set()) <= {modality for modality, count in media.items() if count}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_objective_trains_on_every_recipe(recipe: str, train: Train, tmp_path: Path) -> None:
    for objective in OBJECTIVES:
        folder = {"trainer.default_root_dir": str(tmp_path / objective)}
        train([f"sft/{recipe}", f"objective/{objective}"], RECIPES[recipe] | folder)


def test_the_table_names_only_what_there_is() -> None:
    assert set(RECIPES) == {path.stem for path in (CONFIGS / "sft").glob("*.yaml")}
    assert {*OVERLAYS, *NEEDS, *LEFT} <= set(OVERLAY_NAMES)
