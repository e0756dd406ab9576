"""Criteria that need the reference, what follows for training, and what is logged of all criteria."""

import copy
import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.batch import AnswerRole, Batch
from datamodules.criteria import CriteriaUse, RewardCriterion, Term
from datamodules.preference import PreferenceDataModule
from datamodules.relevance import RelevanceScorer
from datamodules.score_ranges import ENOUGH, ROUNDING, ScoreRanges
from datamodules.toxicity import ToxicityScorer
from lightning_modules.comparison import ScoredAnswers
from lightning_modules.criteria import (
    MultimodalConsistencyScorer,
    ReferenceCriterion,
    blank_media,
    criteria_metrics,
    has_media,
    judged,
)
from lightning_modules.dpo import DPOLitModule
from lightning_modules.kto import KTOLitModule
from lightning_modules.logprobs import AnswerLogps
from lightning_modules.precomputed import PrecomputedReference
from lightning_modules.references import label_logps
from models.adapters import adapters_off
from tests.conftest import randomise_adapters
from tests.lightning_modules.preference_fakes import constant, make_module, sgd, write_pairs
from tests.lightning_modules.run_fakes import batches, examples, make_data, make_trainer, short_run
from train import main

pytestmark = pytest.mark.usefixtures("seed")

CRITERION = ReferenceCriterion(MultimodalConsistencyScorer(center=0.1, scale=0.2))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("rows") / "rows.jsonl", 5)


def make(llm: Path, clip: Path | None, **options: Any) -> DPOLitModule:
    module = make_module(DPOLitModule, llm, clip, reward_criteria=[CRITERION], **options)
    module.configure_model()
    randomise_adapters(module)
    return module


def test_the_score_is_the_gain_a_token() -> None:
    right = AnswerLogps(torch.tensor([-1.0, -3.0, -0.5, -2.0]), torch.tensor([0, 0, 1, 2]), 3)
    blank = AnswerLogps(torch.tensor([-2.0, -4.0, -0.5, -1.0]), torch.tensor([0, 0, 1, 2]), 3)
    score_A = MultimodalConsistencyScorer()(right, blank, torch.tensor([True, True, False]))
    assert score_A[:2].tolist() == [pytest.approx(1 / (1 + math.exp(-1 / 0.5))), 0.5] and score_A[2].isnan()
    shifted_A = MultimodalConsistencyScorer(center=1.0, scale=3.0)(right, blank, torch.ones(3, dtype=torch.bool))
    assert shifted_A.tolist() == pytest.approx([0.5, 1 / (1 + math.exp(1 / 3)), 1 / (1 + math.exp(2 / 3))])
    with pytest.raises(ValueError, match="scale is a number of nats, above 0"):
        MultimodalConsistencyScorer(scale=0)


