from pathlib import Path

import pytest
import torch

from lightning_modules.autocast import check_trained
from tests.faults.small_runs import end_state, fit, make_module
from tests.lightning_modules.run_fakes import write_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 4)


def test_a_run_says_so_where_its_precision_makes_narrow_what_trains(
    tiny_llm: Path, tiny_clip: Path, tmp_path: Path, rows: Path
) -> None:
    module = make_module(tiny_llm, tiny_clip)
    told = r"makes all weights that train bfloat16 \([\d,]+ of language_model, [\d,]+ of image_projector\).*: steps below 1/512"
    with pytest.warns(UserWarning, match=told):
        fit(module, tmp_path, rows, precision="bf16-true", max_epochs=1)
    assert {x.dtype for x in end_state(tmp_path)["state_dict"].values()} == {torch.bfloat16}


def test_weights_that_train_are_not_made_float16(tiny_llm: Path, tiny_clip: Path, tmp_path: Path, rows: Path) -> None:
    with pytest.raises(ValueError, match=r"makes all weights that train float16 .* Set it to 16-mixed: "):
        fit(make_module(tiny_llm, tiny_clip), tmp_path, rows, precision="16-true")


def test_other_precisions_keep_what_trains(tiny_llm: Path, tiny_clip: Path, recwarn: pytest.WarningsRecorder) -> None:
    module = make_module(tiny_llm, tiny_clip)
    module.configure_model()
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        check_trained(module.parts(), precision)
    module.requires_grad_(False)
    check_trained(module.parts(), "16-true")  # nothing trains
    assert not [warning for warning in recwarn if "weights that train" in str(warning.message)]
