"""Readers of media that go wrong in every way; each takes what it needs from the name of its file."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.media_image import ImageLimits, decode_image
from datamodules.sources import MediaError, MediaRoot

LOST: list[bytearray] = []


def read(source: str, media_root: MediaRoot, limits: ImageLimits) -> Image.Image:
    """A picture, unless its name says what happens instead: `hang`, `crash`, ..."""
    match Path(source).stem:
        case "hang":
            time.sleep(1000)
        case "busy":
            while True:
                pass
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
        case "eat":
            LOST.append(bytearray(10 * limits.max_memory_bytes))
        case "eat-slowly":
            while True:
                LOST.append(bytearray(1 << 20))
        case "bug":
            raise IndexError("the list is too short")
        case "bad":
            raise MediaError("bad.png is bad")
        case "chatter":
            os.write(1, b"this is no answer")
    return decode_image(source, media_root, limits)


def pid(*_: object) -> tuple[int]:
    """The process in which it is called."""
    return (os.getpid(),)


def leak(num_bytes: int) -> tuple[int]:
    """As `pid`, and keeps memory."""
    LOST.append(bytearray(num_bytes))
    return pid()


def crash_later(num_seconds: float) -> tuple[int]:
    """As `pid`, but what it leaves behind ends the process after a while."""
    threading.Timer(num_seconds, os.kill, (os.getpid(), signal.SIGSEGV)).start()
    return pid()


def work(num_seconds: float) -> tuple[int]:
    """As `pid`, after so much time."""
    time.sleep(num_seconds)
    return pid()


def picture(folder: Path, name: str, seed: int) -> np.ndarray:
    """Writes a random picture, and returns its pixels."""
    pixels_HW3 = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels_HW3).save(folder / name, "PNG")
    return pixels_HW3
