"""Ready models part by part: what trains, in which type, what a checkpoint holds, and which media rows may exchange."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.batch import Batch
from datamodules.collate import collate
from datamodules.prompt_options import PromptOptions
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.first_step import problem_of_gradients
from lightning_modules.idle_parts import idle_parts
from lightning_modules.losses import cross_entropy, supervised
from lightning_modules.optim import parameter_groups
from lightning_modules.processors import make_processor
from models.checkpoint import check_options, fingerprints, load_saved, saved_names
from models.media_shuffle import rows_with_other_media, shuffle_media
from models.multimodal import MultiModalModel
from models.pretrained import PretrainedMLLM
from tests.conftest import randomise_adapters
from tests.mllm_rows import Row, example_of, rows_of
from tests.tiny_mllm import FAMILIES

FULL, FROZEN, ADAPTED = Tune(mode="full", lr=1e-3), Tune(mode="frozen"), Tune(mode="lora")
QKV = Tune(mode="lora", lr=2e-4, lora=LoRA(r=2, target_modules=("qkv", "attn.proj")))

Make = Callable[..., MultiModalModel]


@pytest.fixture
def make(model_folder: Callable[[str], Path]) -> Make:
    """`make(family, **options)`: a built model, its adapters drawn at random."""

    def model(family: str, **options: Any) -> MultiModalModel:
        built = MultiModalModel(PretrainedMLLM(name_or_path=str(model_folder(family)), **options))
        with torch.random.fork_rng():
            torch.manual_seed(5)
            built.build(make_processor(built, PromptOptions()).chat.media_ids)
            randomise_adapters(built)
        return built

    return model


def batch_of(model: MultiModalModel, rows: list[Row]) -> Batch:
    processor = make_processor(model, PromptOptions())
    return collate([example_of(row, processor, number) for number, row in enumerate(rows)], processor.pad_id)


def loss_of(model: MultiModalModel, batch: Batch) -> torch.Tensor:
    hidden_SD, labels_S = supervised(model(batch), batch["labels_BT"])
    total, count, _ = cross_entropy(hidden_SD, model.language_model.head, labels_S)
    return total / count


def training(model: MultiModalModel) -> dict[str, int]:
    """How many parameters of each part train."""
    parts = model.parts().items()
    return {name: sum(1 for _, p in part.own_named_parameters() if p.requires_grad) for name, part in parts}


def test_by_default_adapters_of_the_language_part_train_and_nothing_else(make: Make) -> None:
    assert training(make("qwen2_5_vl")) == {
        "language_model": 8,  # A and B of two projections in two layers
        "language_model.model.model.visual": 0,
        "language_model.model.model.visual.merger": 0,
        "fusion": 0,
    }
    llava = make("llava")  # whose tower has layers of the same names
    assert training(llava) == {
        "language_model": 8,
        "language_model.model.model.vision_tower": 0,
        "language_model.model.model.multi_modal_projector": 0,
        "fusion": 0,
    }
    assert all(".language_model." in name for name, p in llava.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("language", [FULL, ADAPTED, FROZEN], ids=lambda tune: tune.mode)
def test_each_part_that_trains_gets_a_gradient_and_no_other(family: str, language: Tune, make: Make) -> None:
    tower = {"audio_tune": FULL} if family == "qwen2_audio" else {"vision_tune": FULL}
    model = make(family, tune=language, projector_tune=FULL, **tower)
    batch = batch_of(model, rows_of(family))
    model.train()
    loss_of(model, batch).backward()
    parts = model.parts()
    assert problem_of_gradients(parts, batch) == ""
    assert {name for name, number in training(model).items() if number} == {
        name for name, part in parts.items() if part.tune.mode != "frozen"
    }
    groups = {group["name"]: group for group in parameter_groups(parts)}
    assert {name.removesuffix("/no_decay") for name in groups} == {n for n, part in parts.items() if part.tune.mode != "frozen"}
    assert all(group["lr"] == 1e-3 for name, group in groups.items() if name.count("."))


def test_towers_can_be_adapted_and_what_is_inside_of_them_is_left_out(make: Make) -> None:
    model = make(
        "qwen3_vl", tune=FROZEN, vision_tune=QKV, projector_tune=Tune(mode="lora", lora=LoRA(target_modules=("linear_fc1",)))
    )
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(("blocks." in name and ("qkv" in name or "attn.proj" in name)) or "linear_fc1.lora" in name for name in names)
    assert not any("linear_fc1" in name and "blocks." in name for name in names)
    assert {"merger.linear_fc1", "deepstack_merger_list.0.linear_fc1", "blocks.1.attn.qkv"} <= {
        name.split(".visual.")[1].split(".lora")[0] for name in names
    }
    loss_of(model, batch := batch_of(model, rows_of("qwen3_vl"))).backward()
    assert problem_of_gradients(model.parts(), batch) == ""
    with pytest.raises(ValueError, match=r"visual: lora.target_modules names 'q_proj'.*attn|qkv"):
        make("qwen2_5_vl", vision_tune=ADAPTED)


def test_layers_of_a_tower_that_nobody_reads_do_not_train(make: Make) -> None:
    model = make("llava", vision_tune=FULL)
    tower = dict(model.parts()["language_model.model.model.vision_tower"].named_parameters())
    assert not any(p.requires_grad for name, p in tower.items() if "layers.2." in name or "post_layernorm" in name)
    assert all(p.requires_grad for name, p in tower.items() if "layers.1." in name or "embeddings" in name)


def test_what_trains_is_wide_and_the_rest_is_narrow(make: Make) -> None:
    model = make("qwen2_5_vl", dtype="bfloat16", vision_tune=FULL)
    types = {name: {p.dtype for _, p in part.own_named_parameters()} for name, part in model.parts().items()}
    assert types["language_model.model.model.visual"] == {torch.float32}
    assert types["language_model.model.model.visual.merger"] == {torch.bfloat16}
    assert types["language_model"] == {torch.bfloat16, torch.float32}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert all(b.dtype != torch.bfloat16 for b in model.buffers())  # rotary frequencies
    loss = loss_of(model, batch := batch_of(model, rows_of("qwen2_5_vl")))
    loss.backward()
    assert problem_of_gradients(model.parts(), batch) == ""
    wide = loss_of(make("qwen2_5_vl", vision_tune=FULL), batch)
    torch.testing.assert_close(loss, wide, rtol=3e-2, atol=3e-2)


def test_what_is_frozen_stays_in_evaluation_mode(make: Make) -> None:
    model = make("llava", tune=FROZEN, vision_tune=FULL).train()
    base = model.language_model.model.base_model
    assert base.vision_tower.training and not base.language_model.training and not base.multi_modal_projector.training
    model.eval()
    assert not any(module.training for module in model.language_model.model.modules())


def test_gradients_flow_to_pixels_and_a_tower_is_idle_without_its_media(make: Make) -> None:
    model = make("qwen2_5_vl", vision_tune=FULL)
    batch = batch_of(model, rows_of("qwen2_5_vl"))
    for inputs in batch["image"]["inputs"].values():
        inputs["pixel_values"].requires_grad_()
    loss_of(model, batch).backward()
    assert all(inputs["pixel_values"].grad.abs().max() > 0 for inputs in batch["image"]["inputs"].values())
    text = batch_of(model, [rows_of("qwen2_5_vl")[1]])
    idle = idle_parts(model, text)
    views = [part for name, part in model.parts().items() if "visual" in name]
    assert [part for part in idle if part in views] == views and not any(part in idle_parts(model, batch) for part in views)
    model.zero_grad()
    loss_of(model, text).backward()
    assert problem_of_gradients(model.parts(), text) == ""


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_audio"])
def test_a_checkpoint_holds_what_trains_and_knows_the_rest(family: str, make: Make) -> None:
    options = {"projector_tune": FULL, "tune": Tune(mode="lora", lr=1e-4)}
    model = make(family, **options)
    names = saved_names(model)
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in names}
    prints = fingerprints(model, names)
    assert set(prints) == set(model.parts())
    copy = MultiModalModel.from_spec(model.spec())
    copy.build(model.media_token_ids)
    load_saved(copy, state, prints)
    batch = batch_of(model, rows_of(family))
    torch.testing.assert_close(copy.eval()(batch), model.eval()(batch), rtol=0, atol=0)
    with torch.no_grad():
        tower = list(model.parts())[1]
        next(model.parts()[tower].parameters()).add_(1)
    with pytest.raises(ValueError, match=f"frozen weights of {tower} are not those"):
        load_saved(model, state, prints)


def test_options_that_change_what_weights_compute_are_compared_and_rates_are_not(make: Make) -> None:
    spec = {"language_model": make("qwen2_5_vl", vision_tune=QKV).language_model.spec()}
    faster = {"language_model": make("qwen2_5_vl", vision_tune=Tune("lora", lr=9.0, lora=QKV.lora)).language_model.spec()}
    check_options(faster, spec)
    wider = {
        "language_model": make(
            "qwen2_5_vl", vision_tune=Tune("lora", lora=LoRA(r=4, target_modules=("qkv", "attn.proj")))
        ).language_model.spec()
    }
    with pytest.raises(ValueError, match="language_model.vision_tune.lora.r = 2, but here it is 4"):
        check_options(wider, spec)
    check_options({"language_model": make("qwen2_5_vl").language_model.spec()}, spec)  # without adapters their rank is nothing


def test_rows_exchange_media_only_where_their_grids_are_alike(make: Make) -> None:
    model = make("qwen2_5_vl").eval()

    def row(*names: str, answer: str = "A dog.") -> Row:
        return [("user", [*(("image", name) for name in names), "What?"]), ("assistant", [answer])]

    batch = batch_of(model, [row("60x80"), row("61x81"), row("80x60"), row("60x80"), [("user", ["Why?"]), ("assistant", ["A."])]])
    grids = [inputs["image_grid_thw"].tolist() for inputs in batch["image"]["inputs"].values()]
    assert grids == [[[1, 4, 6]], [[1, 4, 6]], [[1, 6, 4]]]
    shuffled = shuffle_media(batch)
    assert shuffled is not None
    moved_B = rows_with_other_media(batch, shuffled, "image")
    assert moved_B.tolist() == [True, True, False, True, False]
    direct = batch_of(
        model, [row("61x81"), row("60x80"), row("80x60"), row("61x81"), [("user", ["Why?"]), ("assistant", ["A."])]]
    )
    torch.testing.assert_close(model(shuffled), model(direct), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(shuffled)[0], model(batch)[0], atol=1e-3)
    assert model.modalities == ("image", "video") and model.encode(batch) == {}


def test_what_cannot_be_is_refused(model_folder: Callable[[str], Path], make: Make, tiny_llm: Path, tiny_clip: Path) -> None:
    with pytest.raises(
        ValueError, match="audio_tune is to train something.*has no tower for audio media.*visual, language_model"
    ):
        make("qwen2_5_vl", audio_tune=FULL)
    with pytest.raises(ValueError, match="projector_tune is to train something.*no projector of its own"):
        make("qwen2_5_vl", projector_tune=FULL, projector_modules=("bridge",))
    with pytest.raises(ValueError, match="reads media itself: leave model.image_encoder"):
        MultiModalModel(PretrainedMLLM(name_or_path=str(model_folder("llava"))), HFVisionEncoder(str(tiny_clip)), MLPProjector())
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        PretrainedMLLM(name_or_path=str(tiny_llm)).build()