def scores(module: DPOLitModule, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return module.score_answers(batch, "val").scores_A["multimodal_consistency"]


def test_it_is_what_the_reference_says_with_features_of_zeros(tiny_llm: Path, tiny_clip: Path, rows: Path) -> None:
    module = make(tiny_llm, tiny_clip)
    model = module.model
    for batch in batches(make_data(module, rows)):
        score_A = scores(module, batch)
        if "image" not in batch:
            assert score_A.isnan().all()
            continue
        features_NLD, mask_NL = model.features(batch)["image"]
        with torch.no_grad(), adapters_off(model):
            right_S = label_logps(model, batch, model.encode(batch))
            blank_S = label_logps(model, batch, {"image": model.image_projector(torch.zeros_like(features_NLD), mask_NL)})  # type: ignore[misc]
        num_chosen = int((batch["branches_BT"] == 1)[batch["labels_BT"] != -100].sum())
        for answer, part in enumerate((slice(None, num_chosen), slice(num_chosen, None))):
            gain = float((right_S - blank_S)[part].mean())
            assert abs(gain) > 1e-3
            assert float(score_A[answer]) == pytest.approx(1 / (1 + math.exp(-(gain - 0.1) / 0.2)), abs=1e-5)


def test_a_score_does_not_depend_on_the_batch(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
    module = make(tiny_llm, tiny_clip)
    data = make_data(module, rows)
    together = scores(module, data.collate(examples(data)))
    alone = torch.cat([scores(module, batch) for batch in batches(data)])
    assert torch.allclose(together, alone, atol=1e-5, equal_nan=True)
    assert together.isnan().tolist() == [False] * 8 + [True] * 2  # the last row has no picture
    kept = make(tiny_llm, tiny_clip, reference=PrecomputedReference(str(tmp_path / "logps")))
    kept.model.load_state_dict(module.model.state_dict())
    for _ in range(2):  # computed, then read
        assert torch.allclose(scores(kept, data.collate(examples(data))), together, atol=1e-5, equal_nan=True)
    assert isinstance(kept.reference, PrecomputedReference)
    assert (kept.reference.num_computed, kept.reference.num_read) == (20, 20)


def test_media_are_encoded_once(tiny_llm: Path, tiny_clip: Path, rows: Path) -> None:
    module = make(tiny_llm, tiny_clip)
    data = make_data(module, rows)
    scores(module, data.collate(examples(data)))
    assert module.model.frozen_features.num_encoded == 4


def test_samples_of_a_pack_have_media_of_their_own(rows: Path, tiny_llm: Path, tiny_clip: Path) -> None:
    module = make(tiny_llm, tiny_clip)
    data = make_data(module, rows)
    made = examples(data)
    assert has_media(data.collate(made)).tolist() == [True] * 8 + [False] * 2
    packed = data.collate([replace(example, slot=0) for example in made[3:]])
    assert len(packed["tokens_BT"]) == 1 and has_media(packed).tolist() == [True, True, False, False]


def test_training_is_only_scored_where_it_matters(tiny_llm: Path, tiny_clip: Path, rows: Path) -> None:
    module = make(tiny_llm, tiny_clip)
    data = make_data(module, rows)
    batch = data.collate(examples(data))
    assert module.score_answers(batch, "train").scores_A == {}
    score_A = scores(module, batch)
    for mode in ("weight", "margin"):
        options = {"margin_weight": 1.0} if mode == "margin" else {}
        other = make(tiny_llm, tiny_clip, criteria_use=CriteriaUse(mode=mode, temperature=0.5), **options)  # type: ignore[arg-type]
        other.model.load_state_dict(module.model.state_dict())
        own_P = torch.tensor([0.5, 1.0, 1.0, 2.0, 3.0])
        batch["answers"]["weight_P" if mode == "weight" else "margin_P"] = own_P
        trained = other.score_answers(batch, "train")
        gain_P = (score_A[0::2] - score_A[1::2])[:4]
        if mode == "weight":
            expected_P = own_P * torch.cat([2 * torch.sigmoid(gain_P / 0.5), torch.ones(1)])
            assert torch.allclose(trained.weight_P, expected_P, atol=1e-5)
        else:
            assert torch.allclose(trained.margin_P, torch.cat([gain_P.clamp(min=0), own_P[4:]]), atol=1e-5)
        assert torch.equal(other.score_answers(batch, "val").weight_P, batch["answers"]["weight_P"])


def test_weights_reach_the_gradient(tiny_llm: Path, tiny_clip: Path, rows: Path) -> None:
    module = make(tiny_llm, tiny_clip, criteria_use=CriteriaUse(mode="weight", temperature=0.2))
    plain = copy.deepcopy(module)
    plain.reward_criteria = []
    data = make_data(module, rows)
    batch = data.collate(examples(data))
    gradients = []
    for each in (module, plain):
        result = each.step(batch, "train")
        assert result is not None
        (result[0] / result[1]).backward()
        weights = [weight for name, weight in each.model.named_parameters() if "lora_B" in name and weight.grad is not None]
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))
    assert not torch.allclose(*gradients, rtol=1e-2) and gradients[0].abs().max() > 0


