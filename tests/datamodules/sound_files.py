"""Small files of sound in many formats, made on the spot."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def tone(num_samples: int, rate: int, channels: int = 1) -> NDArray[np.float32]:
    """samples_SC: a sweep in each channel, which survives any coding and says where it is."""
    time_S = np.arange(num_samples) / rate
    sweeps = [0.3 * np.sin(2 * np.pi * (150 + 60 * channel + 100 * time_S) * time_S) for channel in range(channels)]
    return np.stack(sweeps, axis=1).astype(np.float32)


def write_sound(path: Path, samples_SC: NDArray[np.float32], rate: int, **options: Any) -> Path:
    """Writes a file by libsndfile; the format is that of the suffix."""
    import soundfile

    with soundfile.SoundFile(path, "w", rate, samples_SC.shape[1], **options) as file:
        for start in range(0, len(samples_SC), rate):  # its Vorbis encoder crashes on long blocks
            file.write(samples_SC[start : start + rate])
    return path


def write_container(
    path: Path,
    samples_SC: NDArray[np.float32],
    rate: int,
    format: str,
    codec: str,
    num_frames: int = 0,
    skip_seconds: float = 0.0,
    **options: str,
) -> Path:
    """Writes a file by FFmpeg.

    Args:
        path: The file.
        samples_SC: Its sound.
        rate: Samples a second.
        format: FFmpeg's name of the container.
        codec: FFmpeg's name of the codec of the sound.
        num_frames: Frames of a video beside the sound, 25 a second; 0: no video.
        skip_seconds: Leave the time stamps of the second half later by this.
        options: Of the container.
    """
    import av

    layout = {1: "mono", 2: "stereo"}[samples_SC.shape[1]]
    with av.open(path, "w", format=format, options=options) as container:
        if num_frames:
            video: Any = container.add_stream("mpeg4", rate=25)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound: Any = container.add_stream(codec, rate=rate, layout=layout)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number % 200, dtype=np.uint8))
            container.mux(video.encode(frame))
        if num_frames:
            container.mux(video.encode())
        to_codec = av.AudioResampler(format=sound.codec_context.format, layout=layout, rate=rate)
        for start in range(0, len(samples_SC), 960):
            block = np.ascontiguousarray(samples_SC[start : start + 960].T)
            audio = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
            later = round(skip_seconds * rate) if start >= len(samples_SC) // 2 else 0
            audio.sample_rate, audio.pts, audio.time_base = rate, start + later, Fraction(1, rate)
            for converted in to_codec.resample(audio):
                container.mux(sound.encode(converted))
        container.mux(sound.encode())
    return path
