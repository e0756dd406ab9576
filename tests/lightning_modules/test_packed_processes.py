"""Two processes that pack rows, or group them, learn what one does: they plan with the sizes that the first has looked at."""

from functools import partial
from pathlib import Path

import pytest

from datamodules.batching import Batching
from tests.lightning_modules import test_strategies
from tests.lightning_modules.processes import in_two_processes
from tests.lightning_modules.run_fakes import make_data
from tests.lightning_modules.test_strategies import same, train  # noqa: F401  # a fixture


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_two_processes_pack_what_one_packs(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind) -> None:  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(test_strategies, "make_data", partial(make_data, batching=Batching(kind, max_tokens=60)))
    assert in_two_processes(train, tmp_path / "two", batch_size=1) == [0, 0]
    assert len([*(tmp_path / "cache/omnilit/sizes").iterdir()]) == 2  # what was found last, and what the run began with
    train(tmp_path / "one", {}, batch_size=2, accumulate_grad_batches=2 if kind == "padded" else 1)
    same(tmp_path / "one", tmp_path / "two")
