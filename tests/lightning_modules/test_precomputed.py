"""Log-probabilities that are kept: equal to those of the live reference, shared by runs, and refused when they are stale."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from datamodules.batch import Batch
from encoders.tuning import LoRA, Tune
from lightning_modules.logp_store import LogpStore
from lightning_modules.precomputed import PrecomputedReference
from lightning_modules.references import AdapterOff, FrozenCopy, Reference
from models.multimodal import MultiModalModel
from tests.conftest import randomise_adapters
from tests.lightning_modules.answer_batches import pair_batch
from tests.lightning_modules.test_references import FROZEN, WARM, logps, train

MakeModel = Callable[..., MultiModalModel]
MakeBatch = Callable[..., Batch]


def prepared(folder: Path, model: MultiModalModel, **options: Any) -> PrecomputedReference:
    reference = PrecomputedReference(str(folder), **options)
    reference.prepare(model, WARM, "processing")
    return reference


@pytest.mark.parametrize("of", [AdapterOff, FrozenCopy])
def test_they_are_those_of_the_live_reference(
    of: type[Reference], make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path
) -> None:
    options = {"projector_tune": FROZEN} if of is AdapterOff else {}
    model, batch, live = make_model(**options), pair_batch(make_batch, num_pairs=3), of()
    live.prepare(model, WARM, "")
    expected = logps(live, model, batch)
    first = prepared(tmp_path, model, of=of())
    assert torch.equal(logps(first, model, batch), expected)
    train(model, batch)  # the next epoch, and the next run of a sweep, begin with a policy that moves
    assert torch.equal(logps(first, model, batch), expected)
    first.flush()
    assert (first.num_read, first.num_computed) == (6, 6)

    later = prepared(tmp_path, make_model(**options), of=of(), compute_missing=False)
    assert torch.equal(logps(later, make_model(**options), batch), expected)
    assert (later.num_read, later.num_computed) == (6, 0)


def test_what_is_read_needs_no_pass(make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path) -> None:
    model = make_model(projector_tune=FROZEN)
    first, second = pair_batch(make_batch, 3, seed=1), pair_batch(make_batch, 2, seed=2)
    reference = prepared(tmp_path, model)
    passes: list[int] = []
    model.language_model.model.base_model.register_forward_hook(lambda *_: passes.append(1))
    expected = [logps(reference, model, batch) for batch in (first, second)]
    assert len(passes) == 2
    assert all(
        torch.equal(logps(reference, model, batch), logps_S) for batch, logps_S in zip((first, second), expected, strict=True)
    )
    assert len(passes) == 2


def test_rows_in_other_company_find_theirs(make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path) -> None:
    model, batch = make_model(projector_tune=FROZEN), pair_batch(make_batch, num_pairs=2)
    reference = prepared(tmp_path, model)
    logps_S = logps(reference, model, batch)
    turned = pair_batch(make_batch, num_pairs=2)
    turned["answers"]["keys"] = ["f0", *batch["answers"]["keys"][1:]]
    assert torch.allclose(logps(reference, model, turned), logps_S, atol=1e-6)
    assert (reference.num_read, reference.num_computed) == (3, 5)


def test_the_files_hold_the_tokens_of_each_answer(make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path) -> None:
    model, batch = make_model(projector_tune=FROZEN), pair_batch(make_batch, num_pairs=1)
    reference = prepared(tmp_path, model)
    logps_S = logps(reference, model, batch)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.json"]
    reference.flush()
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        kept = [file.get_tensor(key) for key in batch["answers"]["keys"]]
    assert [len(x) for x in kept] == [3, 5] and torch.equal(torch.cat(kept), logps_S)
    reference.flush()  # nothing new
    assert len(list(tmp_path.iterdir())) == 2


CHANGES: dict[str, tuple[Callable[[MultiModalModel], Any], str]] = {
    "weights": (lambda model: _double(model.language_model.model.get_input_embeddings().weight), "the weights of language_model"),
    "projector": (lambda model: _double(model.image_projector.linear_1.weight), "the weights of image_projector"),
    "adapters": (lambda model: randomise_adapters(model), "the adapters"),
}


def _double(weight: Tensor) -> None:
    weight.data *= 2


@pytest.mark.parametrize("change", CHANGES)
def test_another_reference_is_refused(change: str, make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path) -> None:
    batch, model = pair_batch(make_batch), make_model()
    logps(prepared(tmp_path, model), model, batch)
    changed = make_model()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        CHANGES[change][0](changed)
    other = prepared(tmp_path, changed)
    with pytest.raises(ValueError, match=f"are stale.*another value of {CHANGES[change][1]}\\."):
        logps(other, changed, batch)


def test_other_preprocessing_and_precision_are_refused(make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path) -> None:
    batch, model = pair_batch(make_batch), make_model()
    logps(prepared(tmp_path, model), model, batch)
    other = PrecomputedReference(str(tmp_path))
    other.prepare(model, WARM, "other processing")
    with pytest.raises(ValueError, match="another value of the chat template"):
        logps(other, model, batch)
    narrow = prepared(tmp_path, model)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="another value of the precision"):
        logps(narrow, model, batch)


def test_adapters_that_add_nothing_do_not_count(make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path) -> None:
    """Two runs of a sweep over the rank, each with its own random A, and B = 0."""
    batch = pair_batch(make_batch)
    for seed, rank in ((1, 2), (2, 4)):
        tune = Tune(mode="lora", lora=LoRA(r=rank, target_modules=("q_proj",)))
        model = make_model(tune=tune, seed=seed)
        model.image_projector.load_state_dict(make_model().image_projector.state_dict())
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.zero_()
        logps(prepared(tmp_path, model), model, batch)


def test_an_answer_that_is_not_there_is_named(make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path) -> None:
    model, batch = make_model(), pair_batch(make_batch)
    reference = prepared(tmp_path, model, compute_missing=False)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the chosen answer is not in .*compute_missing is false"):
        logps(reference, model, batch)


def test_an_answer_of_another_length_is_named(make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path) -> None:
    model, batch = make_model(), pair_batch(make_batch)
    reference = prepared(tmp_path, model)
    logps(reference, model, batch)
    batch["answers"]["keys"] = list(reversed(batch["answers"]["keys"]))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the chosen answer has 3 tokens, .* of 4: give another folder"):
        logps(reference, model, batch)


def test_a_resumed_run_goes_on_with_the_same_reference(make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path) -> None:
    batch, model = pair_batch(make_batch), make_model()
    reference = prepared(tmp_path, model)
    before = logps(reference, model, batch)
    saved = reference.saved(model)
    resumed = make_model(seed=9)  # another projector, before the checkpoint's comes
    other = prepared(tmp_path, resumed)
    other.load(resumed, saved)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(logps(other, resumed, batch), before)
    assert other.num_computed == 0
    assert torch.equal(
        logps(other, resumed, pair_batch(make_batch, seed=3)), logps(other.of, resumed, pair_batch(make_batch, seed=3))
    )  # type: ignore[arg-type]


class TestStore:
    def test_another_process_sees_what_was_written(self, tmp_path: Path) -> None:
        one, values = LogpStore(tmp_path / "new/folder", {"a": "1"}), torch.randn(5)
        one.put("k", values.half())
        assert one.get("k") is not None and one.get("other") is None
        assert LogpStore(tmp_path / "new/folder", {"a": "1"}).get("k") is None  # in the first one's memory alone
        one.flush()
        found = LogpStore(tmp_path / "new/folder", {"a": "1"}).get("k")
        assert found is not None and torch.equal(found, values.half().float()) and torch.equal(one.get("k"), found)  # type: ignore[arg-type]

    def test_a_killed_writer_leaves_nothing_that_is_read(self, tmp_path: Path) -> None:
        LogpStore(tmp_path, {})
        (tmp_path / ".5a5a").write_bytes(b"half a file")
        assert LogpStore(tmp_path, {}).get("k") is None

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        store = LogpStore(tmp_path, {})
        store.put("k", torch.randn(100))
        store.flush()
        (path,) = tmp_path.glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(ValueError, match=f"{path.name} is damaged.*delete it"):
            LogpStore(tmp_path, {})

    def test_all_that_differs_is_listed(self, tmp_path: Path) -> None:
        LogpStore(tmp_path, {"a": "1", "b": "2", "c": "3"})
        with pytest.raises(ValueError, match="another value of a and d"):
            LogpStore(tmp_path, {"a": "2", "b": "2", "c": "3", "d": "1"})
        assert json.loads((tmp_path / "reference.json").read_text()) == {"a": "1", "b": "2", "c": "3"}

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="cannot be used"):
            LogpStore(tmp_path / "file", {})


def test_of_a_precomputed_one() -> None:
    with pytest.raises(ValueError, match="itself precomputed"):
        PrecomputedReference("a", of=PrecomputedReference("b"))
