"""What `train.py plan` predicts of the memory of training, beside what training takes.

    python benchmarks/plan.py

Models of 10 to 20 million weights train for two steps on a CPU, with one thread, each in a process of its own, with Lightning's
Trainer, as `fit` does. Measured is the operating system's own count: the largest resident set (VmHWM) less that before the model
was built, in a process that has trained one step of one row before, and has given back what that freed; every large block is
mapped for itself. Predicted is what `plan` says of the same module, data and trainer: it reads no weights, decodes nothing, and
knows nothing of the measurement. Under FSDP and ZeRO two processes train. `max_error` is the largest |predicted / measured - 1|.
"""

import argparse
import ctypes
import gc
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch makes its threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bitsandbytes.optim import AdamW8bit
from jsonargparse import Namespace
from PIL import Image
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.shared.llava_shape import TARGETS, write_weights
from datamodules.batching import Batching
from datamodules.image import ImageDataModule
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.dpo import DPOLitModule
from lightning_modules.multimodal import MultiModalLitModule
from models.cross_attention import GatedCrossAttentionFusion
from models.language import LanguageModel
from models.pretrained import PretrainedMLLM
from planning.devices import find_device
from planning.gradients import UPDATE
from planning.placement import placement_of
from planning.run import Run, plan_run
from tests.lightning_modules.processes import flat, in_two_processes, sharded, zero

