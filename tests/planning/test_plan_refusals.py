"""What training refuses is refused by the same checks, and what cannot be run on shapes alone is named."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datamodules.batch import Batch
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.multimodal import MultiModalLitModule, Stage
from models.language import LanguageModel
from models.pretrained import PretrainedMLLM
from planning.outline import make_outline
from planning.placement import Placement, check_placement
from planning.precision import precision_of
from planning.step import run_step
from tests.lightning_modules.run_fakes import make_data, write_rows

ModelFolder = Callable[[str], Path]
SPLIT = Placement(split=2)


@pytest.mark.parametrize(
    ("family", "split", "why"),
    [
        ("llama", 3, "3 does not divide the 4 num_attention_heads"),
        ("llama", 4, "4 does not divide the 2 num_key_value_heads"),
        ("gptj", 2, r"\(gptj\) cannot be split across devices: transformers has no plan"),
    ],
)
def test_layers_that_cannot_be_split(model_folder: ModelFolder, family: str, split: int, why: str) -> None:
    module = MultiModalLitModule(LanguageModel(str(model_folder(family)), tune=Tune(mode="full")))
    with pytest.raises(ValueError, match=why):
        make_outline(module, split=split)


def test_dora_beside_split_layers(tiny_llm: Path) -> None:
    tune = Tune(mode="lora", lora=LoRA(use_dora=True))
    outline = make_outline(MultiModalLitModule(LanguageModel(str(tiny_llm), tune=tune)))
    check_placement(outline, Placement(2, has_buckets=True))
    with pytest.raises(ValueError, match=r"self_attn\.q_proj has DoRA adapters"):
        check_placement(outline, SPLIT)


@pytest.mark.parametrize("option", ["fused", "foreach"])
def test_optimizers_that_take_all_weights_at_a_time(tiny_llm: Path, option: str) -> None:
    optimizer = partial(torch.optim.AdamW, lr=1e-3, **{option: True})
    module = MultiModalLitModule(LanguageModel(str(tiny_llm), tune=Tune(mode="full")), optimizer=optimizer)
    outline = make_outline(module)
    check_placement(outline, Placement(2, is_sharded=True))
    with pytest.raises(ValueError, match=rf"^model\.optimizer\.{option} is true.*tensor_parallel_size 2 some are split"):
        check_placement(outline, SPLIT)


@pytest.mark.parametrize("placement", [SPLIT, Placement(2, is_sharded=True), Placement(2, is_sharded=True, flat="FULL_SHARD")])
def test_optimizers_that_look_at_more_than_a_share(tiny_llm: Path, placement: Placement) -> None:
    module = MultiModalLitModule(LanguageModel(str(tiny_llm), tune=Tune(mode="full")), optimizer=torch.optim.Adafactor)
    outline = make_outline(module)
    check_placement(outline, Placement(2, has_buckets=True))
    with pytest.raises(ValueError, match=r"^model\.optimizer is \S+\.Adafactor, which looks at more"):
        check_placement(outline, placement)


def test_a_scaler_beside_split_layers(tiny_llm: Path) -> None:
    outline = make_outline(MultiModalLitModule(LanguageModel(str(tiny_llm), tune=Tune(mode="full"))))
    check_placement(outline, SPLIT, precision_of("bf16-mixed"))
    with pytest.raises(ValueError, match=r"^trainer\.precision is 16-mixed, whose scaler"):
        check_placement(outline, SPLIT, precision_of("16-mixed"))


def test_two_narrow_types(tiny_llm: Path) -> None:
    module = MultiModalLitModule(LanguageModel(str(tiny_llm), dtype="bfloat16"))
    make_outline(module, precision_of("bf16-mixed"))
    with pytest.raises(ValueError, match=r"language_model has weights of bfloat16, and trainer\.precision is 16-mixed"):
        make_outline(module, precision_of("16-mixed"))


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
def test_what_a_device_has_of_split_layers(model_folder: ModelFolder, family: str) -> None:
    """Half of the heads and of their biases, and of the feed-forward layer; adapters are split on the same side."""
    kind = PretrainedMLLM if family == "qwen2_5_vl" else LanguageModel
    tune = Tune(mode="lora", lora=LoRA(r=3, target_modules=("q_proj", "down_proj")))
    outline = make_outline(MultiModalLitModule(kind(name_or_path=str(model_folder(family)), tune=tune)), split=2)
    layer = outline.module.model.language_model.decoder_layers[0]
    sizes = {name: tuple(weight.shape) for name, weight in layer.named_parameters()}
    assert sizes["self_attn.q_proj.base_layer.weight"] == (16, 32) and sizes["self_attn.q_proj.base_layer.bias"] == (16,)
    assert sizes["self_attn.k_proj.weight"] == (8, 32) and sizes["self_attn.k_proj.bias"] == (8,)
    assert sizes["self_attn.o_proj.weight"] == (32, 16) and sizes["mlp.gate_proj.weight"] == (32, 32)
    assert sizes["self_attn.q_proj.lora_A.default.weight"] == (3, 32)
    assert sizes["self_attn.q_proj.lora_B.default.weight"] == (16, 3)
    assert sizes["mlp.down_proj.base_layer.weight"] == (32, 32)
    assert sizes["mlp.down_proj.lora_A.default.weight"] == (3, 32)
    assert sizes["mlp.down_proj.lora_B.default.weight"] == (32, 3)
    assert sizes["input_layernorm.weight"] == (32,)


class Scaled(HFVisionEncoder):
    """One whose features depend on a number that it reads off its pixels."""

    def forward(self, media: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        largest = float(media.abs().max())
        features_BND, mask_BN = super().forward(media, mask)
        return features_BND / largest, mask_BN


def test_a_part_that_reads_a_number_is_named(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    encoder = Scaled(str(tiny_clip), layer=-2)
    module = MultiModalLitModule(LanguageModel(str(tiny_llm)), image_encoder=encoder, image_projector=MLPProjector())
    dataset = make_data(module, write_rows(tmp_path / "rows.jsonl", 2)).dataset("train")
    batch = make_data(module, tmp_path / "rows.jsonl").collate([dataset[0], dataset[1]])
    where = r"test_plan_refusals\.py:\d+ \(`largest = float\(media\.abs\(\)\.max\(\)\)`\), in the activations of image_encoder"
    with pytest.raises(ValueError, match=rf"^plan runs a step on tensors without values, which stops at \S*{where}"):
        run_step(make_outline(module), batch, precision_of("32-true"))


class Detached(MultiModalLitModule):
    """One whose loss nothing leads back from."""

    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        total = super().step(batch, stage)
        assert total is not None
        return total[0].detach(), total[1]


def test_a_backward_pass_that_cannot_be_is_said(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    module = Detached(LanguageModel(str(tiny_llm)), HFVisionEncoder(str(tiny_clip), layer=-2), MLPProjector())
    batch = make_data(module, write_rows(tmp_path / "rows.jsonl", 2)).collate(
        [make_data(module, tmp_path / "rows.jsonl").dataset("train")[0]]
    )
    with pytest.raises(ValueError, match=r"which stops: .*does not require grad.* If a fit does not stop"):
        run_step(make_outline(module), batch, precision_of("32-true"))
