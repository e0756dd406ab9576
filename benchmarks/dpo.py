"""A DPO step with LoRA on pairs that share a picture: OmniLit beside TRL's DPOTrainer.

    python benchmarks/dpo.py

The same LLaVA-shaped weights of SmolLM2-135M's size (`benchmarks/shared/llava_shape.py`), the same pairs, float32, one
thread: prompts of 640 tokens with a picture of 256, answers of 96, two pairs a step. `uncached` computes the reference in
each step, as TRL does (it cannot precompute it with pictures); `cached` reads it, as from the second epoch on or in the
second run of a sweep. Each peer is a process of its own and takes its steps in turn with the others; time is process
CPU-seconds, the least of the steps after those that fill the cache. The losses of all steps must agree. Beside it the
encoder's passes a pair, and the peak resident set above that before the first step. It needs requirements-parity.txt.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch makes its threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.shared import llava_shape as shape
from benchmarks.shared.turns import Turn, take_turns

PAIRS, PROMPT, ANSWER, LEARNING_RATE, BETA = 2, 640, 96, 1e-4, 0.1
NUM_BATCHES = 2
"""So many different batches come again and again: the first steps fill the cache."""
PEERS = ("cached", "uncached", "trl")


def batches() -> list[tuple[shape.Rows, shape.Rows]]:
    """Chosen and rejected rows, which have prompts and pictures in common."""
    found = []
    for number in range(NUM_BATCHES):
        chosen = shape.make_rows(50 + number, PAIRS, PROMPT + ANSWER, ANSWER)
        other = shape.make_rows(70 + number, PAIRS, PROMPT + ANSWER, ANSWER)
        tokens_BT = torch.cat([chosen.tokens_BT[:, :PROMPT], other.tokens_BT[:, PROMPT:]], 1)
        found.append((chosen, shape.Rows(tokens_BT, other.labels_BT, chosen.pixels_NCHW)))
    return found


class CountPasses:
    """Counts the pictures that go through a vision tower."""

    def __init__(self, tower: nn.Module) -> None:
        self.pictures = 0
        tower.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.pictures += len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])


def run_omnilit(folder: Path, num_steps: int, is_cached: bool) -> None:
    """Trains by Lightning."""
    import lightning.pytorch as L
    from torch.optim.lr_scheduler import ConstantLR

    from datamodules.answer_rows import AnswerExample
    from datamodules.batch import Example, MediaItem, Origin
    from datamodules.collate import collate
    from lightning_modules.dpo import DPOLitModule
    from lightning_modules.precomputed import PrecomputedReference
    from lightning_modules.references import AdapterOff

    turn = Turn()

    class Steps(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            turn.begin()

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            turn.end(float(trainer.callback_metrics["train/loss"]), pictures=passes.pictures)

    reference = PrecomputedReference(str(folder / "reference"), AdapterOff()) if is_cached else AdapterOff()
    module = DPOLitModule(
        **shape.omnilit_parts(folder, projector="frozen"),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.0),
        lr_scheduler=lambda optimizer: ConstantLR(optimizer, factor=1.0),
        beta=BETA,
        reference=reference,
    )
    shape.load_omnilit(module, folder)
    module.model.media_token_ids = {"image": shape.IMAGE_TOKEN}
    assert module.model.image_encoder is not None
    passes = CountPasses(module.model.image_encoder.model)

    def example(rows: shape.Rows, row: int, number: int) -> Example:
        item = MediaItem(f"{number}.{row}", rows.pixels_NCHW[row], shape.NUM_PATCHES, 4)
        return Example(
            Origin("pairs", row), str(row), rows.tokens_BT[row].tolist(), rows.labels_BT[row].tolist(), {"image": [item]}
        )

    data = []
    for number, (chosen, rejected) in enumerate(batches()):
        examples = [
            AnswerExample(**vars(example(chosen, row, number)), others=[("rejected", example(rejected, row, number))])
            for row in range(PAIRS)
        ]
        data.append(collate(examples, pad_id=0))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=num_steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Steps()],
    )
    steps = [data[step % NUM_BATCHES] for step in range(num_steps)]
    trainer.fit(module, torch.utils.data.DataLoader(steps, batch_size=None))  # type: ignore[arg-type]


def run_trl(folder: Path, num_steps: int) -> None:
    """Trains by TRL."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    turn = Turn()

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                turn.end(float(logs["loss"]), pictures=passes.pictures)

    class Given(DPOTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader([data[step % NUM_BATCHES] for step in range(num_steps)], batch_size=None)

    data = []
    for chosen, rejected in batches():
        tokens_BT = torch.cat([chosen.tokens_BT, rejected.tokens_BT])
        completion_BT = (torch.cat([chosen.labels_BT, rejected.labels_BT]) != -100).long()
        pixels = torch.cat([chosen.pixels_NCHW, rejected.pixels_NCHW])
        data.append(
            {
                "input_ids": tokens_BT,
                "attention_mask": torch.ones_like(tokens_BT),
                "completion_mask": completion_BT,
                "pixel_values": pixels,
            }
        )
    options = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": PAIRS,
        "max_steps": num_steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "disable_tqdm": True,
        "beta": BETA,
    }
    trainer = Given(
        model=shape.llava(folder),
        args=DPOConfig(**options),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * PAIRS * num_steps),
        processing_class=AutoTokenizer.from_pretrained(folder / "language"),
        peft_config=shape.lora_config(),
        callbacks=[Steps()],
    )
    shape.draw_adapters(trainer.model)
    passes = CountPasses(trainer.model.get_base_model().model.vision_tower)
    trainer.train()


def compare(folder: Path, num_steps: int) -> dict[str, float]:
    """Prints what a step of each peer costs, and gives the figures."""
    commands = {peer: [__file__, "--peer", peer, "--folder", str(folder), "--steps", str(num_steps)] for peer in PEERS}
    steps = take_turns(commands, num_steps, lambda line: print(line, flush=True))
    for peer in PEERS[1:]:
        for own, other in zip(steps["cached"], steps[peer], strict=True):
            difference = abs(own["loss"] - other["loss"])
            assert difference < 2e-4, f"the losses differ by {difference:.1e}: the peers do not train the same"
    seconds = {peer: min(step["seconds"] for step in steps[peer][NUM_BATCHES:]) for peer in PEERS}
    figures: dict[str, float] = {}
    for peer in PEERS:
        figures[f"{peer}_cpu_seconds_a_pair"] = round(seconds[peer] / PAIRS, 2)
        figures[f"{peer}_extra_mib"] = round(steps[peer][-1]["extra_mib"])
        figures[f"{peer}_encoder_passes_a_pair"] = round(steps[peer][-1]["pictures"] / (num_steps * PAIRS), 2)
    return figures | {f"ratio_{peer}": round(seconds["trl"] / seconds[peer], 3) for peer in PEERS[:2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help=f"steps of each peer; the first {NUM_BATCHES} are not timed")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peer == "trl":
        run_trl(args.folder, args.steps)
    elif args.peer:
        run_omnilit(args.folder, args.steps, is_cached=args.peer == "cached")
    else:
        with tempfile.TemporaryDirectory() as folder:
            shape.write_weights(Path(folder))
            figures = compare(Path(folder), args.steps)
        width = max(map(len, figures))
        for name, figure in figures.items():
            print(f"{name:<{width}}  {figure:>10,.3f}")
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
