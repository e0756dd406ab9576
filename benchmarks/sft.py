"""A LoRA step of supervised fine-tuning: OmniLit beside the Trainer of transformers with PEFT, and TRL's SFTTrainer.

    python benchmarks/sft.py

The same LLaVA-shaped weights of SmolLM2-135M's size (`benchmarks/shared/llava_shape.py`), the same rows, float32, one thread, 4
rows of 512 tokens with a picture of 256. Each peer is a process of its own and takes its steps in turn with the others; time is
process CPU-seconds, the least of the steps after the first. Memory is the peak resident set above that before the first step. The
losses of all steps must agree. `mfu_cpu` is the share of the best matrix product of the same process that a step of ours reaches.
`ratio_limit` is what the ratio would be if a step of ours took no longer than the products and the attention that both peers have
to compute, each timed alone at its shape: norms, gates, rotations, sums, the optimizer and all of Python free of charge.
TRL takes part where it is installed (requirements-parity.txt).
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch makes its threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.shared import llava_shape as shape
from benchmarks.shared.turns import Turn, take_turns

ROWS, TOKENS, LEARNING_RATE = 4, 512, 1e-4
SUPERVISED = {25: 128, 100: 511}
PEERS = ("omnilit", "hf", "trl")


def batches(percent: int, num_steps: int) -> list[shape.Rows]:
    return [shape.make_rows(30 + step, ROWS, TOKENS, SUPERVISED[percent]) for step in range(num_steps)]


def run_omnilit(folder: Path, percent: int, num_steps: int) -> None:
    """Trains by Lightning."""
    import lightning.pytorch as L
    from torch.optim.lr_scheduler import ConstantLR

    from datamodules.batch import Example, MediaItem, Origin
    from datamodules.collate import collate
    from lightning_modules.multimodal import MultiModalLitModule

    turn = Turn()

    class Steps(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            turn.begin()

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            turn.end(float(trainer.callback_metrics["train/loss"]))

    module = MultiModalLitModule(
        **shape.omnilit_parts(folder),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.0),
        lr_scheduler=lambda optimizer: ConstantLR(optimizer, factor=1.0),
    )
    shape.load_omnilit(module, folder)
    module.model.media_token_ids = {"image": shape.IMAGE_TOKEN}
    data = []
    for number, rows in enumerate(batches(percent, num_steps)):
        examples = [
            Example(
                Origin("rows", row),
                str(row),
                rows.tokens_BT[row].tolist(),
                rows.labels_BT[row].tolist(),
                {"image": [MediaItem(f"{number}.{row}", rows.pixels_NCHW[row], shape.NUM_PATCHES, 4)]},
            )
            for row in range(ROWS)
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
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type]


def _hf_rows(percent: int, num_steps: int) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": rows.tokens_BT[row], "labels": rows.labels_BT[row], "pixel_values": rows.pixels_NCHW[row]}
        for rows in batches(percent, num_steps)
        for row in range(ROWS)
    ]


def _hf_collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def _hf_options(num_steps: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": ROWS,
        "max_steps": num_steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "disable_tqdm": True,
    }


def run_hf(folder: Path, percent: int, num_steps: int, with_trl: bool = False) -> None:
    """Trains by the Trainer of transformers, or by TRL's."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    turn = Turn()

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                turn.end(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    rows = _hf_rows(percent, num_steps)
    model = shape.peft_llava(folder)
    options = _hf_options(num_steps)
    if with_trl:
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        class InOrderTRL(SFTTrainer):
            def _get_train_sampler(self, *args: Any) -> Any:
                return torch.utils.data.SequentialSampler(rows)

            def get_train_dataloader(self) -> Any:
                return self.accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=ROWS, collate_fn=_hf_collate))

        trainer: Any = InOrderTRL(
            model=model,
            args=SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=Dataset.from_dict({"input_ids": [[0]] * len(rows)}),
            data_collator=_hf_collate,
            processing_class=AutoTokenizer.from_pretrained(folder / "language"),
            callbacks=[Steps()],
        )
    else:
        trainer = InOrder(
            model=model, args=TrainingArguments(**options), train_dataset=rows, data_collator=_hf_collate, callbacks=[Steps()]
        )
    trainer.train()


def useful_gflops(num_supervised: int) -> float:
    """Of a step with frozen weights and adapters; what is recomputed or thrown away does not count.

    Each frozen matrix takes 2 operations a weight forward and 2 for the gradient of its input, each adapter 6; the causal half of
    the attention 6 x length x width a token and layer, forward and backward.
    """
    body = shape.NUM_LAYERS * (2 * shape.WIDTH**2 + 2 * shape.WIDTH * 192 + 3 * shape.WIDTH * 1536)
    adapters = (
        shape.NUM_LAYERS * shape.RANK * (6 * shape.WIDTH + 2 * 192 + 3 * (shape.WIDTH + 1536) - 2 * shape.WIDTH + 2 * shape.WIDTH)
    )
    tokens = ROWS * TOKENS
    attention = 6 * TOKENS * shape.WIDTH * shape.NUM_LAYERS * tokens
    head = 4 * shape.VOCABULARY * shape.WIDTH * ROWS * num_supervised
    vision = 2 * 5 * 12 * 384**2 * ROWS * (shape.NUM_PATCHES + 1)
    return (4 * body * tokens + 6 * adapters * tokens + attention + head + vision) / 1e9


