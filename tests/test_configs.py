"""Every YAML parses, instantiates offline, and means what it says; overlays change what they name and nothing else."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from train import main

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs/sft").glob("*.yaml"))
ROOMS = ("adapter", "bridge", "logger", "debug", "objective", "strategy")
OVERLAYS = sorted(path for room in ROOMS for path in (ROOT / "configs" / room).glob("*.yaml"))
OBJECTIVES = sorted((ROOT / "configs/objective").glob("*.yaml"))


def resolved(*arguments: str) -> dict[str, Any]:
    """The config that `fit` would run with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        import contextlib
        import io

        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_info:
            main(["fit", *arguments, "--print_config"])
        assert exit_info.value.code in (0, None), arguments
    return yaml.safe_load(out.getvalue())


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {name: value for key, child in tree.items() for name, value in leaves(child, f"{path}.{key}".strip(".")).items()}


@pytest.fixture(scope="module")
def plain() -> dict[Path, dict[str, Any]]:
    return {recipe: resolved("--config", str(recipe)) for recipe in RECIPES}


def test_there_are_recipes_and_overlays() -> None:
    assert {"tiny", "demo", "image", "image_stage1"} <= {path.stem for path in RECIPES}
    names = {"full", "lora", "dora", "linear", "mlp", "pixel_shuffle", "csv", "wandb", "one_batch", "fast", "profile"}
    names |= {"qlora", "pissa", "resampler", "cross_attention", "dpo", "mdpo", "kto", "simpo", "cpo", "orpo", "reward"}
    assert names <= {path.stem for path in OVERLAYS}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_starts_with_its_command_and_resolves(path: Path, plain: dict[Path, dict[str, Any]]) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert f"python train.py fit --config configs/sft/{path.name}" in first
    config = plain[path]
    assert config["trainer"]["default_root_dir"].startswith("runs/")
    given = leaves(yaml.safe_load(path.read_text(encoding="utf-8")))
    found = leaves(config)
    for name, value in given.items():
        if not name.endswith("class_path"):
            assert found[name] == value, name


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.parametrize("recipe", ["tiny", "image"])
def test_an_overlay_changes_what_it_names_and_nothing_else(path: Path, recipe: str, plain: dict[Path, dict[str, Any]]) -> None:
    base = ROOT / f"configs/sft/{recipe}.yaml"
    before, after = leaves(plain[base]), leaves(resolved("--config", str(base), "--config", str(path)))
    named = leaves(yaml.safe_load(path.read_text(encoding="utf-8")))
    for name, value in named.items():
        if name.endswith("class_path"):
            assert f".{after[name]}".endswith(f".{value}")
        else:
            assert after[name] == value, name
    # a new class brings its own options with it; everything outside it stays
    swapped = tuple(name.removesuffix("class_path") for name in named if name.endswith("class_path"))
    for name in before.keys() & after.keys():
        if name not in named and not name.startswith(swapped or ("-",)):
            assert after[name] == before[name], name
    grown = {name for name in before if any(other.startswith(f"{name}.") for other in named)}  # null before
    assert {name for name in before.keys() ^ after.keys() if not name.startswith(swapped or ("-",))} == grown - after.keys()


FIRST = ("tiny_all", "image")
"""Recipes over which each objective is tried; over the others the first is, and the rest are slow."""


def over_recipes() -> list[Any]:
    pairs = [(recipe, objective) for recipe in RECIPES for objective in OBJECTIVES]
    return [
        pytest.param(
            *(recipe, objective),
            marks=[] if recipe.stem in FIRST or objective == OBJECTIVES[0] else pytest.mark.slow,
            id=f"{recipe.stem}-{objective.stem}",
        )
        for recipe, objective in pairs
    ]


@pytest.mark.parametrize(("recipe", "objective"), over_recipes())
def test_an_objective_keeps_the_model_of_a_recipe(recipe: Path, objective: Path, plain: dict[Path, dict[str, Any]]) -> None:
    """Another class keeps the options that it has too, and drops the others without a word: here it must have them all."""
    named = yaml.safe_load(objective.read_text(encoding="utf-8"))["model"]
    before, after = plain[recipe]["model"], resolved("--config", str(recipe), "--config", str(objective))["model"]
    assert after["class_path"].endswith(f".{named['class_path']}")
    own = leaves(after["init_args"])
    assert {name: own[name] for name in leaves(before["init_args"])} == leaves(before["init_args"])
    assert {name: own[name] for name in named["init_args"]} == named["init_args"]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda path: path.stem)
def test_no_option_of_an_objective_is_left_from_another(objective: Path) -> None:
    """All others, then this one: it sets the options whose names it shares with one of them."""
    paths = [*(other for other in OBJECTIVES if other != objective), objective]
    given = [word for path in paths for word in ("--config", str(path))]
    alone = resolved("--config", "configs/sft/tiny.yaml", "--config", str(objective))
    assert resolved("--config", "configs/sft/tiny.yaml", *given)["model"] == alone["model"]


@pytest.mark.parametrize("bridge", ["linear", "mlp", "pixel_shuffle", "resampler"])
def test_another_projector_keeps_how_it_is_trained(bridge: str) -> None:
    config = resolved("--config", "configs/sft/image.yaml", "--config", f"configs/bridge/{bridge}.yaml")
    assert config["model"]["init_args"]["image_projector"]["init_args"]["tune"]["lr"] == 2.0e-5


