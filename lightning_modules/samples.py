"""What the model answers to a handful of validation rows, looked at after every validation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image

from datamodules.batch import MODALITIES, Batch, Example, RowError
from datamodules.thumbnails import data_uri, side_by_side, thumbnail
from lightning_modules.answers import is_right
from lightning_modules.checkpoints import write_account
from lightning_modules.run_folder import run_folder
from lightning_modules.sample_table import Column, Row, SampleTable

if TYPE_CHECKING:
    from datamodules.loading import RowDataModule
    from lightning_modules.multimodal import MultiModalLitModule


class _Chosen(NamedTuple):
    """A row of the table: with its answer, as a prompt, and small pictures of its media."""

    answered: Example
    prompt: Example
    pictures: list[Image.Image]


class SamplePage(Callback):
    """Lets the model answer the same few validation rows after every validation.

    Under W&B the answers are logged as the table `val/samples`. Otherwise they are written to `samples.html` in the run
    folder, one page with a column for each validation; `samples.json` beside it keeps what a resumed run goes on from.

    Args:
        num_samples: The first so many rows of the validation data that can be used.
    """

    def __init__(self, num_samples: int = 8) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}: to see no samples, leave the callback out")
        self.num_samples = num_samples
        self._chosen: list[_Chosen] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the rows of an earlier fit or validation."""
        self._chosen = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks, on every process alike, and shows the answers."""
        module = cast("MultiModalLitModule", pl_module)
        if trainer.sanity_checking or not module.generates:
            return
        datamodule: RowDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        if self._chosen is None:
            self._chosen = _choose(module, datamodule, self.num_samples)
        if not self._chosen:
            rank_zero_info("no samples to show: none of the validation rows can be used")
            return
        # answers that are drawn must not change what dropout draws afterwards
        with isolate_rng(), trainer.precision_plugin.val_step_context():
            column = _ask(trainer, module, datamodule, self._chosen)
        if not trainer.is_global_zero:
            return
        wandb_loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        for logger in wandb_loggers:
            _log_table(logger, self._chosen, column, trainer.global_step)
        if not wandb_loggers:
            _write_page(trainer, self._chosen, column)


def _choose(module: "MultiModalLitModule", datamodule: "RowDataModule", num_samples: int) -> list[_Chosen]:
    """The first usable validation rows, of each source in turn. The validation loader names those that are not."""
    dataset = datamodule.val_dataset
    chosen: list[_Chosen] = []
    for row in dataset.in_turn():
        if len(chosen) == num_samples:
            break
        try:
            sample = dataset.sample(row)
            media = dataset.decode(sample)
            answered, prompt = module.processor(sample, media), module.processor(sample, media, generate=True)
        except RowError:
            continue
        decoded = [medium for modality in MODALITIES for _, medium in media.get(modality, [])]
        chosen.append(_Chosen(answered, prompt, [thumbnail(medium) for medium in decoded]))
    return chosen


def _ask(trainer: Trainer, module: "MultiModalLitModule", datamodule: "RowDataModule", chosen: Sequence[_Chosen]) -> Column:
    def batch(examples: list[Example], generate: bool) -> Batch:
        return trainer.strategy.batch_to_device(datamodule.collate(examples, generate=generate), module.device)

    answers = module.generate(batch([row.prompt for row in chosen], generate=True))
    answered = batch([row.answered for row in chosen], generate=False)
    scores = module.score(answered)
    in_fit = trainer.state.fn == "fit"
    checkpoint = f" {Path(trainer.ckpt_path).name}" if trainer.ckpt_path else ""
    val_loss = trainer.callback_metrics.get("val/loss")
    return Column(
        name=f"step {trainer.global_step:,}" if in_fit else f"validate{checkpoint}",
        step=trainer.global_step if in_fit else None,
        val_loss=None if val_loss is None else float(val_loss),
        answers=tuple(answers),
        losses=tuple((scores.nll_B / scores.count_B).tolist()),
    )


def _log_table(logger: WandbLogger, chosen: Sequence[_Chosen], column: Column, step: int) -> None:
    data: list[list[Any]] = []
    for row, answer, loss in zip(chosen, column.answers, column.losses, strict=True):
        picture = _wandb_image(side_by_side(row.pictures)) if row.pictures else None
        prompt = row.prompt
        right = is_right(answer, prompt.reference)
        data.append([column.name, prompt.id, picture, prompt.prompt, prompt.reference, answer, right, loss])
    columns = ["when", "id", "picture", "question", "reference", "answer", "right", "loss"]
    logger.log_table("val/samples", columns=columns, data=data, step=step)


def _wandb_image(picture: Image.Image) -> Any:
    import wandb

    return wandb.Image(picture)


def _write_page(trainer: Trainer, chosen: Sequence[_Chosen], column: Column) -> None:
    rows = [
        Row(
            id=row.prompt.id,
            origin=str(row.prompt.origin),
            question=row.prompt.prompt,
            reference=row.prompt.reference,
            closed=row.answered.choices is not None,
            pictures=tuple(data_uri(picture) for picture in row.pictures),
        )
        for row in chosen
    ]
    folder = run_folder(trainer)
    kept = folder / "samples.json"
    table = SampleTable(rows)
    if kept.exists():
        try:
            earlier = SampleTable.from_json(kept.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{kept} cannot be read ({error}): delete it, and the sample page starts anew") from error
        if earlier.rows == rows:
            table = earlier
    table.add(column)
    write_account(trainer, kept.name, table.to_json())
    write_account(trainer, "samples.html", table.to_html(f"Samples of {folder.name}"))
