"""Objectives that compare answers: their loss against Hugging Face, and what a run of one does.

Shape suffixes: B rows, T tokens, N patches, D width, V vocabulary.
"""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.image import ImageDataModule
from datamodules.mixture import MixtureDataModule
from datamodules.source import Source
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.cpo import CPOLitModule
from lightning_modules.dpo import DPOLitModule
from lightning_modules.kto import KTOLitModule
from lightning_modules.mdpo import MDPOLitModule
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.orpo import ORPOLitModule
from lightning_modules.pair_logps import mean
from lightning_modules.preference import PreferenceLitModule
from lightning_modules.references import AdapterOff, FrozenCopy, SecondAdapter
from lightning_modules.simpo import SimPOLitModule
from models.language import LanguageModel
from tests.conftest import randomise_adapters
from tests.lightning_modules.preference_fakes import constant, make_module, sgd, write_pairs
from tests.lightning_modules.run_fakes import examples, make_data, make_trainer

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("rows") / "rows.jsonl", 8)


def built(module: MultiModalLitModule) -> Any:
    module.configure_model()
    randomise_adapters(module)
    return module


def hugging_face_logps(
    module: PreferenceLitModule, llm: Path, clip: Path, row: dict[str, Any], answer: str, folder: Path
) -> Tensor:
    """Log-probability of an answer, of each of its tokens, with models that Hugging Face reads from the folders.

    The text is rendered by the template, tokenised, and its placeholders are written by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

    tokenizer = AutoTokenizer.from_pretrained(llm)
    language = AutoModelForCausalLM.from_pretrained(llm).eval()
    prompt = [{**row["messages"][0], "content": row["messages"][0]["content"].replace("<image>", "")}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    start, _, rest = text.partition("What is in")
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (start, f"What is in{rest}", f"{answer}<|im_end|>")]
    embed = language.get_input_embeddings()
    pieces = [embed(torch.tensor(part)) for part in ids]
    if row["images"]:
        from PIL import Image

        encoder = module.model.image_encoder
        vision = CLIPVisionModel.from_pretrained(clip).eval()
        pixels_BCHW = encoder.transform(Image.open(folder / row["images"][0]))[None]
        patches_ND = vision(pixels_BCHW, output_hidden_states=True).hidden_states[-2][0, 1:]
        projector = module.model.image_projector
        pieces.insert(1, projector.linear_2(F.gelu(projector.linear_1(patches_ND))))
    embeddings_BTD = torch.cat(pieces)[None]
    count = len(ids[2])
    logps_TV = language(inputs_embeds=embeddings_BTD).logits[0, -count - 1 : -1].log_softmax(-1)
    return logps_TV.gather(1, torch.tensor(ids[2])[:, None])[:, 0]


class TestLoss:
    def test_is_that_of_hugging_face(self, tiny_llm: Path, tiny_clip: Path, rows: Path) -> None:
        """With fresh adapters policy and reference are the base, so SimPO's terms are those of the folder's model."""
        module = make_module(SimPOLitModule, tiny_llm, tiny_clip, beta=2.0, gamma=0.5)
        module.configure_model()
        data = make_data(module, rows)
        with torch.no_grad():
            total, count = module.step(data.collate(examples(data)[:5]), "train") or (None, None)
            expected = 0.0
            for line in rows.read_text().splitlines()[:5]:
                row = json.loads(line)
                chosen, rejected = (
                    hugging_face_logps(module, tiny_llm, tiny_clip, row, answer, rows.parent).mean()
                    for answer in (row["messages"][1]["content"], row["rejected_response"])
                )
                expected -= float(F.logsigmoid(2.0 * (chosen - rejected) - 0.5))
        assert float(count) == 5
        assert float(total) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        ("kind", "options", "expected"),
        [
            (DPOLitModule, {}, math.log(2)),
            (DPOLitModule, {"loss_type": {"sigmoid": 0.8, "bco_pair": 0.2}}, 1.2 * math.log(2)),
            (DPOLitModule, {"loss_type": "ipo"}, 25.0),
            (MDPOLitModule, {}, 3 * math.log(2)),
            (KTOLitModule, {"desirable_weight": 1.5}, 0.5 * (1.5 + 1.0) / 2),
        ],
    )
    def test_at_the_reference_it_is_known(
        self,
        kind: type[PreferenceLitModule],
        options: dict[str, Any],
        expected: float,
        tiny_llm: Path,
        tiny_clip: Path,
        rows: Path,
    ) -> None:
        module = make_module(kind, tiny_llm, tiny_clip, **options)
        module.configure_model()
        data = make_data(module, rows)
        total, count = module.step(data.collate(examples(data)[:4]), "train") or (None, None)
        assert float(mean(total, count)) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("kind", [DPOLitModule, KTOLitModule, SimPOLitModule, ORPOLitModule, CPOLitModule, MDPOLitModule])
    def test_a_shared_prompt_changes_nothing(
        self, kind: type[PreferenceLitModule], tiny_llm: Path, tiny_clip: Path, rows: Path
    ) -> None:
        module = built(make_module(kind, tiny_llm, tiny_clip)).double()
        losses, gradients = [], []
        for shared in (True, False):
            data = make_data(module, rows, answer_form=replace(module.answer_form, shared_prompt=shared))
            batch = data.collate(examples(data))
            batch["image"]["media"] = batch["image"]["media"].double()
            module.zero_grad()
            total, count = module.step(batch, "train")
            total.sum().backward()
            losses.append((float(mean(total, count)), count.tolist(), len(batch["tokens_BT"])))
            gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
        assert losses[0][2] < losses[1][2] and losses[0][1] == losses[1][1]
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
        assert gradients[0].keys() == gradients[1].keys() != set()
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-4), name

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize(
        ("kind", "options"),
        [(DPOLitModule, {}), (DPOLitModule, {"loss_type": "ipo"}), (DPOLitModule, {"ld_alpha": 0.5}), (SimPOLitModule, {})],
    )
    def test_identical_answers_teach_nothing(
        self,
        kind: type[PreferenceLitModule],
        options: dict[str, Any],
        shared: bool,
        tiny_llm: Path,
        tiny_clip: Path,
        tmp_path: Path,
    ) -> None:
        """Exactly nothing: each gradient is 0."""
        module = built(make_module(kind, tiny_llm, tiny_clip, **options))
        for answers, is_zero in (("red", "red"), True), (("red", "blue"), False):
            rows = write_pairs(tmp_path / "rows.jsonl", 3, answers=[answers])
            data = make_data(module, rows, answer_form=replace(module.answer_form, shared_prompt=shared))
            module.zero_grad()
            total, count = module.step(data.collate(examples(data)), "train")
            total.backward()
            gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
            assert gradients and count == 3
            assert all(bool((gradient == 0).all()) for gradient in gradients) == is_zero

    def test_a_picture_is_encoded_once(self, tiny_llm: Path, tiny_clip: Path, rows: Path) -> None:
        """By policy and reference, for chosen and rejected."""
        module = built(make_module(DPOLitModule, tiny_llm, tiny_clip, reference=SecondAdapter()))
        seen: list[int] = []
        module.model.image_encoder.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        data = make_data(module, rows)
        module.step(data.collate(examples(data)[:3]), "train")
        assert sum(seen) == 3


class TestOptions:
    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            (DPOLitModule, {"beta": 0.0}, "beta must be above 0"),
            (DPOLitModule, {"ld_alpha": 1.5}, "model.ld_alpha.*1.5"),
            (DPOLitModule, {"loss_type": "exo_pair"}, "exo_pair divides by label_smoothing"),
            (DPOLitModule, {"loss_type": "aot", "use_weighting": True}, "aot sorts the pairs"),
            (DPOLitModule, {"loss_type": "ipo", "margin_weight": 1.0}, "ipo has no place for a margin"),
            (DPOLitModule, {"lr_factor": 0.0}, "model.lr_factor"),
            (SimPOLitModule, {"beta": -1.0}, "model.beta"),
            (SimPOLitModule, {"nll_weight": -1.0}, "model.nll_weight"),
            (CPOLitModule, {"label_smoothing": 0.5}, "model.label_smoothing"),
            (CPOLitModule, {"label_smoothing": 0.1, "loss_type": "hinge"}, "only the loss_type sigmoid"),
            (KTOLitModule, {"undesirable_weight": -0.1}, "model.undesirable_weight"),
            (ORPOLitModule, {"odds_weight": 0.0}, "model.odds_weight"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, kind: type[PreferenceLitModule], options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            kind(LanguageModel("no/such/model"), **options)

    def test_learning_rates_are_scaled(self, tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
        options = {"image_projector": MLPProjector(tune=Tune(lr=0.02)), "optimizer": sgd(0.1), "lr_factor": 0.25}
        module = make_module(DPOLitModule, tiny_llm, tiny_clip, lr_scheduler=constant, **options)
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.fit(module, make_data(module, rows))
        rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
        expected = {"language_model": 0.025, "image_projector": 0.005, "image_projector/no_decay": 0.005}
        assert rates == pytest.approx(expected)

    def test_all_dropout_is_off(self, tiny_llm: Path, tiny_clip: Path, rows: Path) -> None:
        tune = Tune(mode="lora", lora=LoRA(dropout=0.5, target_modules=("q_proj", "v_proj")))
        module = built(make_module(DPOLitModule, tiny_llm, tiny_clip, language_model=LanguageModel(str(tiny_llm), tune=tune)))
        data = make_data(module, rows)
        batch = data.collate(examples(data)[:3])
        module.train()
        totals = [module.step(batch, "train")[0] for _ in range(2)]
        module.eval()
        totals.append(module.step(batch, "train")[0])
        assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])


class TestReference:
    def test_after_a_warm_start_it_is_the_warm_start(
        self, tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path, log: pytest.LogCaptureFixture
    ) -> None:
        tuned = make_module(DPOLitModule, tiny_llm, tiny_clip).model  # parts with the same options
        parts = {name: part for name, part in tuned.slots().items() if name != "fusion"}
        sft = MultiModalLitModule(**parts, optimizer=sgd(0.5))
        trainer = make_trainer(tmp_path / "sft", max_steps=3)
        trainer.fit(sft, make_data(sft, rows))
        trainer.save_checkpoint(tmp_path / "sft.ckpt")

        module = make_module(DPOLitModule, tiny_llm, tiny_clip, init_from=str(tmp_path / "sft.ckpt"))
        module.configure_model()
        assert isinstance(module.reference, SecondAdapter)
        assert "reference: the start of this run: a frozen copy of the adapters" in log.text
        data = make_data(module, rows)
        batch = data.collate(examples(data))
        total, count = module.step(batch, "train")
        assert float(total / count) == pytest.approx(math.log(2), rel=1e-6)

        base = make_module(DPOLitModule, tiny_llm, tiny_clip, init_from=str(tmp_path / "sft.ckpt"), reference=AdapterOff())
        with pytest.warns(UserWarning, match="not with the warm start"):
            base.configure_model()
        total, count = base.step(batch, "train")
        assert abs(float(total / count) - math.log(2)) > 1e-3

    def test_a_projector_that_trains_beside_lora_is_refused(self, tiny_llm: Path, tiny_clip: Path) -> None:
        module = make_module(DPOLitModule, tiny_llm, tiny_clip, image_projector=MLPProjector(), reference=AdapterOff())
        with pytest.raises(ValueError, match="image_projector trains in full.*FrozenCopy"):
            module.configure_model()
        module = make_module(DPOLitModule, tiny_llm, tiny_clip, image_projector=MLPProjector())
        module.configure_model()
        assert isinstance(module.reference, FrozenCopy)

    def test_a_checkpoint_without_one_is_refused(self, tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
        free = make_module(SimPOLitModule, tiny_llm, tiny_clip)
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.fit(free, make_data(free, rows))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        module = make_module(DPOLitModule, tiny_llm, tiny_clip)
        with pytest.raises(ValueError, match="no reference.*model.init_from"):
            make_trainer(tmp_path).validate(module, make_data(module, rows, val_path=str(rows)), tmp_path / "last.ckpt")


class TestMetrics:
    def test_training_logs_the_means_of_a_step(self, tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
        """Three batches of a step, of 3, 3 and 2 pairs."""
        module = built(make_module(DPOLitModule, tiny_llm, tiny_clip, optimizer=sgd(), lr_scheduler=constant))
        other = copy.deepcopy(module)
        data = make_data(module, rows, shuffle=False, batch_size=3)
        trainer = make_trainer(tmp_path, max_steps=1, accumulate_grad_batches=3, log_every_n_steps=1)
        trainer.fit(module, data)
        all_rows = data.collate(examples(data))
        other.step(all_rows, "val")
        expected = other._means.compute(trainer)
        got = {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}
        names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
        names |= {"logps/chosen", "logps/rejected", "nll_loss", "mean_token_accuracy"}
        assert got.keys() == names and expected.keys() == names | {"entropy", "logits/chosen", "logits/rejected"}
        assert got == pytest.approx({name: expected[name] for name in names}, rel=1e-5)
        assert abs(got["rewards/margins"]) > 0.01

    def test_validation_logs_them_by_source(self, tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
        paths = {name: write_pairs(tmp_path / f"{name}.jsonl", size) for name, size in (("a", 4), ("b", 3))}
        sources = {name: Source(train_path=str(path), val_path=str(path)) for name, path in paths.items()}
        module = built(make_module(DPOLitModule, tiny_llm, tiny_clip, loss_type={"sigmoid": 1.0, "hinge": 0.1}))
        options = {"processor": module.processor, "answer_form": module.answer_form, "num_workers": 0}
        data = MixtureDataModule(sources, eval_batch_size=7, **options)
        trainer = make_trainer(tmp_path)
        trainer.validate(module, data, verbose=False)
        both = {name: float(value) for name, value in trainer.callback_metrics.items()}
        means = {}
        for name, size in (("a", 4), ("b", 3)):
            alone = ImageDataModule(val_path=str(paths[name]), eval_batch_size=size, **options)
            trainer.validate(module, alone, verbose=False)
            means[name] = {key.removeprefix("val/"): float(value) for key, value in trainer.callback_metrics.items()}
            assert {key: both[f"val/{name}/{key}"] for key in means[name]} == pytest.approx(means[name], rel=1e-4)
        for metric in ("loss", "rewards/margins", "loss/sigmoid"):
            assert both[f"val/{metric}"] == pytest.approx((4 * means["a"][metric] + 3 * means["b"][metric]) / 7, rel=1e-4)
        assert len(both) == 3 * len(means["a"])

    def test_a_step_is_the_same_in_one_batch_and_in_several(
        self, tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path
    ) -> None:
        start = built(make_module(DPOLitModule, tiny_llm, tiny_clip, optimizer=sgd(), lr_scheduler=constant))
        found = []
        for batch_size, accumulate in ((8, 1), (1, 8), (3, 3)):
            module = copy.deepcopy(start)
            options = {"accumulate_grad_batches": accumulate, "max_steps": 1, "gradient_clip_val": 1e9}
            make_trainer(tmp_path, **options).fit(module, make_data(module, rows, shuffle=False, batch_size=batch_size))
            found.append(module.model.state_dict())
        before = start.model.state_dict()
        assert any(not torch.equal(before[name], weight) for name, weight in found[0].items())
        for name, weight in found[0].items():
            assert all(torch.allclose(other[name], weight, atol=1e-6) for other in found[1:]), name

    def test_rows_are_counted_once(self, tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
        module = make_module(MDPOLitModule, tiny_llm, tiny_clip)
        data = make_data(module, rows)
        make_trainer(tmp_path).fit(module, data)
        assert data.row_counts() | {"dropped_tokens": 0} == data.row_counts() and data.row_counts()["trained"] == 8


def test_it_answers_prompts(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
    module = make_module(DPOLitModule, tiny_llm, tiny_clip)
    predictions = make_trainer(tmp_path).predict(module, make_data(module, rows))
    assert [row["id"] for batch in predictions or [] for row in batch] == [str(number) for number in range(8)]


def test_all_rows_of_a_batch_may_be_skipped(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(['{"messages": []}'] * 2 + rows.read_text().splitlines()[:4]) + "\n")
    options = {"shuffle": False, "max_skipped": 0.9, "media_root": str(rows.parent), "val_path": str(bad)}
    for kind in (DPOLitModule, KTOLitModule):
        module = make_module(kind, tiny_llm, tiny_clip)
        trainer = make_trainer(tmp_path / kind.__name__)
        trainer.fit(module, make_data(module, bad, **options))
        assert math.isfinite(trainer.callback_metrics["val/loss"])


def test_a_text_model_needs_no_media(tiny_llm: Path, tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", 4, pictures=False)
    for kind in (DPOLitModule, MDPOLitModule):  # whose term of media counts nothing
        module = make_module(kind, tiny_llm, None)
        trainer = make_trainer(tmp_path / kind.__name__)
        trainer.fit(module, make_data(module, rows))
        assert math.isfinite(trainer.callback_metrics["train/loss"])


def test_a_lent_batch_does_not_count_in_the_reference_point_of_kto(tiny_llm: Path) -> None:
    """A process without rows runs those of another, which gives their sum to the mean of all itself."""
    module = make_module(KTOLitModule, tiny_llm, None)
    own = torch.tensor([3.0, 2.0])
    assert module._mean(own) == 1.5
    module.is_lent = True
    assert module._mean(own) == 0
