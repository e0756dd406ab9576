"""What packing leaves empty, how evenly it loads processes, and what planning costs.

    python benchmarks/packing.py

Lengths as in mixtures of images and text: `llava`, 576 image tokens and a text of log-normal length; `mixed`, 0 to 9 pictures of
256 tokens and such a text; `speech`, 1 to 30 seconds of sound at 12.5 tokens and a short text. An epoch of 200,000 rows goes into
rows of 4,096 tokens, as training does, in windows of 16,384. `fill` is the share of the packs' places that hold a token (of
`mixed`), packs included that a run keeps ready for epochs with longer rows; `fill_bound` the share that nobody gets beyond (bound
L2 of Martello & Toth), `padded` that of batches of 8 random rows, `grouped` that of batches of like length.

`imbalance_64` is by how much 64 processes wait for the slowest (max / mean of the cost of their packs), where an optimizer step
has 4 packs of each process, drawn at random, and computes 64 of like cost at one time; `imbalance_64_random_*` where it has one
of each process; `imbalance_64_like_cost_*` the same with `like_cost`. The cost is the one that the planner assumes;
`imbalance_64_other_costs` and `imbalance_64_like_cost_other_costs` are the largest by two other costs: attention as in a
language model of width 4096 and encoders of 5 % of its size; and attention as in one of width 900 and encoders of 3 times its
size.
`plan_seconds` is the CPU time of packing 1,000,000 rows.

`attention_ratio_*` is how much more CPU time attention takes with a mask of the whole row than sample by sample, forward and
backward, for the pack of median cost and the heads of SmolLM2-135M in float32; `attention_memory_ratio_*` is the same of the peak
memory above that before. Each is measured in a process of its own.

`lengths_ratio_*` is how much longer decoding a medium takes than reading from its header what it becomes, both in this process,
in CPU time: a JPEG of 12 megapixels and 4 MB with the Exif of a camera, 8 frames of a minute of H.264 at 1920 x 1080, and
10 minutes of WAV at 44.1 kHz as 16 kHz; `lengths_ratio_small_*` a JPEG of 1920 x 1080, 8 frames of 10 seconds at 640 x 360, and
30 seconds of WAV.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

os.environ["OMP_NUM_THREADS"] = "1"  # before torch makes its threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import soundfile
import torch
from PIL import Image

from benchmarks.video_decode import measure, render
from datamodules.batching import Batching, pack_costs
from datamodules.content import Media
from datamodules.media import MediaLimits, decode, probe
from datamodules.modality import Modality
from datamodules.packing import Packs, RowSizes, fewest_packs, imbalance, pack
from datamodules.parts import media_shape
from datamodules.portion import Portion
from datamodules.sampler import GlobalBatches, RowSampler
from datamodules.sources import MediaRoot
from encoders.sampling import FrameSampling
from models.attention_blocks import attend_in_blocks, blocks_of
from models.attention_mask import visible

MAX_TOKENS = 4096


def lengths(kind: str, num_rows: int, seed: int = 0) -> RowSizes:
    """Made-up sizes of rows."""
    generator = np.random.default_rng(seed)
    text = np.exp(generator.normal(4.6, 0.9, num_rows)).astype(int) + 8
    if kind == "llava":
        media = np.full(num_rows, 576)
    elif kind == "mixed":
        media = 256 * generator.integers(0, 10, num_rows)
    else:
        media, text = (12.5 * generator.uniform(1, 30, num_rows)).astype(int), np.minimum(text, 120)
    return RowSizes(np.minimum(media + text, MAX_TOKENS), media)


def padded_fill(tokens: np.ndarray, rows_a_batch: int = 8) -> float:
    """The share of tokens in batches of random rows."""
    batches = tokens[: len(tokens) // rows_a_batch * rows_a_batch].reshape(-1, rows_a_batch)
    return float(batches.sum() / (batches.max(1).sum() * rows_a_batch))


def grouped_fill(sizes: RowSizes) -> float:
    """The share of tokens in batches of like length."""
    groups = Batching(kind="padded", max_tokens=8 * MAX_TOKENS).packs(sizes).lists()
    return float(sizes.tokens_R.sum() / sum(int(sizes.tokens_R[rows].max()) * len(rows) for rows in groups))


def planned(sizes: RowSizes, packs_a_step: int, like_cost: bool) -> Packs:
    """The packs of an epoch in their order, for 64 processes with so many packs a step each."""
    batching = Batching(kind="packed", max_tokens=MAX_TOKENS, like_cost=like_cost)
    rows = RowSampler([Portion(len(sizes.tokens_R))], shuffle=False, seed=0)
    batches = GlobalBatches(rows, 1, 0, 64, batching, lambda: sizes, packs_a_step)
    return batching.units(batching.packs(sizes), sizes, batches.num_units, batches.step_size, 0)


def other_costs(sizes: RowSizes) -> list[np.ndarray]:
    """What rows cost in other models than the planner assumes."""
    squares_R = sizes.tokens_R.astype(np.float64) ** 2
    return [
        sizes.tokens_R + squares_R / 24_576 + 0.05 * sizes.encoded_R,  # 6 * width: attention beside matrix products
        sizes.tokens_R + squares_R / 5400 + 3 * sizes.encoded_R,
    ]


def attention_costs(lengths: np.ndarray) -> dict[str, tuple[float, float]]:
    """CPU-seconds and MiB of the attention of a pack, by `row` and `samples`."""
    segments_BT = torch.repeat_interleave(torch.arange(len(lengths)) + 1, torch.from_numpy(lengths))[None]
    context = multiprocessing.get_context("fork")
    costs: dict[str, tuple[float, float]] = {}
    for kind in ("row", "samples"):
        receiver, sender = context.Pipe()
        process = context.Process(target=_attend, args=(segments_BT, kind == "row", sender))
        process.start()
        costs[kind] = receiver.recv()
        process.join()
    return costs


def _attend(segments_BT: torch.Tensor, by_mask: bool, sender: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    length = segments_BT.shape[1]
    inputs = [torch.randn(1, length, heads, 64, generator=generator).transpose(1, 2).requires_grad_() for heads in (9, 3, 3)]
    layer: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    gradient = torch.randn(1, length, 9, 64, generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(4):
        started = time.process_time()
        mask = visible(segments_BT, None, torch.zeros_like(segments_BT))[:, None] if by_mask else blocks_of(segments_BT, None)
        torch.autograd.grad(attend_in_blocks(layer, *inputs, mask)[0], inputs, gradient)
        seconds.append(time.process_time() - started)
    sender.send((min(seconds[1:]), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def length_costs(folder: Path) -> dict[str, tuple[float, float]]:
    """CPU-seconds of decoding and of reading the header, by medium."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(256, size=(94, 125, 3), dtype=np.uint8))
    noise = generator.normal(0, 0.1, 600 * 44_100).astype(np.float32)
    exif = Image.Exif()
    exif.update(
        {0x010F: "Maker", 0x0110: "Model", 0x0112: 1, 0x011A: 72.0, 0x011B: 72.0, 0x0128: 2, 0x0132: "2024:05:01 12:00:00"}
    )
    for name, size, clip, seconds in (
        ("small_", (1920, 1080), {"seconds": 10}, 30),
        ("", (4000, 3000), {"seconds": 6, "height": 1080, "width": 1920, "repeat": 10}, 600),
    ):
        grain = Image.merge("RGB", [Image.effect_noise(size, 160)] * 3)
        image = Image.blend(coarse.resize(size), grain, 0.12)
        image.save(folder / f"{name}image.jpg", quality=85, exif=exif)  # as large as photographs
        render(folder / f"{name}video.mp4", keyframe_every=60, seed=0, **clip)
        soundfile.write(folder / f"{name}audio.wav", noise[: seconds * 44_100], 44_100)
    transform = SimpleNamespace(sampling=FrameSampling(num_frames=8), sample_rate=16_000, min_samples=1)
    root, limits = MediaRoot(folder), MediaLimits(isolate=False)
    costs: dict[str, tuple[float, float]] = {}
    for path in sorted(folder.iterdir()):
        medium = Media(cast(Modality, path.stem.removeprefix("small_")), path.name)
        assert media_shape(decode(medium, root, limits, transform)) == probe(medium, root, limits, transform)
        seconds_of = measure(
            {
                "decode": lambda m=medium: decode(m, root, limits, transform),
                "probe": lambda m=medium: [probe(m, root, limits, transform) for _ in range(20)],
            },
            5,
        )
        costs[path.stem] = seconds_of["decode"], seconds_of["probe"] / 20
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of an epoch")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    plans: dict[str, tuple[RowSizes, Packs]] = {}
    titles = f"{'rows':<8} {'padded':>8} {'grouped':>8} {'packed':>8} {'bound':>8}"
    print(f"{titles} {'wait: random':>14} {'4 packs':>8} {'like cost':>10}")
    others: dict[bool, list[float]] = {False: [], True: []}
    for kind in ("llava", "mixed", "speech"):
        sizes = lengths(kind, args.rows)
        units = {setting: planned(sizes, *setting) for setting in ((1, False), (4, False), (1, True))}
        plans[kind] = sizes, units[1, False]
        fill = float(sizes.tokens_R.sum() / (len(units[1, False]) * MAX_TOKENS))
        bound = float(sizes.tokens_R.sum() / (fewest_packs(sizes.tokens_R, MAX_TOKENS) * MAX_TOKENS))
        random, several, like_cost = (imbalance(pack_costs(packs, sizes), 64) for packs in units.values())
        for packs_a_step, is_like_cost in ((4, False), (1, True)):
            packs = units[packs_a_step, is_like_cost]
            others[is_like_cost] += [imbalance(packs.sums(cost_R), 64) for cost_R in other_costs(sizes)]
        padded, grouped = padded_fill(sizes.tokens_R), grouped_fill(sizes)
        shares = f"{kind:<8} {padded:>8.3f} {grouped:>8.3f} {fill:>8.4f} {bound:>8.4f}"
        print(f"{shares} {random:>14.3f} {several:>8.4f} {like_cost:>10.4f}", flush=True)
        figures |= {f"fill_{kind}": round(fill, 4), f"fill_bound_{kind}": round(bound, 4), f"padded_{kind}": round(padded, 3)}
        figures |= {f"imbalance_64_{kind}": round(several, 4), f"imbalance_64_random_{kind}": round(random, 4)}
        figures[f"imbalance_64_like_cost_{kind}"] = round(like_cost, 4)
    print(f"\n{'attention':<9} {'samples':>8} {'CPU-s, by row':>14} {'by sample':>10} {'MiB, by row':>12} {'by sample':>10}")
    for kind, (sizes, packs) in plans.items():
        costs = pack_costs(packs, sizes)
        median = packs.lists()[int(np.argsort(costs)[len(costs) // 2])]
        costs_of = attention_costs(sizes.tokens_R[median])
        (row_s, row_mib), (own_s, own_mib) = costs_of["row"], costs_of["samples"]
        print(f"{kind:<9} {len(median):>8} {row_s:>14.3f} {own_s:>10.3f} {row_mib:>12.0f} {own_mib:>10.0f}", flush=True)
        figures |= {
            f"attention_ratio_{kind}": round(row_s / own_s, 2),
            f"attention_memory_ratio_{kind}": round(row_mib / own_mib, 2),
        }
    with tempfile.TemporaryDirectory() as folder:
        length_costs_of = length_costs(Path(folder))
    print(f"\n{'length of':<12} {'ms, decoding':>14} {'by header':>10} {'ratio':>8}")
    for name, (decoding, header) in length_costs_of.items():
        print(f"{name:<12} {1000 * decoding:>14.1f} {1000 * header:>10.2f} {decoding / header:>8.0f}")
        figures[f"lengths_ratio_{name}"] = round(decoding / header)
    sizes = lengths("mixed", 1_000_000)
    started = time.process_time()
    pack(sizes, MAX_TOKENS)
    figures["plan_seconds"] = round(time.process_time() - started, 2)
    figures |= {"fill": figures["fill_mixed"], "fill_bound": figures["fill_bound_mixed"]}
    figures["imbalance_64"] = max(figures[f"imbalance_64_{kind}"] for kind in plans)
    figures["imbalance_64_other_costs"] = round(max(others[False]), 4)
    figures["imbalance_64_like_cost_other_costs"] = round(max(others[True]), 4)
    print(f"1,000,000 rows are packed in {figures['plan_seconds']} CPU-seconds")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
