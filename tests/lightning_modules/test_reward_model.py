"""Reward models: where the score is read, what a checkpoint keeps, and what prediction gives.

Shape suffixes: A answers, D width, T tokens.
"""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from encoders.tuning import Tune
from lightning_modules.callbacks import FirstStepCheck, PredictionWriter
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.reward_model import RewardLitModule
from lightning_modules.samples import SamplePage
from models.language import LanguageModel
from models.reward_head import RewardHead
from tests.conftest import randomise_adapters
from tests.lightning_modules.preference_fakes import make_module, sgd, write_pairs
from tests.lightning_modules.run_fakes import examples, make_data, make_trainer

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("rows") / "rows.jsonl", 8)


def test_the_score_is_read_at_the_end_token(tiny_llm: Path, tiny_clip: Path, rows: Path) -> None:
    """By hand, from each answer in a row of its own, whose last supervised token is the end token."""
    module = make_module(RewardLitModule, tiny_llm, tiny_clip)
    module.configure_model()
    randomise_adapters(module)
    data = make_data(module, rows)
    batch = data.collate(examples(data))
    with torch.no_grad():
        reward_A = module.rewards(batch)
        expected = []
        for example in examples(data):
            for _, side in example.answers:
                alone = data.collate([side])
                end = int((torch.tensor(side.labels) != -100).nonzero()[-1])
                assert side.tokens[end] in module.processor.eos_ids
                hidden_D = module(alone)[0, end]
                expected.append(float(hidden_D @ module.reward_head.score.weight[0]))
    assert reward_A.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_loss_is_that_of_bradley_and_terry(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", 4, margin=0.7)
    module = make_module(RewardLitModule, tiny_llm, tiny_clip, centering=0.1)
    module.configure_model()
    data = make_data(module, rows)
    batch = data.collate(examples(data))
    chosen_P, rejected_P = module.rewards(batch).view(-1, 2).unbind(1)
    total, count = module.step(batch, "train")
    expected = -F.logsigmoid(chosen_P - rejected_P - 0.7) + 0.1 * (chosen_P + rejected_P).square()
    assert int(count) == 4 and float(total) == pytest.approx(float(expected.sum()), rel=1e-5)


def test_the_head_starts_small_and_stays_float32() -> None:
    head = RewardHead()
    head.build(1023)
    assert float(head.score.weight.std()) == pytest.approx(1024**-0.5, rel=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(3, 1023, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_all_that_trains_learns(mode: str, tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
    """In full, too: the language model's own head, which nothing passes, is left as it is."""
    language_model = LanguageModel(str(tiny_llm), tune=Tune(mode=mode))  # type: ignore[arg-type]
    module = make_module(RewardLitModule, tiny_llm, tiny_clip, language_model=language_model, optimizer=sgd())
    trainer = make_trainer(tmp_path, FirstStepCheck(), SamplePage(2))
    trainer.fit(module, make_data(module, rows, val_path=str(rows)))
    assert {"val/rewards/accuracies", "val/rewards/margins", "val/loss"} <= trainer.callback_metrics.keys()
    assert not (tmp_path / "samples.html").exists()  # it gives no answers


def test_it_is_kept_and_taken_up_by_another_run(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
    first = make_module(RewardLitModule, tiny_llm, tiny_clip, optimizer=sgd())
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(first, make_data(first, rows))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    data = make_data(first, rows)
    batch = data.collate(examples(data))
    expected = first.eval().rewards(batch)

    warm = make_module(RewardLitModule, tiny_llm, tiny_clip, init_from=str(tmp_path / "last.ckpt"))
    warm.configure_model()
    assert torch.equal(warm.eval().rewards(batch), expected)

    loaded = make_module(RewardLitModule, tiny_llm, tiny_clip)
    rows_of = make_trainer(tmp_path / "predict", PredictionWriter()).predict(
        loaded, make_data(loaded, rows), ckpt_path=tmp_path / "last.ckpt"
    )
    scores = [row["score"] for part in rows_of or [] for row in part]
    assert scores == pytest.approx(expected[::2].tolist(), rel=1e-4, abs=1e-5)  # of the chosen answers, which the rows have
    written = [json.loads(line) for line in (tmp_path / "predict/predictions.jsonl").read_text().splitlines()]
    assert [row["score"] for row in written] == scores and "right" not in written[0]
    assert written[1]["reference"] == "Nobody knows."


def test_a_checkpoint_without_a_head_is_refused(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
    model = make_module(RewardLitModule, tiny_llm, tiny_clip).model
    parts = {name: part for name, part in model.slots().items() if name != "fusion"}
    sft = MultiModalLitModule(**parts)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(sft, make_data(sft, rows))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    module = make_module(RewardLitModule, tiny_llm, tiny_clip)
    with pytest.raises(ValueError, match="no reward head.*model.init_from"):
        make_trainer(tmp_path).validate(module, make_data(module, rows, val_path=str(rows)), tmp_path / "last.ckpt")
    warm = make_module(RewardLitModule, tiny_llm, tiny_clip, init_from=str(tmp_path / "last.ckpt"))
    warm.configure_model()
    assert warm.reward_head.score.weight.any()


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="model.centering"):
        RewardLitModule(LanguageModel("no/such/model"), centering=-1.0)