def test_blank_media_of_a_ready_model_keep_their_sizes(tiny_llm: Path, tiny_clip: Path, rows: Path) -> None:
    data = make_data(make(tiny_llm, tiny_clip), rows)
    batch = data.collate(examples(data))
    grid = torch.tensor([[1, 4, 4]])
    batch["image"]["inputs"] = {(0,): {"pixel_values": torch.rand(16, 12), "image_grid_thw": grid}}
    blank, features = blank_media(batch, {"image": (torch.rand(4, 16, 24), None)})
    inputs = blank["image"]["inputs"][0,]
    assert torch.equal(inputs["image_grid_thw"], grid) and not inputs["pixel_values"].any()
    assert inputs["pixel_values"].shape == (16, 12) and batch["image"]["inputs"][0,]["pixel_values"].all()
    assert not features["image"][0].any() and not blank["image"]["media"].any() and batch["image"]["media"].any()
    assert not set(blank["answers"]["keys"]) & set(batch["answers"]["keys"])


def test_what_a_model_cannot_do_is_refused(tiny_llm: Path) -> None:
    def refuse(match: str, kind: Any = DPOLitModule, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            make_module(kind, tiny_llm, None, **options).configure_model()

    refuse("mode is filter, but a model gets its pairs as they are", criteria_use=CriteriaUse("filter"))
    refuse("mode is weight, but model.reward_criteria has none", criteria_use=CriteriaUse("weight"))
    refuse("the loss reads no margin", reward_criteria=[CRITERION], criteria_use=CriteriaUse("margin"))
    refuse("each answer for itself", KTOLitModule, reward_criteria=[CRITERION], criteria_use=CriteriaUse("weight"))
    refuse("2 criteria called multimodal_consistency", reward_criteria=[CRITERION, CRITERION])


def test_means_and_agreement_by_hand() -> None:
    nothing = AnswerLogps(torch.zeros(0), torch.zeros(0, dtype=torch.long), 6)
    nan = math.nan
    answers: Any = {
        "roles": ["chosen", "rejected"] * 3,
        "row_A": torch.arange(6),
        "example_A": [*range(6)],
        "pairs_P2": torch.arange(6).view(3, 2),
        "margin_P": torch.zeros(3),
        "weight_P": torch.ones(3),
        "media_pairs_M2": torch.zeros(0, 2, dtype=torch.long),
        "scores_A": {"a": torch.tensor([0.9, 0.1, 0.4, 0.4, nan, 0.8])},
    }
    scored = ScoredAnswers.of(answers, nothing)
    found = {name: values for metrics, _ in criteria_metrics(scored) for name, values in metrics.items()}
    means = {name: float(total.sum() / count.sum()) for name, (total, count) in found.items()}
    expected = {"criteria/a/chosen": 1.3 / 2, "criteria/a/rejected": 1.3 / 3, "criteria/a/agreement": 1.5 / 2}
    assert means == pytest.approx(expected)
    use, terms = CriteriaUse(mode="weight", temperature=0.1), {"b": Term(floor=0.5)}
    again = judged(scored, {"b": torch.tensor([0.6, 0.4, 0.3, 0.9, nan, 0.9])}, terms, use)
    gains = torch.tensor([0.6, -0.9, 0.0])  # 0.4 and 0.3 are below the floor
    assert torch.allclose(again.weight_P, 2 * torch.sigmoid(gains / 0.1)) and set(again.scores_A) == {"a", "b"}


def test_criteria_of_data_and_of_the_model_are_logged(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
    module = make(tiny_llm, tiny_clip, optimizer=sgd(), lr_scheduler=constant)
    criteria = [RewardCriterion(ToxicityScorer()), RewardCriterion(RelevanceScorer(min_words=3))]
    data = PreferenceDataModule(
        val_path=str(rows),
        num_workers=0,
        processor=module.processor,
        answer_form=module.answer_form,
        reward_criteria=criteria,
    )
    trainer = make_trainer(tmp_path)
    trainer.validate(module, data, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "criteria" in name}
    assert logged.pop("val/criteria/toxicity/chosen") == logged.pop("val/criteria/toxicity/rejected") == 1.0
    assert logged.pop("val/criteria/toxicity/agreement") == 0.5
    plain = make_data(module, rows)
    score_A = scores(module, plain.collate(examples(plain)))[:8]
    assert logged.pop("val/criteria/multimodal_consistency/chosen") == pytest.approx(float(score_A[0::2].mean()), abs=1e-5)
    assert logged.pop("val/criteria/multimodal_consistency/rejected") == pytest.approx(float(score_A[1::2].mean()), abs=1e-5)
    agreement = float((score_A[0::2] > score_A[1::2]).float().mean())
    assert logged.pop("val/criteria/multimodal_consistency/agreement") == pytest.approx(agreement)
    assert {name.split("/")[2] for name in logged} == {"relevance"}


@pytest.mark.parametrize("scale", [0.2, 1e9])
def test_a_criterion_that_tells_nothing_apart_is_reported_once(
    scale: float, tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(DPOLitModule, tiny_llm, tiny_clip, optimizer=sgd(), lr_scheduler=constant)
    module.reward_criteria = [ReferenceCriterion(MultimodalConsistencyScorer(scale=scale))]
    trainer = make_trainer(tmp_path)
    for _ in range(2):
        trainer.validate(module, make_data(module, rows, val_path=str(rows)), verbose=False)
    said = "the reward criterion multimodal_consistency gave the score 0.5 to each of 8 answers: it tells nothing apart"
    assert caplog.text.count("tells nothing apart") == caplog.text.count(said) == (scale > 1)


def test_a_criterion_that_says_nothing_is_named_once_there_is_enough() -> None:
    ranges = ScoreRanges()
    roles: list[AnswerRole] = ["chosen", "rejected", "corrupted", "mismatched"]
    for number in range(ENOUGH // 2):
        assert ranges.constant(ENOUGH) == []
        other = 0.5 * (1 + ROUNDING / 2 * (number % 2))
        scores_A = {"blind": [0.5, other, 0.9, 0.9], "silent": [math.nan] * 4, "seeing": [0.5, 0.6, 0.5, 0.5]}
        ranges.add({name: torch.tensor(scores, dtype=torch.float64) for name, scores in scores_A.items()}, roles)
    assert ranges.constant(ENOUGH) == [
        "the reward criterion blind gave the score 0.5 to each of 200 answers: it tells nothing apart",
        "the reward criterion silent gave no score to each of 200 answers: it tells nothing apart",
    ]
    assert ranges.constant() == []


@pytest.mark.parametrize(
    ("scores", "same"),
    [
        ([3e-7, 9e-7, 1e-8, 5e-7], None),
        ([0.5, 0.50001, 0.5, 0.5], None),
        ([math.inf, 0.5, 0.5, math.inf], None),
        ([-math.inf, math.inf, 0.5, 0.5], None),
        ([0.0, 0.0, -0.0, 0.0], "0"),
        ([3e-7, 3.000001e-7, 3e-7, 3e-7], "3e-07"),
        ([37.12345, 37.12346, 37.12345, math.nan], "37.1"),
        ([-37.12345, -37.12346, -37.12345, math.nan], "-37.1"),
        ([math.inf] * 4, "inf"),
        ([-math.inf] * 4, "-inf"),
    ],
)
def test_scores_are_the_same_up_to_the_rounding_of_their_size(scores: list[float], same: str | None) -> None:
    ranges = ScoreRanges()
    ranges.add({"a": torch.tensor(scores)}, ["chosen", "rejected"] * 2)
    given = 4 - sum(map(math.isnan, scores))
    said = f"the reward criterion a gave the score {same} to each of {given} answers: it tells nothing apart"
    assert ranges.constant() == ([] if same is None else [said])


def test_processes_judge_together() -> None:
    """Each of three gives another criterion one score; the last has seen no batch."""
    ranges = [ScoreRanges(["a", "b", "c"]) for _ in range(3)]
    for own, (a, b) in zip(ranges, ((0.25, 0.5), (0.75, 0.5)), strict=False):
        scores_A = {"a": torch.full((4,), a), "b": torch.full((4,), b), "c": torch.linspace(0, 1, 4)}
        own.add(scores_A, ["chosen", "rejected"] * 2)
    own_tensors: dict[str, list[torch.Tensor]] = {"sum": [], "max": []}

    def keep(own: torch.Tensor, reduce_op: str) -> torch.Tensor:
        own_tensors[reduce_op].append(own)
        return torch.full_like(own, torch.inf)  # so that nothing is judged yet

    assert not any(own.constant(reduce=keep) for own in ranges)
    together = {"sum": torch.stack(own_tensors["sum"]).sum(0), "max": torch.stack(own_tensors["max"]).amax(0)}
    said = "the reward criterion b gave the score 0.5 to each of 8 answers: it tells nothing apart"
    for own in ranges:
        assert own.constant(reduce=lambda _, reduce_op: together[reduce_op]) == [said]
    alone = ranges[0].constant()
    assert len(alone) == 1 and "criterion a gave the score 0.25 to each of 4" in alone[0]


CONFIG = """
samples: {{num_samples: 1}}
model:
  class_path: DPOLitModule
  init_args:
    language_model: {{class_path: LanguageModel, init_args: {{name_or_path: {llm}}}}}
    image_encoder: {{class_path: HFVisionEncoder, init_args: {{name_or_path: {clip}, layer: -2}}}}
    image_projector: {{class_path: MLPProjector, init_args: {{tune: {{mode: frozen}}}}}}
    reward_criteria: [{{scorer: {{class_path: MultimodalConsistencyScorer, init_args: {{scale: 0.3}}}}}}]
data:
  class_path: PreferenceDataModule
  init_args:
    train_path: {rows}
    val_path: {rows}
    batch_size: 5
    num_workers: 0
    reward_criteria:
      - {{scorer: {{class_path: ToxicityScorer}}, weight: 2, floor: 0.6}}
      - {{scorer: {{class_path: RelevanceScorer}}}}
    criteria_use: {{mode: relabel, min_difference: 0.05}}
"""


def test_a_run_from_the_command_line(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", 5, answers=[("You idiot!", "It is a bus."), ("A bus.", "A dog.")])
    config = tmp_path / "config.yaml"
    config.write_text(short_run(tmp_path / "run") + CONFIG.format(folder=tmp_path, llm=tiny_llm, clip=tiny_clip, rows=rows))
    main(["fit", f"--config={config}"])
    changed = [json.loads(line) for line in (tmp_path / "run/changed.jsonl").read_text().splitlines()]
    assert [row["line"] for row in changed] == [1, 3, 5]
    with next((tmp_path / "run").rglob("metrics.csv")).open() as file:
        logged = {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}
    assert logged["train/criteria/toxicity/chosen"] == 1.0
    assert logged["train/criteria/toxicity/rejected"] == pytest.approx((3 * 0.5 + 2) / 5)
    assert logged["val/criteria/toxicity/chosen"] == pytest.approx((3 * 0.5 + 2) / 5)
    assert logged["val/criteria/toxicity/agreement"] == pytest.approx((3 * 0 + 2 * 0.5) / 5)
    assert 0 < logged["val/criteria/multimodal_consistency/chosen"] < 1
    assert "train/criteria/multimodal_consistency/chosen" not in logged
