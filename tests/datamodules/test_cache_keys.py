"""Keys of cached tensors: whatever a tensor depends on changes them."""

import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.cache import CacheOptions, TensorCache
from datamodules.cache_keys import BIG_BYTES, ContentHash, code_of, describe, media_settings
from datamodules.content import Media
from datamodules.media import MediaLimits
from datamodules.media_image import ImageLimits
from datamodules.sources import MediaRoot
from encoders.sampling import FrameSampling
from encoders.transforms import ImageTransform
from encoders.video import ClipTransform

TRANSFORM = ImageTransform((8, 8), (0.5,) * 3, (0.5,) * 3)


def old(path: Path) -> None:
    """Sets the time of a file back, always to the same one."""
    os.utime(path, ns=(10**18, 10**18))


class TestContent:
    @pytest.fixture
    def cache(self, tmp_path: Path) -> TensorCache:
        return CacheOptions(str(tmp_path / "cache")).open()

    @pytest.fixture
    def root(self, tmp_path: Path) -> MediaRoot:
        (tmp_path / "media").mkdir()
        return MediaRoot(tmp_path / "media")

    def hash(self, medium: Media, root: MediaRoot, cache: TensorCache) -> str:
        return ContentHash(cache)(medium, ContentHash.states(medium, root))

    def test_it_is_that_of_the_bytes_wherever_they_are(self, root: MediaRoot, cache: TensorCache) -> None:
        for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
            (root.path / name).write_bytes(content)
        a, b, c = (self.hash(Media("image", name), root, cache) for name in "abc")
        assert a == b != c

    def test_the_part_and_the_kind_count(self, root: MediaRoot, cache: TensorCache) -> None:
        (root.path / "a").write_bytes(b"one")
        (root.path / "b").write_bytes(b"two")
        media = [
            Media("video", "a"),
            Media("audio", "a"),
            Media("video", "a", start=1.0),
            Media("video", "a", end=1.0),
            Media("video", ("a",), fps=1.0),
            Media("video", ("a", "b")),
            Media("video", ("b", "a")),
            Media("image", "data:image/png;base64,AAAA"),
            Media("image", "data:image/png;base64,AAAB"),
        ]
        assert len({self.hash(medium, root, cache) for medium in media}) == len(media)

    @pytest.mark.parametrize("size", [10, BIG_BYTES])
    def test_a_file_that_changes_is_read_again(
        self, root: MediaRoot, cache: TensorCache, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where its size and time stay, and by the one that has read it before."""
        monkeypatch.setattr("datamodules.cache_keys.SETTLED_SECONDS", 0)
        path, medium = root.path / "a", Media("image", "a")
        content = ContentHash(cache)
        seen = set()
        for byte in (b"1", b"2", b"3"):
            path.write_bytes(byte * size)
            old(path)
            seen.add(content(medium, ContentHash.states(medium, root)))
            time.sleep(0.02)  # longer than a tick of the file system's clock
        assert len(seen) == 3

    def test_a_file_that_has_just_changed_is_read_each_time(self, root: MediaRoot, cache: TensorCache) -> None:
        """Two changes within a tick leave the same times."""
        (root.path / "a").write_bytes(b"1")
        content, medium = ContentHash(cache), Media("image", "a")
        states = ContentHash.states(medium, root)
        before = content(medium, states)
        (root.path / "a").write_bytes(b"2")
        assert content(medium, states) != before

    def test_a_file_that_stays_is_read_once(self, root: MediaRoot, cache: TensorCache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("datamodules.cache_keys.SETTLED_SECONDS", 0)
        for name, size in (("small", 10), ("big", BIG_BYTES)):
            (root.path / name).write_bytes(b"1" * size)
        content = ContentHash(cache)
        media = [Media("image", name) for name in ("small", "big")]
        first = [content(medium, ContentHash.states(medium, root)) for medium in media]
        opened: list[str] = []
        open_file = Path.open

        def spy(self: Path, *args: Any, **kwargs: Any) -> Any:
            if self.parent == root.path:
                opened.append(self.name)
            return open_file(self, *args, **kwargs)

        monkeypatch.setattr(Path, "open", spy)
        assert [content(medium, ContentHash.states(medium, root)) for medium in media] == first and not opened
        assert [self.hash(medium, root, cache) for medium in media] == first and opened == ["small"], "another process"


class TestSettings:
    def test_each_option_counts(self) -> None:
        clip = ClipTransform(TRANSFORM, FrameSampling())
        transforms: list[Any] = [
            TRANSFORM,
            dataclasses.replace(TRANSFORM, size=(8, 9)),
            dataclasses.replace(TRANSFORM, mean=(0.5, 0.5, 0.25)),
            dataclasses.replace(TRANSFORM, interpolation="bilinear"),
            clip,
            dataclasses.replace(clip, frame=dataclasses.replace(TRANSFORM, rounding="even")),
            dataclasses.replace(clip, sampling=FrameSampling(num_frames=4)),
        ]
        settings = [media_settings("video", transform, MediaLimits()) for transform in transforms]
        settings.append(media_settings("image", TRANSFORM, MediaLimits()))
        settings.append(media_settings("image", TRANSFORM, MediaLimits(image=ImageLimits(max_pixels=100))))
        assert len(set(settings)) == len(settings)
        again = ImageTransform((8, 8), (0.5,) * 3, (0.5,) * 3)
        assert media_settings("image", again, MediaLimits()) == settings[-2]

    def test_arrays_and_functions_are_described(self) -> None:
        assert describe(np.arange(3)) == describe(np.arange(3)) != describe(np.arange(1, 4))
        assert describe(np.arange(3)) != describe(np.arange(3).astype(np.float32))
        assert describe({"a": (1, True, None)}) == [["a", [1, True, None]]]
        assert describe(old) != describe(media_settings)

    def test_what_cannot_be_read_is_refused(self) -> None:
        class Opaque:
            pass

        @dataclass(frozen=True)
        class Holder:
            held: Any

        secret = 3
        for value in (Opaque(), Holder(Opaque()), Holder(lambda: secret)):
            with pytest.raises(
                ValueError, match=r"nothing can be cached of what .*(Opaque|lambda).* makes.* make it a dataclass"
            ):
                describe(value)


class TestCode:
    @pytest.fixture
    def lab(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A package: `top` imports `below` in a function, and `beside` by a relative import."""
        folder = tmp_path / "some_lab"
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "top.py").write_text("import math\nfrom .beside import x\n\ndef f():\n    from some_lab import below\n")
        for name in ("beside", "below", "unrelated"):
            (folder / f"{name}.py").write_text("x = 1\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield folder
        for name in [name for name in sys.modules if name.startswith("some_lab")]:
            del sys.modules[name]

    def hash(self) -> str:
        importlib.invalidate_caches()
        code_of.cache_clear()
        return code_of("some_lab.top")

    @pytest.mark.parametrize(("name", "counts"), [("top", True), ("beside", True), ("below", True), ("unrelated", False)])
    def test_what_it_imports_counts(self, lab: Path, name: str, counts: bool) -> None:
        before = self.hash()
        assert self.hash() == before
        with (lab / f"{name}.py").open("a") as file:
            file.write("y = 2\n")
        assert (self.hash() != before) == counts

    def test_decoding_and_transforms_count_but_no_models(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[str] = []
        read_text = Path.read_text

        def spy(self: Path, *args: Any, **kwargs: Any) -> str:
            read.append("/".join(self.parts[-2:]))
            return read_text(self, *args, **kwargs)

        monkeypatch.setattr(Path, "read_text", spy)
        code_of.cache_clear()
        code_of("datamodules.media", "encoders.transforms")
        assert {"datamodules/media_image.py", "datamodules/video_decord.py", "datamodules/audio_readers.py"} <= set(read)
        assert {"encoders/transforms.py", "datamodules/sources.py"} <= set(read)
        assert not [name for name in read if name.startswith(("models/", "lightning_modules/", "torch/"))]

    def test_code_in_no_file_is_refused(self) -> None:
        with pytest.raises(ValueError, match="running script or notebook.*into a module of its own"):
            code_of("__main__")
