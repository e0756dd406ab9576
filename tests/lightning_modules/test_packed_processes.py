"""Two processes that pack rows, or group them, learn what one does: they plan with the sizes that the first has looked at."""

from pathlib import Path

import pytest

from datamodules.batching import Batching
from tests.lightning_modules.processes import in_two_processes
from tests.lightning_modules.test_strategies import same, train  # noqa: F401  # a fixture


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_two_processes_pack_what_one_packs(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind) -> None:  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    batching = Batching(kind, max_tokens=76)
    assert in_two_processes(train, tmp_path / "two", batch_size=1, batching=batching) == [0, 0]
    assert len([*(tmp_path / "cache/omnilit/sizes").iterdir()]) == 2  # what was found last, and what the run began with
    train(tmp_path / "one", {}, batch_size=2, accumulate_grad_batches=2 if kind == "padded" else 1, batching=batching)
    same(tmp_path / "one", tmp_path / "two")
