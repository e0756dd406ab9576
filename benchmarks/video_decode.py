"""Eight frames of a minute of video: jumping to them, against reading the whole clip, by decord and by PyAV, in CPU time.

Run: python benchmarks/video_decode.py
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/video_decode.py` finds the packages

from datamodules.content import Media
from datamodules.media_video import VideoLimits, decode_video, probe_video
from datamodules.sources import MediaRoot
from encoders.sampling import FrameSampling

GOAL = 5.0
HEIGHT, WIDTH, FPS = 360, 640, 30


def render(
    path: Path, seconds: int, keyframe_every: int, seed: int, height: int = HEIGHT, width: int = WIDTH, repeat: int = 1
) -> None:
    """Writes an H.264 clip of a textured picture that drifts under a moving square, with noise on it, so many times over."""
    import av

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 60, width // 8 + 60, 3), dtype=np.uint8)
    background = coarse.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": str(keyframe_every), "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        packets = []
        for number in range(seconds * FPS):
            shift = number // 4 % 400
            picture = background[shift : shift + height, shift : shift + width].copy()
            left = 5 * number % (width - 80)
            picture[140:220, left : left + 80] = number % 256
            picture[::4, ::4] ^= rng.integers(0, 8, picture[::4, ::4].shape, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for turn in range(repeat):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.stream, copy.is_keyframe, copy.time_base = stream, packet.is_keyframe, packet.time_base
                later = round(turn * seconds / packet.time_base)
                copy.pts, copy.dts, copy.duration = packet.pts + later, packet.dts + later, packet.duration
                container.mux(copy)


def whole_by_decord(path: Path, numbers: list[int]) -> Any:
    """Decodes all frames, one after the other, and keeps the wanted ones."""
    import decord

    video = decord.VideoReader(str(path), num_threads=1)
    frames = (video.next() for _ in range(len(video)))
    return np.stack([frame.asnumpy() for number, frame in enumerate(frames) if number in numbers])


def whole_by_pyav(path: Path, numbers: list[int]) -> Any:
    """Decodes all frames, one after the other, and keeps the wanted ones."""
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = enumerate(container.decode(video=0))
        return np.stack([frame.to_ndarray(format="rgb24") for number, frame in frames if number in numbers])


def measure(tasks: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU-seconds of each task, the least of some rounds, in each of which every task has its turn."""
    seconds = dict.fromkeys(tasks, float("inf"))
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def grown_megabytes(task: Callable[[], Any]) -> float:
    """How far the peak memory of a fresh process grows by a task."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        task()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(write_end, str(grown).encode())
        os._exit(0)
    os.close(write_end)
    grown = float(os.read(read_end, 64))
    os.wait()
    return grown


def main() -> None:
    """Prints the table, then the figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--keyframe-every", type=int, default=60, help="frames from one keyframe to the next")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        render(path, args.seconds, args.keyframe_every, args.seed)
        root, medium, sampling = MediaRoot(path.parent), Media("video", path.name), FrameSampling(num_frames=args.frames)
        by_decord, by_pyav = VideoLimits(reader="decord"), VideoLimits(reader="pyav")
        numbers = [int(time * FPS + 1e-6) for time in sampling.times(0.0, probe_video(medium, root, by_decord).seconds)]
        tasks: dict[str, Callable[[], Any]] = {
            "header": lambda: probe_video(medium, root, by_decord),
            "decord": lambda: decode_video(medium, root, by_decord, sampling),
            "pyav": lambda: decode_video(medium, root, by_pyav, sampling),
            "decord_whole": lambda: whole_by_decord(path, numbers),
            "pyav_whole": lambda: whole_by_pyav(path, numbers),
        }
        memory = {name: grown_megabytes(tasks[name]) for name in ("decord", "pyav")}
        assert np.array_equal(tasks["decord"]().frames_FHW3, tasks["decord_whole"]())
        assert np.array_equal(tasks["pyav"]().frames_FHW3, tasks["pyav_whole"]())
        seconds = measure(tasks, args.rounds)
    kept = args.frames * HEIGHT * WIDTH * 3 / 2**20
    print(
        f"{args.frames} frames of {args.seconds} s of H.264, {WIDTH}x{HEIGHT}, a keyframe every {args.keyframe_every} frames; "
        f"the frames kept are {kept:.1f} MB"
    )
    print(f"{'':10}{'jumping':>12}{'the whole':>12}{'speed-up':>10}{'memory':>10}")
    speedup = {name: seconds[f"{name}_whole"] / seconds[name] for name in ("decord", "pyav")}
    for name in speedup:
        print(
            f"{name:10}{1000 * seconds[name]:9.0f} ms{1000 * seconds[f'{name}_whole']:9.0f} ms{speedup[name]:9.1f}x"
            f"{memory[name]:7.0f} MB"
        )
    print(f"header    {1000 * seconds['header']:9.2f} ms")
    key = f"speedup_{args.seconds}s_{args.frames}"
    figures = {f"{name}_ms": round(1000 * value, 2) for name, value in seconds.items()}
    figures |= {f"{name}_grown_mb": round(value, 1) for name, value in memory.items()}
    figures |= {key: round(speedup["decord"], 2), f"{key}_pyav": round(speedup["pyav"], 2), "goal": GOAL}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
