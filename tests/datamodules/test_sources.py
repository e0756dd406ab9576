import base64
import os
import pickle
import random
from pathlib import Path

import pytest

from datamodules.sources import MediaError, MediaRoot, content_key, resolve


@pytest.fixture
def root(tmp_path: Path) -> MediaRoot:
    (tmp_path / "secret.jpg").write_bytes(b"outside")
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "cat.jpg").write_bytes(b"cat")
    (folder / "sub" / "dog.png").write_bytes(b"dog")
    return MediaRoot(folder)


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("cat.jpg", b"cat"),
        ("sub/dog.png", b"dog"),
        ("./sub/../cat.jpg", b"cat"),
        ("data:image/png;base64,Y2F0", b"cat"),
        ("DATA:Image/PNG;charset=utf-8;BASE64,Y2F0", b"cat"),
        ("data:image/png;base64,Y2\nF0\n", b"cat"),
        ("data:image/png;base64,Y2E%3D", b"ca"),
        ("data:image/x,c%61t%00%FF", b"cat\x00\xff"),
    ],
)
def test_a_source_is_a_path_below_the_root_or_a_data_uri(root: MediaRoot, source: str, content: bytes) -> None:
    found = resolve(source, root, "image", max_bytes=5)
    assert (found if isinstance(found, bytes) else found.read_bytes()) == content


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://host/a.jpg", "is a URL, and media must be local"),
        ("https://host/a.jpg", "is a URL, and media must be local"),
        ("file:///etc/passwd", "is a URL, and media must be local"),
        ("file:/etc/passwd", "is a URL, and media must be local"),
        ("s3://bucket/a.jpg", "is a URL, and media must be local"),
        ("/etc/passwd", "is an absolute path: give the path below media_root"),
        ("//host/a.jpg", "is an absolute path"),
        ("../secret.jpg", "leads out of media_root"),
        ("sub/../../secret.jpg", "leads out of media_root"),
        ("../root2/a.jpg", "leads out of media_root"),
        ("", "the empty path is a folder"),
        ("sub", "sub is a folder: expected a file"),
        ("cat.jpg/a.jpg", "does not exist: looked for"),
        ("a\0b.jpg", "cannot be used as a path .* null"),
        ("\ud800.jpg", "cannot be used as a path"),
        ("a" * 300 + ".jpg", "cannot be used as a path .*File name too long"),
        ("a" * 254, r"does not exist: looked for"),
        ("a/" * 5000, r"\(10,000 characters\)"),
        ("data:image/png;base64", "is not a data URI of this modality: expected data:image/"),
        ("data:audio/wav;base64,Y2F0", "is not a data URI of this modality"),
        ("data:,cat", "is not a data URI of this modality"),
        ("data:image/png;base64,Y2F", "malformed data URI: .*padding"),
        ("data:image/png;base64,Y2%F0", "malformed data URI"),
        ("data:image/png;base64,Y\u00e42F", "malformed data URI"),
        ("data:image/png,\ud800", "malformed data URI"),
        ("data:image/png;base64,", r"is empty \(0 bytes\)"),
        ("data:image/png;base64,Y2F0Y2F0", "is 6 bytes, above max_bytes = 5"),
    ],
)
def test_a_bad_source_is_refused_with_its_reason(root: MediaRoot, source: str, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        resolve(source, root, "image", max_bytes=5)


def test_the_mime_type_follows_the_modality(root: MediaRoot) -> None:
    assert resolve("data:audio/wav;base64,Y2F0", root, "audio", max_bytes=5) == b"cat"


def test_symlinks_may_not_leave_the_root(root: MediaRoot) -> None:
    (root.path / "inner.jpg").symlink_to("cat.jpg")
    (root.path / "outer.jpg").symlink_to("../secret.jpg")
    (root.path / "parent").symlink_to("..")
    (root.path / "loop.jpg").symlink_to("loop.jpg")
    assert resolve("inner.jpg", root, "image", max_bytes=5) == root.path / "cat.jpg"
    for source in ("outer.jpg", "parent/secret.jpg"):
        with pytest.raises(MediaError, match="leads out of media_root"):
            resolve(source, root, "image", max_bytes=50)
    with pytest.raises(MediaError, match="cannot be used as a path"):
        resolve("loop.jpg", root, "image", max_bytes=5)


def test_a_root_reached_by_a_symlink_is_a_root(root: MediaRoot) -> None:
    link = root.path.parent / "link"
    link.symlink_to(root.path)
    assert resolve("cat.jpg", MediaRoot(link), "image", max_bytes=5) == root.path / "cat.jpg"


def test_a_path_is_what_the_system_makes_of_it(root: MediaRoot) -> None:
    (root.path / "sub" / "up").symlink_to("..")
    (root.path / "out").symlink_to("../..")
    (root.path / "sub" / "cat.jpg").symlink_to("../cat.jpg")
    draw, found = random.Random(5), set()
    for _ in range(3000):
        names = draw.choices(
            ["", ".", "..", "sub", "up", "out", "root", "cat.jpg", "dog.png", "a\\b", "secret.jpg"], k=draw.randint(1, 5)
        )
        source, path = "/".join(names), Path(os.path.realpath("/".join([str(root.path), *names])))
        if source.startswith("/") or not path.is_relative_to(root.path) or not path.is_file():
            with pytest.raises(MediaError):
                resolve(source, root, "image", max_bytes=5)
        else:
            assert resolve(source, root, "image", max_bytes=5) == path
            found.add(source)
    assert len(found) > 20
    found_from_top = resolve(str(root.path / "cat.jpg")[1:], MediaRoot(Path("/")), "image", max_bytes=5)
    assert str(found_from_top) == str(root.path / "cat.jpg")


def test_a_fifo_is_refused_without_waiting_for_it(root: MediaRoot) -> None:
    os.mkfifo(root.path / "fifo.jpg")
    with pytest.raises(MediaError, match=r"fifo.jpg is not a regular file"):
        resolve("fifo.jpg", root, "image", max_bytes=5)


def test_an_empty_and_a_big_file_are_refused(root: MediaRoot) -> None:
    (root.path / "empty.jpg").touch()
    (root.path / "big.jpg").write_bytes(b"123456")
    with pytest.raises(MediaError, match=r"empty.jpg is empty \(0 bytes\)"):
        resolve("empty.jpg", root, "image", max_bytes=5)
    with pytest.raises(MediaError, match=r"big.jpg is 6 bytes, above max_bytes = 5"):
        resolve("big.jpg", root, "image", max_bytes=5)
    assert resolve("big.jpg", root, "image", max_bytes=6) == root.path / "big.jpg"


def test_a_missing_file_is_named_in_full_with_its_sibling(root: MediaRoot) -> None:
    with pytest.raises(MediaError) as caught:
        resolve("sub/dog.jpg", root, "image", max_bytes=5)
    assert str(caught.value) == f"sub/dog.jpg does not exist: looked for {root.path}/sub/dog.jpg; there is a dog.png"
    with pytest.raises(MediaError) as caught:
        resolve("sub/cow.jpg", root, "image", max_bytes=5)
    assert str(caught.value) == f"sub/cow.jpg does not exist: looked for {root.path}/sub/cow.jpg"


def test_a_missing_root_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"media_root .*/nowhere does not exist"):
        MediaRoot(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"media_root .*/file is not a folder"):
        MediaRoot(tmp_path / "file")


def test_content_key_tells_sources_apart(root: MediaRoot) -> None:
    uri = "data:image/png;base64," + base64.b64encode(b"cat" * 1000).decode()
    keys = [content_key(source, root) for source in ("cat.jpg", "sub/dog.png", uri, uri + "AAAA")]
    assert len(set(keys)) == 4
    assert content_key("sub/../cat.jpg", root) == keys[0]
    assert content_key(uri, root) == keys[2]
    assert len(keys[2]) < 50
    os.utime(root.path / "cat.jpg", ns=(1, 1))
    assert content_key("cat.jpg", root) != keys[0]
    with pytest.raises(MediaError, match="does not exist"):
        content_key("cow.jpg", root)


def test_root_and_error_reach_a_worker(root: MediaRoot) -> None:
    assert pickle.loads(pickle.dumps(root)) == root
    assert str(pickle.loads(pickle.dumps(MediaError("cat.jpg is empty")))) == "cat.jpg is empty"