def test_the_resampler_of_other_media_is_one_flag() -> None:
    """As the overlay says, which cannot set a projector whose encoder a recipe may lack."""
    flags = [word for line in (ROOT / "configs/bridge/resampler.yaml").read_text().splitlines() for word in line.split()]
    start = flags.index("--model.video_projector")
    assert flags[start + 2] == "--model.audio_projector"
    model = resolved("--config", "configs/sft/image.yaml", *flags[start : start + 4])["model"]["init_args"]
    for modality in ("video", "audio"):
        assert model[f"{modality}_projector"]["class_path"] == "encoders.resampler.PerceiverResampler"
        assert model[f"{modality}_projector"]["init_args"]["num_latents"] == 64


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_instantiated_without_network_weights_or_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_modules.cli import OmniLitCLI
    from lightning_modules.multimodal import MultiModalLitModule

    monkeypatch.chdir(ROOT)
    from datamodules.loading import RowDataModule

    cli = OmniLitCLI(
        MultiModalLitModule,
        RowDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        run=False,
        trainer_defaults={"callbacks": [], "accelerator": "cpu", "precision": "32-true", "logger": False},
        args=["--config", str(path), "--trainer.accelerator", "cpu", "--trainer.logger", "false"],
    )
    assert cli.datamodule.processor is cli.model.processor
    assert not list(cli.model.parameters())


OFFLOAD = {"device": "cpu", "nvme_path": "/local_nvme", "buffer_count": 4, "pin_memory": True}
BUFFERS = {"buffer_count": 5, "buffer_size": 100_000_000, "max_in_cpu": 1_000_000_000}
STRATEGIES = {
    "ddp": ("DDPStrategy", {}),
    "deepspeed_zero2": ("ZeroStrategy", {"stage": 2}),
    "deepspeed_zero3_offload": ("ZeroStrategy", {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD | BUFFERS}),
    "fsdp": ("ShardedStrategy", {"_data_parallel_size": "auto", "_tensor_parallel_size": 1}),
    "tp": ("ShardedStrategy", {"_data_parallel_size": 1, "_tensor_parallel_size": "auto"}),
    "fsdp_tp": ("ShardedStrategy", {"_data_parallel_size": "auto", "_tensor_parallel_size": "auto"}),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs/strategy").glob("*.yaml")))
def test_a_strategy_is_made_as_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from datamodules.loading import RowDataModule
    from lightning_modules.cli import OmniLitCLI
    from lightning_modules.multimodal import MultiModalLitModule

    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -r requirements-deepspeed.txt")
    monkeypatch.chdir(ROOT)
    configs = ["--config", "configs/sft/tiny.yaml", "--config", f"configs/strategy/{name}.yaml"]
    kinds: dict[str, Any] = {
        "subclass_mode_model": True,
        "subclass_mode_data": True,
        "auto_configure_optimizers": False,
        "run": False,
    }
    kinds["trainer_defaults"] = {"callbacks": []}
    cli = OmniLitCLI(MultiModalLitModule, RowDataModule, args=[*configs, "--trainer.logger", "false"], **kinds)
    expected, options = STRATEGIES[name]
    strategy = cli.trainer.strategy
    assert type(strategy).__name__ == expected
    own = vars(strategy) | (strategy.config["zero_optimization"] if name.startswith("deepspeed") else {})
    assert {option: own[option] for option in options} == options


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "configs/strategy").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_strategy_goes_with_each_recipe(recipe: Path, path: Path, plain: dict[Path, dict[str, Any]]) -> None:
    after = resolved("--config", str(recipe), "--config", str(path))
    assert {name: after[name] for name in ("model", "data")} == {name: plain[recipe][name] for name in ("model", "data")}
    named = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]["strategy"]
    assert after["trainer"]["strategy"]["class_path"].endswith(named["class_path"])


def test_the_sweep_is_one_that_wandb_takes_and_its_command_line_parses() -> None:
    from sweeps.config.cfg import schema_violations_from_proposed_config
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    path = ROOT / "configs/sweeps/lr_rank.yaml"
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert schema_violations_from_proposed_config(sweep) == []
    drawn = {name: {"value": 16 if name.endswith(".r") else 3.3e-4} for name in sweep["parameters"]}
    filled = {"env": ["/usr/bin/env"], "program": [sweep["program"]], **create_sweep_command_args({"args": drawn})}
    words = [word for part in sweep["command"] for word in filled.get(part[2:-1], [part] if not part.startswith("${") else [])]
    assert shlex.join(words).startswith("/usr/bin/env python train.py fit --config configs/sft/image.yaml")
    config = resolved(*words[words.index("fit") + 1 :])
    tune = config["model"]["init_args"]["language_model"]["init_args"]["tune"]
    assert (tune["lr"], tune["lora"]["r"]) == (3.3e-4, 16)
    assert config["trainer"]["logger"]["class_path"].endswith("WandbLogger")
    assert sweep["metric"]["name"] == "val/loss"


def test_the_sweep_over_beta_reads_one_reference() -> None:
    from sweeps.config.cfg import schema_violations_from_proposed_config

    sweep = yaml.safe_load((ROOT / "configs/sweeps/dpo_beta.yaml").read_text(encoding="utf-8"))
    assert schema_violations_from_proposed_config(sweep) == []
    words = sweep["command"][4:-1]
    found = [resolved(*words, f"--model.init_args.beta={beta}") for beta in sweep["parameters"]["model.init_args.beta"]["values"]]
    assert len({config["model"]["init_args"]["beta"] for config in found}) == 4
    for config in found:
        assert config["model"]["init_args"]["reference"]["class_path"].endswith(".PrecomputedReference")
        assert config["model"]["init_args"]["reference"]["init_args"]["folder"] == ".cache/reference/image"


def test_a_sweep_run_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r7")
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    main(["fit", "--config", "configs/sft/tiny.yaml", "--trainer.default_root_dir", str(tmp_path), *quiet])
    assert (tmp_path / "r7/config.yaml").is_file()
    assert (tmp_path / "r7/csv").is_dir()
