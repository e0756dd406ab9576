"""Media that are refused for their size alone: by which limit, and how big they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from datamodules.content import Media
from datamodules.dataset import MultiModalDataset
from datamodules.media import MediaLimits
from datamodules.media_audio import probe_audio
from datamodules.media_image import probe_image
from datamodules.media_video import probe_video
from datamodules.sources import MediaError, MediaRoot, find_file

_ENDLESS = 2**62


@dataclass(frozen=True, slots=True)
class Excess:
    """A medium over a limit.

    Args:
        limit: The limit, such as `image.max_pixels`.
        value: How big the medium is, in the unit of the limit.
    """

    limit: str
    value: float


def find_excess(dataset: MultiModalDataset, media: Sequence[Media]) -> Iterator[Excess]:
    """The media of a row that are over a limit, and whose headers can be read otherwise."""
    for medium in media:
        try:
            sizes = _sizes(medium, dataset.media_root, without_limits(dataset.limits))
        except MediaError:
            continue  # its size is not what is wrong with it
        yield from (Excess(name, size) for name, size in sizes.items() if size > limit_of(dataset.limits, name))


def without_limits(limits: MediaLimits) -> MediaLimits:
    """The same limits, but for those on size."""
    return replace(
        limits,
        image=replace(limits.image, max_pixels=_ENDLESS, max_bytes=_ENDLESS),
        video=replace(limits.video, max_pixels=_ENDLESS, max_bytes=_ENDLESS, max_seconds=float(_ENDLESS)),
        audio=replace(limits.audio, max_bytes=_ENDLESS, max_seconds=float(_ENDLESS)),
    )


def _sizes(medium: Media, media_root: MediaRoot, limits: MediaLimits) -> dict[str, float]:
    """By the name of its limit, how big a medium is."""
    call = limits.call(medium)
    files = [find_file(file, media_root) for file in medium.files]
    sizes: dict[str, float] = {f"{medium.modality}.max_bytes": max(0 if file is None else file.num_bytes for file in files)}
    match medium.modality:
        case "image":
            height, width = call(probe_image, medium.files[0], media_root, limits.image)
            return {**sizes, "image.max_pixels": height * width}
        case "video":
            header = call(probe_video, medium, media_root, limits.video)
            return {**sizes, "video.max_pixels": header.height * header.width, "video.max_seconds": header.seconds}
        case "audio":
            sound = call(probe_audio, medium.files[0], media_root, limits.audio, medium.start, medium.end)
            return {**sizes, "audio.max_seconds": sound.seconds}


def limit_of(limits: MediaLimits, name: str) -> float:
    """The limit of a name, such as `image.max_pixels`."""
    by_name: dict[str, float] = {
        "image.max_bytes": limits.image.max_bytes,
        "image.max_pixels": limits.image.max_pixels,
        "video.max_bytes": limits.video.max_bytes,
        "video.max_pixels": limits.video.max_pixels,
        "video.max_seconds": limits.video.max_seconds,
        "audio.max_bytes": limits.audio.max_bytes,
        "audio.max_seconds": limits.audio.max_seconds,
    }
    return by_name[name]
