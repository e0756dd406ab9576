"""The demo goes on: the model that learnt to name pictures is trained on preferences, and asked again about pictures never seen.

`make demo-dpo` runs it, after `make demo`. In a pair the true name of a picture stands against the wrong one that the model finds
likeliest; pairs to train on are of pictures that the model has not met. Figures go to runs/demo-dpo/report.json. The names of a
picture are told apart by their first tokens, which differ, so that one pass over its question has the log-probability of each;
the likeliest is what `make demo` takes for the model's choice.

Shape suffixes: R rows, N names.
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo.pictures import CLASSES, prepare
from demo.run import CONFIG, say
from demo.run import RUN as SFT_RUN
from demo.weights import CACHE, convert_all

OVERLAYS = ("configs/objective/dpo.yaml", "demo/dpo.yaml")
SFT = SFT_RUN / "checkpoints" / "last.ckpt"
RUN = Path("runs/demo-dpo")
NAMES = list(CLASSES.values())


@dataclass(frozen=True)
class Named:
    """What a model makes of pictures.

    Args:
        logps_RN: Log-probability of each name (nats).
        right_R: The number of the right name.
    """

    logps_RN: Tensor
    right_R: Tensor

    @property
    def accuracy(self) -> float:
        """Share of pictures whose right name is the likeliest of all: that of `make demo`."""
        return float((self.logps_RN.argmax(1) == self.right_R).float().mean())

    def likeliest_wrong(self) -> Tensor:
        """The wrong name that is likeliest: wrong_R."""
        return self.logps_RN.scatter(1, self.right_R[:, None], -torch.inf).argmax(1)

    def margins(self, wrong_R: Tensor) -> Tensor:
        """By how much the right name is likelier than a wrong one: margin_R (nats)."""
        right_R1, wrong_R1 = (self.logps_RN.gather(1, name_R[:, None]) for name_R in (self.right_R, wrong_R))
        return (right_R1 - wrong_R1)[:, 0]


def main() -> None:
    """Finds the pairs, trains on them, scores before and after, and reports."""
    started = time.monotonic()
    if not SFT.is_file():
        sys.exit(f"error: there is no {SFT}: run `make demo` first, whose model this goes on from")
    convert_all(CACHE)
    data = prepare(CACHE / "fashion")
    if RUN.exists():
        shutil.rmtree(RUN)  # the demo's own folder: each is a run of its own
    RUN.mkdir(parents=True)

    from transformers.utils.logging import disable_progress_bar

    from train import main as train  # after the conversions: it takes seconds to import
    from train import quiet_lightning

    quiet_lightning()
    disable_progress_bar()  # of the loading of weights
    rows = {split: data[split].read_text(encoding="utf-8").splitlines() for split in ("preference", "val", "test")}
    say(f"1/3  which wrong name is the likeliest: of {len(rows['preference']):,} new pictures, and of those that are held out")
    before = look_at(SFT, rows, data["media_root"])
    wrong = {split: named.likeliest_wrong() for split, named in before.items()}
    for split in ("preference", "val"):
        write_pairs(rows[split], wrong[split], RUN / f"pairs-{split}.jsonl")
    say("2/3  DPO on pairs of the right and that wrong name")
    configs = [argument for path in (CONFIG, *OVERLAYS) for argument in ("--config", path)]
    cli = train(["fit", *configs, "--trainer.enable_progress_bar", "false"])
    say("3/3  after: the same held-out pictures")
    checkpoint = RUN / "checkpoints" / "last.ckpt"
    after = look_at(checkpoint, {split: rows[split] for split in ("val", "test")}, data["media_root"])
    report: dict[str, Any] = {split: scores_of(before[split], after[split], wrong[split]) for split in after}
    report["val"]["reward_accuracy_after"] = float(cli.trainer.callback_metrics["val/rewards/accuracies"])
    report |= {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(time.process_time(), 1)}
    (RUN / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say(summary(report))


def look_at(checkpoint: Path, rows: dict[str, list[str]], media_root: Path) -> dict[str, Named]:
    """Asks a model about pictures.

    Args:
        checkpoint: The model.
        rows: By split the rows of a JSONL file.
        media_root: What their pictures lie below.
    """
    from datamodules.batch import IGNORE_INDEX
    from datamodules.image import ImageDataModule
    from deployment.ask import load

    model, processor = load(checkpoint)
    model.eval()
    named = {}
    for split, lines in rows.items():
        path = RUN / f"rows-{split}.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        data = ImageDataModule(
            test_path=str(path), media_root=str(media_root), eval_batch_size=50, num_workers=0, processor=processor
        )
        data.setup("test")
        right_R = torch.tensor([NAMES.index(json.loads(line)["messages"][-1]["content"]) for line in lines])
        hidden, first = [], []  # before the first token of the answer, and that token
        with torch.no_grad():
            for batch in data.test_dataloader():
                place_B = (batch["labels_BT"] != IGNORE_INDEX).int().argmax(1)
                row_B = torch.arange(len(place_B))
                hidden.append(model(batch, model.encode(batch))[row_B, place_B - 1])
                first.append(batch["labels_BT"][row_B, place_B])
            first_N = first_tokens(torch.cat(first), right_R)
            logps = [model.language_model.head(hidden_BD).log_softmax(-1)[:, first_N] for hidden_BD in hidden]
        named[split] = Named(torch.cat(logps), right_R)
    return named


def first_tokens(first_R: Tensor, right_R: Tensor) -> Tensor:
    """The token that each name begins with: first_N.

    Args:
        first_R: The first token of the right name of pictures.
        right_R: The number of that name.

    Raises:
        ValueError: Two names begin alike, or a name is never the right one.
    """
    first_N = torch.full((len(NAMES),), -1).scatter(0, right_R, first_R)
    if bool((first_N < 0).any()) or len(first_N.unique()) != len(NAMES):
        raise ValueError(f"names are told apart by their first tokens, but those of {NAMES} are {first_N.tolist()}")
    return first_N


def write_pairs(rows: Sequence[str], wrong_R: Tensor, path: Path) -> None:
    """Writes rows with a wrong name each.

    Args:
        rows: Those of a JSONL file.
        wrong_R: The number of the wrong name of each.
        path: The file.
    """
    pairs = [json.loads(row) | {"rejected_response": NAMES[wrong]} for row, wrong in zip(rows, wrong_R.tolist(), strict=True)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def scores_of(before: Named, after: Named, wrong_R: Tensor) -> dict[str, float]:
    """The figures of some pictures, on the same pairs before and after.

    Args:
        before: What the model made of them.
        after: What it makes of them now.
        wrong_R: The wrong name in each pair.
    """
    scores: dict[str, float] = {}
    for when, named in (("before", before), ("after", after)):
        margin_R = named.margins(wrong_R)
        scores |= {
            f"preference_{when}": float((margin_R > 0).float().mean()),
            f"margin_{when}": float(margin_R.mean()),
            f"accuracy_{when}": named.accuracy,
        }
    return scores


def summary(report: dict[str, Any]) -> str:
    """The figures as a table for the terminal."""
    scores = report["test"]
    lines = ["\nheld-out pictures           before    after"]
    for title, name, form in (
        ("pairs, right name likelier", "preference", "6.1%"),
        ("by (nats)", "margin", "6.2f"),
        ("right among all ten names", "accuracy", "6.1%"),
    ):
        lines.append(f"{title:<27}{scores[f'{name}_before']:{form}}  -> {scores[f'{name}_after']:{form}}")
    lines.append(f"took                       {report['seconds'] / 60:.1f} minutes, {report['cpu_seconds']:.0f} CPU-seconds")
    lines.append(f"figures, checkpoint        {RUN / 'report.json'}, {RUN / 'checkpoints' / 'last.ckpt'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