MIB = 2**20
WAITS = timedelta(seconds=60)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3): from so many bytes on a block is mapped for itself, and what is free at the end of the heap is given back."""
STRATEGIES = {
    "fsdp": (sharded, "lightning_modules.strategies.ShardedStrategy"),
    "flat": (flat, "lightning_modules.flat_shards.FlatShardedStrategy"),
    "zero": (zero, "lightning_modules.zero.ZeroStrategy"),
}
LORA = Tune(mode="lora", lora=LoRA(r=16, target_modules=TARGETS))
NUM_ROWS, NUM_TOKENS = 12, 480


def write_rows(folder: Path) -> None:
    """Rows of text, and rows with a picture of 256 patches, of one length each: then each batch is as large as the largest."""
    generator = torch.Generator().manual_seed(20)
    rows: dict[str, list[str]] = {"text": [], "pictures": []}
    for number in range(NUM_ROWS):
        pixels = torch.randint(256, (300, 400, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        half = "ab" * (NUM_TOKENS // 4)
        text = {"query": half, "response": half, "rejected_response": half[::-1]}
        few = {"query": f"<image>{'a' * 100}", "response": "b" * 100, "rejected_response": "c" * 100, "images": [f"{number}.png"]}
        rows["text"].append(json.dumps(text))
        rows["pictures"].append(json.dumps(few))
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Case:
    """A run.

    Args:
        module: Makes the module.
        rows: Name of its file.
        data: Options of the data module.
        trainer: Options of the trainer.
        strategy: How two processes train, as a name in `STRATEGIES` and its options; None: one does.
    """

    module: Callable[[], MultiModalLitModule]
    rows: str = "text"
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: tuple[str, dict[str, Any]] | None = None

    def make_data(self, module: MultiModalLitModule, folder: Path) -> ImageDataModule:
        """The data module."""
        path = str(folder / f"{self.rows}.jsonl")
        of_model: dict[str, Any] = {"processor": module.processor, "answer_form": module.answer_form}
        return ImageDataModule(**{"train_path": path, "batch_size": 4, "num_workers": 0, **of_model, **self.data})


def cases(folder: Path) -> dict[str, Case]:
    """The runs, by name."""

    def module(
        tune: Tune,
        tower: Tune | None = None,
        kind: type[MultiModalLitModule] = MultiModalLitModule,
        gated: bool = False,
        optimizer: Callable[..., Optimizer] = AdamW,
        **options: Any,
    ) -> Callable[[], MultiModalLitModule]:
        def make() -> MultiModalLitModule:
            fusion = GatedCrossAttentionFusion() if gated else None
            language_model = LanguageModel(name_or_path=str(folder / "language"), tune=tune, **options)
            if tower is None:
                return kind(language_model, optimizer=optimizer)
            encoder = HFVisionEncoder(name_or_path=str(folder / "vision"), layer=-2, tune=tower)
            return kind(language_model, image_encoder=encoder, image_projector=MLPProjector(), fusion=fusion)

        return make

    def ready(tune: Tune, vision_tune: Tune) -> Callable[[], MultiModalLitModule]:
        def make() -> MultiModalLitModule:
            return MultiModalLitModule(PretrainedMLLM(name_or_path=str(folder / "llava"), tune=tune, vision_tune=vision_tune))

        return make

    def two(tune: Tune, strategy: str, trainer: dict[str, Any] | None = None, **options: Any) -> Case:
        return Case(module(tune), data={"batch_size": 2}, trainer=trainer or {}, strategy=(strategy, options))

    full, frozen, recomputed = Tune(mode="full"), Tune(mode="frozen"), replace(LORA, activation_checkpointing=True)
    halves, accumulated, bucket = {"batch_size": 2}, {"accumulate_grad_batches": 2}, {"reduce_bucket_size": 1_000_000}
    packed = {"batching": Batching(kind="packed", max_tokens=1024), "batch_size": 2}
    return {
        "full": Case(module(full)),
        "full, accumulated": Case(module(full), data=halves, trainer=accumulated),
        "full, SGD with momentum": Case(module(full, optimizer=partial(SGD, lr=1e-3, momentum=0.9))),
        "full, AdamW of 8 bits": Case(module(full, optimizer=AdamW8bit)),
        "LoRA": Case(module(LORA)),
        "LoRA, packed": Case(module(LORA), data=packed),
        "LoRA, recomputed": Case(module(recomputed), data={"batch_size": 12}),
        "LoRA beside bfloat16": Case(module(LORA, dtype="bfloat16", compute_dtype="float32")),
        "LoRA beside NF4": Case(module(LORA, quantize="nf4")),
        "pictures, frozen tower": Case(module(LORA, frozen), "pictures"),
        "pictures, tower trains": Case(module(LORA, full), "pictures"),
        "pictures, gated fusion": Case(module(LORA, frozen, gated=True), "pictures"),
        "ready model": Case(ready(LORA, frozen), "pictures"),
        "ready model, tower trains": Case(ready(LORA, full), "pictures"),
        "pictures, DPO": Case(module(LORA, frozen, DPOLitModule), "pictures", halves),
        "full, FSDP2": two(full, "fsdp"),
        "LoRA, FSDP2": two(LORA, "fsdp"),
        "LoRA, FSDP2, recomputed": two(recomputed, "fsdp"),
        "LoRA, FSDP2 offloaded": two(LORA, "fsdp", offload=True),
        "full, FSDP1": two(full, "flat"),
        "LoRA, FSDP1": two(LORA, "flat"),
        "LoRA, FSDP1, kept": two(LORA, "flat", sharding_strategy="SHARD_GRAD_OP"),
        "full, ZeRO-2": two(full, "zero", **bucket),
        "full, ZeRO-2 offloaded": two(full, "zero", accumulated, offload_optimizer=True, **bucket),
        "full, ZeRO-3": two(full, "zero", stage=3, **bucket),
        "LoRA, ZeRO-3 offloaded": two(LORA, "zero", stage=3, offload_optimizer=True, offload_parameters=True, **bucket),
    }


def predict(case: Case, folder: Path) -> float:
    """MiB that `plan` says; what a device keeps in the memory of the machine is in the same memory here."""
    module, devices = case.module(), 1
    strategy: str | Namespace = "auto"
    if case.strategy is not None:
        name, options = case.strategy
        devices, strategy = 2, Namespace(class_path=STRATEGIES[name][1], init_args=Namespace(options))
    trainer = Namespace(devices=devices, num_nodes=1, strategy=strategy, precision="32-true", max_steps=2, **case.trainer)
    run = Run(module, case.make_data(module, folder), trainer, placement_of(trainer), find_device("cpu"))
    plan = plan_run(run)
    return (plan.total + plan.on_host.total() - plan.on_host[UPDATE]) / MIB  # a step is taken when activations are gone


def compare(case: Case, folder: Path) -> tuple[float, float]:
    """MiB that `plan` says, and that training takes; of two processes that which takes more."""
    receiver, sender = (context := multiprocessing.get_context("fork")).Pipe()
    process = context.Process(target=_compare, args=(case, folder, sender))
    process.start()
    sender.close()
    figures = receiver.recv()
    process.join()
    return figures


def _compare(case: Case, folder: Path, sender: Any) -> None:
    if case.strategy is None:
        predicted = predict(case, folder)
        sender.send((predicted, _measure(case, folder, {})))
        return
    taken = multiprocessing.get_context("fork").SimpleQueue()
    name, options = case.strategy
    make = partial(STRATEGIES[name][0], **options)

    def measure(trainer: dict[str, Any]) -> None:
        taken.put(_measure(case, folder, trainer, lambda: make(WAITS)))

    assert in_two_processes(measure, strategy=make) == [0, 0]
    sender.send((predict(case, folder), max(taken.get(), taken.get())))


def _measure(case: Case, folder: Path, trainer: dict[str, Any], again: Callable[[], Any] | None = None) -> float:
    """MiB that training takes.

    Args:
        case: What is trained.
        folder: Where its files are.
        trainer: Options of the trainer.
        again: Makes their strategy once more.
    """
    from lightning.pytorch import Trainer

    def fit(case: Case, max_steps: int) -> None:
        module = case.module()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, "max_steps": max_steps}
        Trainer(**quiet, **(options | trainer), **case.trainer).fit(module, datamodule=case.make_data(module, folder))

    fit(replace(case, data=case.data | {"batch_size": 1}, trainer={}), 1)  # imports, and what libraries keep for good
    trainer.pop("strategy", None)  # with the model that it spread
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew (proc(5))
    before = _status("VmRSS")
    if again is not None:
        trainer["strategy"] = again()
    fit(case, 2 if case.strategy is None else 3)  # in the third one, batches are accumulated beside states
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """A figure of this process, in MiB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name has this in it")
    args = parser.parse_args()
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(parameter, 65_536)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        write_weights(folder, vocabulary=8192, width=384, num_layers=6, vision_width=256, max_shard_size="8MB")
        write_rows(folder)
        chosen = {name: case for name, case in cases(folder).items() if not args.only or args.only in name}
        print(f"{'MiB':<26} {'predicted':>10} {'measured':>10} {'error':>8}")
        for name, case in chosen.items():
            predicted, measured = compare(case, folder)
            figures[name] = predicted / measured - 1
            print(f"{name:<26} {predicted:>10.0f} {measured:>10.0f} {100 * figures[name]:>+7.1f} %", flush=True)
    print(json.dumps({"max_error": round(max(map(abs, figures.values())), 3), "cases": len(figures)}))


if __name__ == "__main__":
    main()
