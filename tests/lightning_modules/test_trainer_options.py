"""Options of the trainer that would end in another model are refused where a fit begins, before any weights are made."""

from pathlib import Path

import pytest
from jsonargparse import Namespace
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.trainer_options import check_clipping
from models.language import LanguageModel
from planning.devices import find_device
from planning.placement import ONE_DEVICE
from planning.run import Run, plan_run
from tests.lightning_modules.run_fakes import make_data, make_trainer, write_rows

NEGATIVE = r"^trainer\.gradient_clip_val is -1\.0, but gradients are clipped to a positive number"


def test_gradients_are_not_turned_around(tiny_llm: Path, tmp_path: Path) -> None:
    """Nor does `plan` plan it."""
    module = MultiModalLitModule(LanguageModel(str(tiny_llm)))
    data = make_data(module, write_rows(tmp_path / "rows.jsonl", 2))
    with pytest.raises(ValueError, match=NEGATIVE):
        make_trainer(tmp_path, gradient_clip_val=-1.0).fit(module, data)
    assert not module.model.is_built
    with pytest.raises(ValueError, match=NEGATIVE):
        plan_run(Run(module, data, Namespace(gradient_clip_val=-1.0), ONE_DEVICE, find_device("cpu")))
    for value in (None, 0, 0.0, 0.5):
        check_clipping(value)


@pytest.mark.parametrize("kind", [WeightAveraging, EMAWeightAveraging])
def test_weights_are_not_averaged(tiny_llm: Path, tmp_path: Path, kind: type[WeightAveraging]) -> None:
    module = MultiModalLitModule(LanguageModel(str(tiny_llm)))
    data = make_data(module, write_rows(tmp_path / "rows.jsonl", 2))
    with pytest.raises(ValueError, match=rf"^trainer\.callbacks has {kind.__name__}, which puts averaged weights"):
        make_trainer(tmp_path, kind()).fit(module, data)