def floor_seconds(num_supervised: int) -> float:
    """CPU-seconds of the products and the attention of a step, by torch's own kernels, each the best of five."""
    tokens, pixels, width, rank = ROWS * TOKENS, ROWS * (shape.NUM_PATCHES + 1), shape.WIDTH, shape.RANK
    products = [(1, num_supervised * ROWS, width, shape.VOCABULARY), (1, num_supervised * ROWS, shape.VOCABULARY, width)]
    products += [(5 * 4, pixels, 384, 384), (5, pixels, 384, 1536), (5, pixels, 1536, 384)]
    for inner, outer in ((width, width), (width, 192), (width, 192), (width, width), (width, 1536), (width, 1536), (1536, width)):
        frozen = [(tokens, inner, outer), (tokens, outer, inner)]
        adapters = [(tokens, inner, rank), (tokens, rank, outer)]  # forward, then the gradients of its inputs and of its weights
        adapters += [(tokens, outer, rank), (tokens, rank, inner), (rank, tokens, inner), (outer, tokens, rank)]
        products += [(shape.NUM_LAYERS, *sizes) for sizes in (*frozen, *adapters)]
    query = torch.randn(ROWS, 9, TOKENS, 64, requires_grad=True)
    key, value = (torch.randn(ROWS, 3, TOKENS, 64, requires_grad=True) for _ in range(2))
    grad = torch.randn(ROWS, 9, TOKENS, 64)

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).backward(grad)

    total = shape.NUM_LAYERS * _best_seconds(attend)
    for count, rows, inner, outer in products:
        a, b = torch.randn(rows, inner), torch.randn(inner, outer)
        total += count * _best_seconds(partial(torch.mm, a, b))
    return total


def _best_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return min(seconds)


def compare(folder: Path, percent: int, num_steps: int, peers: list[str]) -> dict[str, float]:
    """Prints what a step of each peer costs, and gives the figures."""
    commands = {
        peer: [__file__, "--peer", peer, "--folder", str(folder), "--supervised", str(percent), "--steps", str(num_steps)]
        for peer in peers
    }
    steps = take_turns(commands, num_steps, lambda line: print(f"{percent:>3} % supervised  {line}", flush=True))
    for peer in peers[1:]:
        for own, other in zip(steps["omnilit"], steps[peer], strict=True):
            difference = abs(own["loss"] - other["loss"])
            assert difference < 1e-5, f"the losses differ by {difference:.1e}: the peers do not train the same"
    figures: dict[str, float] = {}
    seconds = {peer: min(step["seconds"] for step in steps[peer][1:]) for peer in peers}
    for peer in peers:
        figures[f"{peer}_tokens_per_cpu_second_{percent}"] = round(ROWS * TOKENS / seconds[peer], 1)
        figures[f"{peer}_extra_mib_{percent}"] = round(steps[peer][-1]["extra_mib"])
    for peer in peers[1:]:
        ratio = "ratio" if peer == "hf" else f"ratio_{peer}"
        figures[f"{ratio}_{percent}"] = round(seconds[peer] / seconds["omnilit"], 3)
        memory = "memory_ratio" if peer == "hf" else f"memory_ratio_{peer}"
        figures[f"{memory}_{percent}"] = round(steps["omnilit"][-1]["extra_mib"] / steps[peer][-1]["extra_mib"], 3)
    if "hf" in seconds:
        figures[f"ratio_limit_{percent}"] = round(seconds["hf"] / floor_seconds(SUPERVISED[percent]), 3)
    peak = max(step["gemm_gflops"] for step in steps["omnilit"])
    figures["mfu_cpu" if percent == 25 else f"mfu_cpu_{percent}"] = round(
        useful_gflops(SUPERVISED[percent]) / seconds["omnilit"] / peak, 3
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps of each peer; the first is not timed")
    parser.add_argument("--supervised", type=int, choices=SUPERVISED, help="share of supervised tokens in percent; default: each")
    parser.add_argument("--peers", nargs="+", choices=PEERS[1:], help="whom to compare with; default: all that are installed")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peer == "omnilit":
        run_omnilit(args.folder, args.supervised, args.steps)
    elif args.peer:
        run_hf(args.folder, args.supervised, args.steps, with_trl=args.peer == "trl")
    else:
        others = args.peers or [peer for peer in ("hf", "trl") if peer == "hf" or importlib.util.find_spec("trl")]
        figures: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            shape.write_weights(Path(folder))
            for percent in [args.supervised] if args.supervised else SUPERVISED:
                figures |= compare(Path(folder), percent, args.steps, ["omnilit", *others])
        width = max(map(len, figures))
        for name, figure in figures.items():
            print(f"{name:<{width}}  {figure:>10,.3f}")
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
