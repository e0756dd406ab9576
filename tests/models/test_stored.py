"""Frozen weights in fewer bits: narrow floats compute wide, quantised ones as PEFT and bitsandbytes have them.

Shape suffixes: B rows, T tokens.
"""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encoders.stored import StoredLinear
from encoders.tuning import LoRA, Tune
from lightning_modules.checkpoints import CheckpointFile, RunCheckpoint
from lightning_modules.part_table import _describe
from models.branches import why_no_packs
from models.checkpoint import fingerprints, read_checkpoint
from models.language import LanguageModel
from models.lean import GatedMLP
from models.multimodal import MultiModalModel
from models.stored import num_weights, stored_type
from tests.lightning_modules.run_fakes import make_data, make_trainer, write_rows

pytestmark = pytest.mark.usefixtures("seed")

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
LORA = Tune(mode="lora", lora=LoRA(r=4, target_modules=TARGETS))
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
TOKENS_BT = torch.randint(600, (3, 9), generator=torch.Generator().manual_seed(9))


def built(folder: Path, **options: Any) -> LanguageModel:
    """In training, with adapters that are the same for the same layers, and not 0."""
    model = LanguageModel(str(folder), **({"tune": LORA} | options))
    model.build()
    draw_adapters(model)
    return model.train()


def draw_adapters(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(10)
    adapters = {of_layers(name): parameter for name, parameter in module.named_parameters() if "lora_" in name}
    for _, adapter in sorted(adapters.items()):
        adapter.data.normal_(0, 0.2, generator=generator)


def of_layers(name: str) -> str:
    return name[name.index("layers.") :]


def states_and_gradients(model: LanguageModel) -> tuple[Tensor, dict[str, Tensor]]:
    segments_BT, positions_BT = torch.ones_like(TOKENS_BT), torch.arange(9).expand(3, 9)
    hidden_BTD = model(model.embed(TOKENS_BT), segments_BT, positions_BT)
    (hidden_BTD.float() * torch.randn(hidden_BTD.shape, generator=torch.Generator().manual_seed(11))).sum().backward()
    return hidden_BTD.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_close(own: Any, other: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(own[0], other[0], rtol=tolerance, atol=tolerance)
    assert own[1].keys() == other[1].keys() and own[1]
    for name, gradient in own[1].items():
        scale = float(other[1][name].abs().max())
        torch.testing.assert_close(gradient, other[1][name], rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.fixture
def rounded(tiny_llm: Path, tmp_path: Path) -> Path:
    """The tiny model, its weights rounded to bfloat16, in a file of float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.bfloat16).float()
    model.save_pretrained(tmp_path / "rounded")
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path / "rounded")
    return tmp_path / "rounded"


def test_narrow_weights_compute_in_float32(rounded: Path) -> None:
    narrow = built(rounded, dtype="bfloat16", compute_dtype="float32")
    check_close(states_and_gradients(narrow), states_and_gradients(built(rounded)))
    linear = [p for n, p in narrow.named_parameters() if "proj" in n and "lora_" not in n] + [narrow.head.weight]
    assert {p.dtype for p in linear} == {torch.bfloat16}
    assert {p.dtype for n, p in narrow.named_parameters() if "lora_" in n or "norm" in n} == {torch.float32}


def test_narrow_weights_keep_no_wide_copies(rounded: Path) -> None:
    narrow = built(rounded, dtype="bfloat16", compute_dtype="float32", tune=Tune(mode="frozen"))
    embeddings_BTD = narrow.embed(TOKENS_BT).requires_grad_()
    shapes: list[tuple[torch.dtype, torch.Size]] = []

    def keep(x: Tensor) -> Tensor:
        shapes.append((x.dtype, x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        narrow(embeddings_BTD, torch.ones_like(TOKENS_BT), torch.arange(9).expand(3, 9)).sum()
    weights = {p.shape for n, p in narrow.named_parameters() if "proj" in n}
    assert {dtype for dtype, shape in shapes if shape in weights} == {torch.bfloat16}


def test_under_autocast_narrow_weights_are_plain_ones(rounded: Path) -> None:
    narrow, plain = (built(rounded, dtype="bfloat16", **options) for options in ({"compute_dtype": "float32"}, {}))
    assert sum(isinstance(module, StoredLinear) for module in narrow.modules()) == 15
    x = torch.randn(2, 32)
    layers = [model.decoder_layers[0].self_attn.k_proj for model in (narrow, plain)]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*(layer(x) for layer in layers))


@pytest.fixture
def wide_llm(model_folder: Callable[[str], Path]) -> Path:
    """A Llama as wide as a block of NF4."""
    return model_folder("llama_64")


@needs_bitsandbytes
class TestQuantised:
    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_values_and_gradients_are_those_of_peft(self, wide_llm: Path, kind: Any) -> None:
        """transformers loads, PEFT adapts, by the recipe of their documentation, without our lean blocks."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        own = built(wide_llm, quantize=kind)
        assert sum(isinstance(module, GatedMLP) for module in own.modules()) == 2
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
        config = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else BitsAndBytesConfig(load_in_4bit=True, **nf4)
        base = AutoModelForCausalLM.from_pretrained(wide_llm, quantization_config=config, dtype=torch.float32)
        theirs: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=list(TARGETS)))
        draw_adapters(theirs)
        theirs.train()
        hidden_BTD = theirs.base_model.model.model(input_ids=TOKENS_BT).last_hidden_state
        (hidden_BTD * torch.randn(hidden_BTD.shape, generator=torch.Generator().manual_seed(11))).sum().backward()
        gradients = {of_layers(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
        states, ours = states_and_gradients(own)
        check_close((states, {of_layers(name): gradient for name, gradient in ours.items()}), (hidden_BTD.detach(), gradients))

    def test_nf4_computes_with_the_weights_that_it_decodes_to(self, wide_llm: Path) -> None:
        from bitsandbytes.functional import dequantize_4bit

        quantised, plain = built(wide_llm, quantize="nf4"), built(wide_llm)
        stored, whole = dict(quantised.named_parameters()), dict(plain.named_parameters())
        changed = 0
        for name, weight in stored.items():
            if stored_type(weight) == "nf4":
                decoded = dequantize_4bit(weight.data, weight.quant_state)
                assert 0 < (decoded - whole[name]).norm() < 0.1 * whole[name].norm()
                whole[name].data = decoded
                changed += 1
        assert changed == 14  # seven layers in each block; not the head
        check_close(states_and_gradients(quantised), states_and_gradients(plain))

    def test_nothing_is_left_of_the_file(self, wide_llm: Path) -> None:
        """Linux tells what a process has mapped (proc(5)); one tensor that is a view keeps the whole file."""
        model = built(wide_llm, quantize="nf4")
        file = str((wide_llm / "model.safetensors").resolve())
        assert file not in Path("/proc/self/maps").read_text(encoding="utf-8")
        whole = built(wide_llm)
        assert file in Path("/proc/self/maps").read_text(encoding="utf-8"), "as of a model whose weights are those of the file"
        torch.testing.assert_close(model.head.weight, whole.head.weight, rtol=0, atol=0)

    def test_its_weights_are_counted(self, wide_llm: Path) -> None:
        quantised, plain = built(wide_llm, quantize="nf4"), built(wide_llm)
        rows = [_describe("language_model", part, []) for part in (quantised, plain)]
        assert rows[0]["parameters"] == rows[1]["parameters"] == sum(p.numel() for p in plain.parameters())
        assert rows[0]["trainable"] == rows[1]["trainable"]
        assert rows[0]["dtype"] == "float32 + nf4" and rows[1]["dtype"] == "float32"
        packed = [p for p in quantised.parameters() if stored_type(p) == "nf4"]
        assert sum(p.numel() for p in packed) * 2 == sum(map(num_weights, packed))
        assert _describe("x", built(wide_llm, quantize="int8"), [])["dtype"] == "float32 + int8"

    def test_int8_takes_no_packs_and_it_is_said_why(self, wide_llm: Path) -> None:
        packs = {kind: built(wide_llm, quantize=kind) for kind in ("nf4", "int8")}
        assert packs["nf4"].takes_packs and not packs["int8"].takes_packs
        assert re.search(r"\(in the int8 .* depends on the others of its batch\).*quantize to nf4", why_no_packs(packs["int8"]))

    def test_looking_at_it_in_evaluation_keeps_its_gradients(self, wide_llm: Path) -> None:
        looked, other = built(wide_llm, quantize="nf4"), built(wide_llm, quantize="nf4")
        with torch.no_grad():
            looked.eval()(looked.embed(TOKENS_BT), torch.ones_like(TOKENS_BT), torch.arange(9).expand(3, 9))
        looked.train()
        check_close(states_and_gradients(looked), states_and_gradients(other), 0.0)

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_a_run_that_is_interrupted_ends_the_same_and_its_checkpoint_answers(
        self, wide_llm: Path, make_lit_module: Any, tmp_path: Path, kind: Any
    ) -> None:
        rows = write_rows(tmp_path / "rows.jsonl", 8)

        def fit(name: str, ckpt_path: Path | None = None) -> Any:
            torch.manual_seed(3)
            own = make_lit_module(language_model=LanguageModel(str(wide_llm), quantize=kind, tune=LORA))
            saving = RunCheckpoint(every_n_train_steps=1, save_top_k=-1)
            trainer = make_trainer(tmp_path / name, saving, max_steps=4, plugins=[CheckpointFile()])
            trainer.fit(own, datamodule=make_data(own, rows), ckpt_path=ckpt_path, weights_only=True)
            return own

        whole, resumed = fit("whole"), fit("resumed", tmp_path / "whole/checkpoints/epoch=0-step=2.ckpt")
        ends = [{name: p.detach() for name, p in own.named_parameters() if p.requires_grad} for own in (whole, resumed)]
        assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
        last = tmp_path / "whole/checkpoints/last.ckpt"
        checkpoint = read_checkpoint(last)
        assert not any("base_layer" in name for name in checkpoint["state_dict"])
        model = MultiModalModel.from_checkpoint(last)
        assert fingerprints(model, checkpoint["state_dict"]) == checkpoint["fingerprints"]
        assert model.language_model.quantize == kind

    def test_a_checkpoint_beside_other_bits_is_refused(self, wide_llm: Path, make_lit_module: Any, tmp_path: Path) -> None:
        rows = write_rows(tmp_path / "rows.jsonl", 4)
        own = make_lit_module(language_model=LanguageModel(str(wide_llm), quantize="nf4", tune=LORA))
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.fit(own, datamodule=make_data(own, rows))
        trainer.save_checkpoint(tmp_path / "1.ckpt")
        other = make_lit_module(language_model=LanguageModel(str(wide_llm), tune=LORA))
        with pytest.raises(ValueError, match=r"frozen weights of language_model are not those.*quantised in the same way"):
            make_trainer(tmp_path, max_steps=2).fit(
                other, datamodule=make_data(other, rows), ckpt_path=tmp_path / "1.ckpt", weights_only=True
            )

    def test_of_a_ready_model_the_language_part_alone_is_quantised(self, model_folder: Callable[[str], Path]) -> None:
        from models.pretrained import PretrainedMLLM

        tower = Tune(mode="lora", lora=LoRA(target_modules=("qkv",)))
        model = PretrainedMLLM(name_or_path=str(model_folder("qwen2_5_vl")), quantize="int8", tune=LORA, vision_tune=tower)
        model.build()
        packed = {name for name, p in model.named_parameters() if stored_type(p) == "int8"}
        assert len(packed) == 7 * model.config.get_text_config().num_hidden_layers
        assert not any("visual" in name or "lm_head" in name for name in packed)

    def test_what_a_cpu_decodes_wrongly_is_refused(self, tiny_llm: Path) -> None:
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is 32 wide.*multiples of 64.*take int8"):
            LanguageModel(str(tiny_llm), quantize="nf4").build()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tune": Tune(mode="full")}, r"tune\.mode full would train them"),
        ({"tune": Tune(mode="lora", lora=LoRA(init="pissa"))}, r"tune\.lora\.init pissa changes them"),
        ({"pretrained": False}, "pretrained false draws them"),
    ],
)
def test_what_cannot_be_quantised_is_refused(tiny_llm: Path, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=f"quantize nf4 stores frozen weights in fewer bits, but {match}"):
        LanguageModel(str(tiny_llm), quantize="nf4", **options)


def test_without_bitsandbytes_it_says_what_to_install(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'bitsandbytes>=0\.50,<0\.51'"):
        LanguageModel(str(tiny_llm), quantize="nf4").build()


def test_a_ready_model_with_a_part_that_trains_in_full_computes_in_one_type() -> None:
    from models.pretrained import PretrainedMLLM

    with pytest.raises(ValueError, match="compute_dtype is for frozen weights"):
        PretrainedMLLM(name_or_path="x", dtype="bfloat16", compute_dtype="float32", projector_tune=Tune(mode="full"))
