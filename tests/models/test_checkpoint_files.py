"""Files that are no checkpoint, or no longer the one that was written."""

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.checkpoint import fingerprints, in_memory, read_checkpoint, saved_names


@pytest.fixture
def checkpoint(make_model, tmp_path) -> Path:
    model = make_model()
    names = saved_names(model)
    state = {name: weight for name, weight in model.state_dict().items() if name in names}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "model": model.spec(), "fingerprints": fingerprints(model, names)}, path)
    return path


def test_a_cut_file_is_refused(checkpoint):
    whole = checkpoint.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9, 0.99999):
        checkpoint.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"last.ckpt cannot be read as a checkpoint \(.+\): it is cut off"):
            read_checkpoint(checkpoint)


def test_no_flipped_bit_is_read_as_a_weight(checkpoint):
    whole, generator = checkpoint.read_bytes(), torch.Generator().manual_seed(4)
    state, refused = in_memory(read_checkpoint(checkpoint)["state_dict"]), 0
    for place in torch.randint(len(whole), (60,), generator=generator).tolist():
        spoilt = bytearray(whole)
        spoilt[place] ^= 16
        checkpoint.write_bytes(spoilt)
        try:
            got = read_checkpoint(checkpoint)["state_dict"]
        except ValueError as error:
            assert re.search("is damaged: .* is not what was written|cannot be read as a checkpoint", str(error))
            refused += 1
        else:  # between the weights
            assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)
    assert refused > 10


def is_mapped(tensor: Tensor, path: Path) -> bool:
    """Whether a tensor is in a file, by what the system says of the process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(address, 16) for address in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.endswith(str(path))
    raise AssertionError("a tensor is nowhere")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone says what is mapped")
def test_large_tensors_stay_in_the_file_and_small_ones_do_not(tmp_path):
    """Which on a network disk may be gone when they are looked at again."""
    moments = {"state": {0: {"exp_avg": torch.rand(3000), "step": torch.tensor(3.0)}}, "param_groups": [{"params": [0]}]}
    best = {"scores": [torch.tensor(0.5)], "name": "val/loss"}
    path = tmp_path / "last.ckpt"
    written = {"state_dict": {"a": torch.rand(3000)}, "optimizer_states": [moments], "callbacks": {"best": best}}
    torch.save(written | {"model": {}, "fingerprints": {}}, path)
    read = read_checkpoint(path)
    assert is_mapped(read["state_dict"]["a"], path) and is_mapped(read["optimizer_states"][0]["state"][0]["exp_avg"], path)
    assert read["callbacks"]["best"] == best
    assert not is_mapped(read["callbacks"]["best"]["scores"][0], path)
    path.unlink()
    assert torch.equal(read["state_dict"]["a"], written["state_dict"]["a"])


def test_a_checkpoint_that_somebody_has_compressed_is_refused(checkpoint):
    """It would be mapped as it stands there."""
    with zipfile.ZipFile(checkpoint) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"last.ckpt is damaged: .* in it is not what was written"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("content", [b"", b"this is a text\n", b"\x80\x04K\x01.", b"PK\x03\x04"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "notes.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes.ckpt cannot be read as a checkpoint"):
        read_checkpoint(path)


def test_another_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as archive:
        archive.writestr("readme.txt", "text")
    with pytest.raises(ValueError, match=r"other.ckpt cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_another_torch_file_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is a torch file but no checkpoint of this project: it lacks fingerprints, model"):
        read_checkpoint(tmp_path / "other.ckpt")


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": {}, "model": Code(tmp_path / "ran"), "fingerprints": {}}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match=r"code.ckpt cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "code.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_missing_checkpoint_is_refused_with_those_there_are(checkpoint):
    with pytest.raises(ValueError, match=r"there is no checkpoint .*best.ckpt; that folder has last.ckpt"):
        read_checkpoint(checkpoint.with_name("best.ckpt"))
    with pytest.raises(ValueError, match=r"there is no checkpoint in that folder"):
        read_checkpoint(checkpoint.parent / "nowhere" / "best.ckpt")
