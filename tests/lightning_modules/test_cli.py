"""Which options there are, and which checkpoint is meant."""

import os
from pathlib import Path

import pytest
from jsonargparse import Namespace

from lightning_modules.checkpoints import CheckpointFile
from lightning_modules.cli import OmniLitCLI, find_checkpoint, go_on_in_wandb
from train import main

TINY = ["--config", "configs/sft/tiny.yaml", "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.warmup_ratio=2"], "model.warmup_ratio is a share of the steps, in [0, 1), got 2.0"),
        (["--model.language_model.tune.lora.r=0"], "lora.r is the rank of the adapters and must be at least 1, got 0"),
        (["--data.batch_size=0"], "data.batch_size is a number of rows, at least 1, got 0"),
        (["--checkpoint.mode=middle"], "`mode` can be min, max but got middle"),
        (["--trainer.accelerator=gpuu"], "You selected an invalid accelerator name"),
        (
            ["--trainer.strategy=lightning_modules.flat_shards.FlatShardedStrategy"],
            "trainer.strategy is lightning_modules.flat_shards.FlatShardedStrategy, which is no name of a strategy. A class is "
            "given by its path: --trainer.strategy.class_path lightning_modules.flat_shards.FlatShardedStrategy",
        ),
        (
            ["--checkpoint.dirpath=elsewhere"],
            "checkpoint.dirpath is elsewhere, but a run keeps its checkpoints in its own folder",
        ),
    ],
)
def test_what_a_constructor_refuses_is_said_alone(arguments: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        main(["fit", *TINY, "--trainer.default_root_dir", str(tmp_path), *arguments])
    assert str(refusal.value).startswith(expected)


class TestFindCheckpoint:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for step, name in [(8, "epoch=1-step=8.ckpt"), (3, "last.ckpt"), (5, "last-v1.ckpt")]:  # as written, one after the other
            CheckpointFile().save_checkpoint({"global_step": step}, tmp_path / "checkpoints" / name)
        return tmp_path

    def test_last_is_the_one_that_was_written_last(self, folder: Path, recwarn: pytest.WarningsRecorder) -> None:
        """Neither its name nor its step says so: a run that was taken up again from an earlier one has a lower step."""
        for age, path in enumerate((folder / "checkpoints").glob("*.ckpt")):
            os.utime(path, (1000 - age, 1000 - age))
        assert find_checkpoint("last", folder) == str(folder / "checkpoints/last-v1.ckpt")
        assert not recwarn.list

    def test_it_is_said_which_was_taken(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            find_checkpoint("last", folder)
        assert [record.getMessage() for record in caplog.records] == [f"taking {folder}/checkpoints/last-v1.ckpt, step 5"]

    def test_one_of_a_requeued_job_counts_too(self, folder: Path) -> None:
        CheckpointFile().save_checkpoint({"global_step": 9}, folder / "hpc_ckpt_1.ckpt")
        assert find_checkpoint("last", folder) == str(folder / "hpc_ckpt_1.ckpt")

    def test_one_that_is_not_whole_is_left_and_named(self, folder: Path) -> None:
        cut, flipped = folder / "checkpoints/last-v1.ckpt", folder / "checkpoints/last.ckpt"
        cut.write_bytes(cut.read_bytes()[:-7])
        flip_a_bit(flipped)
        with pytest.warns(
            UserWarning, match=r"step=8\.ckpt, step 8; left: last-v1\.ckpt: .* bytes; left: last\.ckpt: its SHA-256"
        ):
            assert find_checkpoint("last", folder) == str(folder / "checkpoints/epoch=1-step=8.ckpt")
        flip_a_bit(folder / "checkpoints/epoch=1-step=8.ckpt")
        with pytest.raises(ValueError, match=r"no checkpoint is whole \(.*last-v1\.ckpt: .*; .*step=8\.ckpt: its SHA"):
            find_checkpoint("last", folder, may_begin=True)

    def test_without_manifests_one_must_be_named(self, folder: Path) -> None:
        for path in (folder / "checkpoints").glob("*.json"):
            path.unlink()
        with pytest.raises(ValueError, match=r"none of the checkpoints .*last\.ckpt.* has a manifest.*Name one"):
            find_checkpoint("last", folder, may_begin=True)

    def test_a_file_is_itself(self, folder: Path) -> None:
        path = str(folder / "checkpoints/epoch=1-step=8.ckpt")
        assert find_checkpoint(path, folder / "elsewhere") == path
        assert find_checkpoint(None, folder) is None

    def test_what_is_not_there_is_refused(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"there is no x\.ckpt.*holds epoch=1-step=8\.ckpt, last-v1\.ckpt, last\.ckpt"):
            find_checkpoint("x.ckpt", folder)
        with pytest.raises(ValueError, match="holds no checkpoint"):
            find_checkpoint("last", folder / "elsewhere", may_begin=True)

    def test_a_run_that_was_killed_before_its_first_begins_anew(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("model: {}\n")
        with pytest.raises(ValueError, match="holds no checkpoint"):
            find_checkpoint("last", tmp_path)
        with pytest.warns(UserWarning, match="ended before its first, and begins anew"):
            assert find_checkpoint("last", tmp_path, may_begin=True) == "last"

    @pytest.mark.parametrize("with_summary", [False, True])
    def test_one_whose_checkpoints_are_gone_does_not(self, folder: Path, with_summary: bool) -> None:
        (folder / "config.yaml").write_text("model: {}\n")
        left = (folder / "checkpoints").glob("*.ckpt*" if with_summary else "*.ckpt")
        for path in left:
            path.unlink()
        if with_summary:
            (folder / "summary.json").write_text('{"steps": 8, "best_checkpoint": null, "last_checkpoint": "a/last.ckpt"}')
        names = "last.ckpt" if with_summary else r"epoch=1-step=8\.ckpt, last-v1\.ckpt, last\.ckpt"
        before = sorted(path.name for path in folder.rglob("*"))
        with pytest.raises(ValueError, match=rf"had are gone \({names}\)\. Bring one back .* in another folder"):
            find_checkpoint("last", folder, may_begin=True)
        assert sorted(path.name for path in folder.rglob("*")) == before

    def test_one_that_has_made_steps_without_any_begins_anew(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("model: {}\n")
        (tmp_path / "summary.json").write_text('{"steps": 8, "best_checkpoint": null, "last_checkpoint": null}')
        with pytest.warns(UserWarning, match="ended before its first, and begins anew"):
            assert find_checkpoint("last", tmp_path, may_begin=True) == "last"


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_checkpoints_outside_of_the_run_folder_are_refused_before_one_is_looked_for(command: str, tmp_path: Path) -> None:
    """Or a run that was killed and has some there would begin anew."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    (run / "config.yaml").write_text("model: {}\n")
    CheckpointFile().save_checkpoint({"global_step": 9}, elsewhere / "last.ckpt")
    given = [f"--checkpoint.dirpath={elsewhere}", "--ckpt_path=last"]
    with pytest.raises(ValueError, match=rf"here in {run}/checkpoints: .*--ckpt_path last finds.*--trainer\.default_root_dir"):
        main([command, *TINY, "--trainer.default_root_dir", str(run), *given])


@pytest.mark.parametrize(("count", "has_begun", "taken"), [(None, True, None), ("1", True, "step 9"), ("1", False, None)])
def test_a_job_that_slurm_started_again_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    count: str | None,
    has_begun: bool,
    taken: str | None,
) -> None:
    if has_begun:
        (tmp_path / "config.yaml").write_text("model: {}\n")
        CheckpointFile().save_checkpoint({"global_step": 9}, tmp_path / "checkpoints/last.ckpt")
    if count is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    config = Namespace(trainer=Namespace(default_root_dir=str(tmp_path), logger=False), ckpt_path=None)
    cli = object.__new__(OmniLitCLI)
    cli.subcommand = "fit"
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        cli._find_checkpoint(config)
    assert (config.ckpt_path is not None) == (taken is not None) and (taken or "") in caplog.text


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_resumed_run_goes_on_in_its_wandb_run() -> None:
    csv, wandb, named = (
        Namespace(class_path=f"lightning.pytorch.loggers.{name}", init_args=Namespace(id=run_id, version=None))
        for name, run_id in (("CSVLogger", None), ("WandbLogger", None), ("WandbLogger", "mine"))
    )
    go_on_in_wandb([csv, wandb, named], "abc")
    assert [spec.init_args.id for spec in (csv, wandb, named)] == [None, "abc", "mine"]
    for nothing in (False, None, True):
        go_on_in_wandb(nothing, "abc")


def test_an_abbreviation_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *TINY, "--seed=3"])
    assert "seed is no known name" in capsys.readouterr().err
