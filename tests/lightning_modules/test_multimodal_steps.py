"""Losses, metrics and optimizers of the LitModule, against Hugging Face and by hand.

Shape suffixes: B rows, T tokens, N patches, D width, V vocabulary.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.batch import Batch, RowError
from datamodules.image import ImageDataModule
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import Tune
from lightning_modules.multimodal import MultiModalLitModule
from models.language import Generation, LanguageModel
from tests.lightning_modules.run_fakes import (
    COLOURS,
    Watch,
    batches,
    examples,
    make_data,
    make_trainer,
    weights,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("seed")

MakeModule = Callable[..., MultiModalLitModule]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 7)


def hugging_face_nll(module: MultiModalLitModule, llm: Path, clip: Path, batch: Batch) -> tuple[Tensor, int]:
    """Summed loss and number of supervised tokens of one row, with models that Hugging Face reads from the folders."""
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    language = AutoModelForCausalLM.from_pretrained(llm).eval()
    embeddings_BTD = language.get_input_embeddings()(batch["tokens_BT"].clamp(max=599))
    if "image" in batch:
        vision = CLIPVisionModel.from_pretrained(clip).eval()
        patches_BND = vision(batch["image"]["media"], output_hidden_states=True).hidden_states[-2][:, 1:]
        projector = module.model.image_projector
        projected_BND = projector.linear_2(F.gelu(projector.linear_1(patches_BND)))
        is_image_BT = batch["tokens_BT"] == module.processor.chat.media_ids["image"]
        embeddings_BTD[is_image_BT] = projected_BND[0]
    count = int((batch["labels_BT"] != -100).sum())
    return language(inputs_embeds=embeddings_BTD, labels=batch["labels_BT"]).loss * count, count


class TestLoss:
    def test_is_that_of_hugging_face(self, make_lit_module: MakeModule, tiny_llm: Path, tiny_clip: Path, rows: Path) -> None:
        module = make_lit_module()
        module.configure_model()
        data = make_data(module, rows)
        with torch.no_grad():
            loss = module.step(data.collate(examples(data)), "train")
            each = [hugging_face_nll(module, tiny_llm, tiny_clip, batch) for batch in batches(data)]
        assert loss is not None
        total, number = loss
        assert len({count for _, count in each}) > 1  # so that the mean over rows would be another
        assert int(number) == sum(count for _, count in each)
        assert float(total) == pytest.approx(sum(float(nll) for nll, _ in each), rel=1e-5)

    def test_a_batch_of_skipped_rows_trains_nothing(self, make_lit_module: MakeModule, rows: Path, tmp_path: Path) -> None:
        lines = rows.read_text().splitlines()
        bad = tmp_path / "bad.jsonl"
        bad.write_text("\n".join(['{"messages": []}'] * 2 + lines[2:4]) + "\n")
        module = make_lit_module()
        after: list[dict[str, Tensor]] = []
        watch = Watch(lambda trainer, module: after.append(weights(module)))
        options = {"shuffle": False, "max_skipped": 0.9, "media_root": str(rows.parent)}
        make_trainer(tmp_path, watch).fit(module, make_data(module, bad, val_path=str(bad), **options))
        start = make_lit_module()
        torch.manual_seed(4)
        start.configure_model()
        first, second = after
        assert all(torch.equal(first[name], tensor) for name, tensor in weights(start).items())
        assert not all(torch.equal(first[name], tensor) for name, tensor in second.items())

    @pytest.mark.parametrize("broken", [math.nan, math.inf])
    def test_one_that_is_no_number_stops_before_the_step(
        self, make_lit_module: MakeModule, rows: Path, tmp_path: Path, broken: float
    ) -> None:
        class Breaks(MultiModalLitModule):
            def step(self, batch: Batch, stage: Any) -> tuple[Tensor, Tensor] | None:
                loss = super().step(batch, stage)
                return loss if loss is None or self.trainer.global_step < 1 else (loss[0] * broken, loss[1])

        plain = make_lit_module(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
        module = Breaks(
            plain.model.language_model, plain.model.image_encoder, plain.model.image_projector, optimizer=plain.optimizer
        )
        seen: list[dict[str, Tensor]] = []
        trainer = make_trainer(tmp_path, Watch(lambda trainer, module: seen.append(weights(module))))
        with pytest.raises(ValueError, match=r"step 1 is not finite \(loss (nan|inf); rows .*rows\.jsonl:3, .*rows\.jsonl:4\)"):
            trainer.fit(module, make_data(module, rows, shuffle=False))
        assert len(seen) == 1
        assert all(torch.equal(seen[0][name], tensor) for name, tensor in weights(module).items())


@pytest.fixture(scope="module")
def learnt(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> MultiModalLitModule:
    """A module that knows the answers of some rows."""
    folder = tmp_path_factory.mktemp("learnt")
    few = folder / "few.jsonl"
    few.write_text("".join(f"{line}\n" for line in rows.read_text().splitlines()[:4]))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        module = MultiModalLitModule(
            LanguageModel(str(tiny_llm), tune=Tune(mode="full", lr=1e-2)),
            HFVisionEncoder(str(tiny_clip), layer=-2),
            MLPProjector(),
            generation=Generation(max_new_tokens=12),
        )
        data = make_data(module, few, media_root=str(rows.parent), batch_size=4)
        make_trainer(folder, max_epochs=20).fit(module, data)
    return module.eval()


def chosen(module: MultiModalLitModule, data: ImageDataModule, row: int) -> str | None:
    """The choice that greedy decoding gives which may only go on as one of the choices does; None: an open row."""
    dataset = data.dataset("test")
    sample = dataset.sample(row)
    if not sample.choices:
        return None
    prompt = examples(data, generate=True)[row]
    tokenizer = module.processor.tokenizer
    left = {choice: [*tokenizer(choice).input_ids, module.processor.eos_ids[0]] for choice in sample.choices}
    while len(left) > 1:
        with torch.no_grad():
            hidden_BTD = module.model(data.collate([prompt], generate=True))
            logits_V = module.model.language_model.head(hidden_BTD[0, -1])
        allowed = {ids[0] for ids in left.values()}
        best = max(allowed, key=lambda token: float(logits_V[token]))
        left = {choice: ids[1:] for choice, ids in left.items() if ids[0] == best}
        prompt.tokens.append(best)
    return next(iter(left))


class TestEvaluation:
    def test_is_what_rows_one_by_one_say(self, learnt: MultiModalLitModule, rows: Path, tmp_path: Path) -> None:
        data = make_data(learnt, rows, eval_batch_size=3)  # batches of 3, 3 and 1 rows
        (metrics,) = make_trainer(tmp_path).test(learnt, data, verbose=False)

        scores = [learnt.score(batch) for batch in batches(data)]
        nll, count = sum(float(s.nll_B) for s in scores), sum(int(s.count_B) for s in scores)
        assert metrics["test/loss"] == pytest.approx(nll / count, rel=1e-5)

        answers = [learnt.generate(batch)[0] for batch in batches(data, generate=True)]
        references = [example.reference for example in examples(data)]
        exact = [answer == reference for answer, reference in zip(answers, references, strict=True)]
        assert 0 < sum(exact) < len(exact)
        assert metrics["test/exact_match"] == pytest.approx(sum(exact) / len(exact))

        closed = [(chosen(learnt, data, row), reference) for row, reference in enumerate(references) if reference in COLOURS]
        right = [choice == reference for choice, reference in closed]
        assert 1 < len(right) < len(references)
        assert metrics["test/accuracy"] == pytest.approx(sum(right) / len(right))

    def test_media_gain_is_the_loss_with_the_pictures_swapped(
        self, learnt: MultiModalLitModule, rows: Path, tmp_path: Path
    ) -> None:
        data = make_data(learnt, rows, eval_batch_size=2)
        swapped, right = examples(data), batches(data)
        for first, second in ((0, 1), (2, 3)):  # rows 4 and 6 have no partner with a picture, but row 5 is beside row 4
            swapped[first].media, swapped[second].media = swapped[second].media, swapped[first].media
        before = [learnt.score(batch) for batch in right[:4]]
        after = [learnt.score(data.collate([example])) for example in swapped[:4]]
        count = sum(int(s.count_B) for s in before)
        expected = sum(float(a.nll_B) - float(b.nll_B) for a, b in zip(after, before, strict=True)) / count
        (metrics,) = make_trainer(tmp_path).test(learnt, data, verbose=False)
        assert abs(expected) > 1e-3
        assert metrics["test/media_gain"] == pytest.approx(expected, rel=1e-3)

    def test_a_model_that_ignores_pictures_gains_nothing(self, learnt: MultiModalLitModule, rows: Path, tmp_path: Path) -> None:
        parameters = list(learnt.model.image_projector.parameters())
        kept = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            torch._foreach_zero_(parameters)
            (metrics,) = make_trainer(tmp_path).test(learnt, make_data(learnt, rows), verbose=False)
            torch._foreach_copy_(parameters, kept)
        assert metrics["test/media_gain"] == 0

    def test_what_there_is_none_of_is_not_logged(self, learnt: MultiModalLitModule, tmp_path: Path) -> None:
        open_rows = write_rows(tmp_path / "open.jsonl", 1, answers=["It is a bus."])
        (metrics,) = make_trainer(tmp_path).test(learnt, make_data(learnt, open_rows), verbose=False)
        assert metrics.keys() == {"test/loss", "test/exact_match"}

    def test_rows_that_are_skipped_do_not_count(self, learnt: MultiModalLitModule, rows: Path, tmp_path: Path) -> None:
        lines = rows.read_text().splitlines()
        mixed = tmp_path / "mixed.jsonl"
        mixed.write_text("\n".join(lines[:3] + ['{"messages": []}'] * 3) + "\n")  # the second batch is empty
        few = tmp_path / "few.jsonl"
        few.write_text("\n".join(lines[:3]) + "\n")
        options = {"media_root": str(rows.parent), "max_skipped": 0.9, "eval_batch_size": 3}
        trainer = make_trainer(tmp_path)
        (expected,) = trainer.test(learnt, make_data(learnt, few, **options), verbose=False)
        (metrics,) = trainer.test(learnt, make_data(learnt, mixed, **options), verbose=False)
        assert metrics == expected
        with pytest.raises(RowError):
            make_data(learnt, mixed, **options).dataset("test")[3]

    def test_predictions_name_their_rows(self, learnt: MultiModalLitModule, rows: Path, tmp_path: Path) -> None:
        predicted = make_trainer(tmp_path).predict(learnt, make_data(learnt, rows, eval_batch_size=3))
        assert predicted is not None
        found = [row for batch in predicted for row in batch]
        assert [row["line"] for row in found] == [1, 2, 3, 4, 5, 6, 7]
        alone = [learnt.generate(batch)[0] for batch in batches(make_data(learnt, rows), generate=True)]
        assert [row["response"] for row in found] == alone
        assert found[0]["reference"] == "red" and "picture 0" in found[0]["prompt"]
