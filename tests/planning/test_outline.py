"""Models without values: their weights as published, and what a step computes and keeps beside one that runs.

Shape suffixes: B rows, T tokens.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from torch.utils.flop_counter import FlopCounterMode

from datamodules.batch import Batch, Example, Origin
from datamodules.collate import collate
from encoders.tuning import LoRA, Tune
from lightning_modules.multimodal import MultiModalLitModule
from models.language import LanguageModel
from planning.allocations import GRADIENTS
from planning.outline import make_outline
from planning.placement import Placement, check_placement, held_bytes, host_bytes, placement_of
from planning.precision import precision_of
from planning.step import STATES, StepCost, run_step
from tests.lightning_modules.run_fakes import make_data, write_rows

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PRECISION = precision_of("32-true")
ATTENTION = {  # two products a head forward, five backward, each of T x T x D; torch's counter does not know them
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, *_, **__: 4 * math.prod(q) * q[2],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, *_, **__: 10 * math.prod(q) * q[2],
}
LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}

SMALL = LLAMA_2_7B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def language_model(folder: Path, tiny_llm: Path, config: dict[str, Any], **options: Any) -> LanguageModel:
    """One of which only the configuration is there, and a tokenizer."""
    for path in tiny_llm.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_bytes((tiny_llm / "chat_template.jinja").read_bytes())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return LanguageModel(str(folder), **options)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_weights_of_llama_2_7b(tmp_path: Path, tiny_llm: Path, quantize: Any) -> None:
    """6,738,415,616 (Touvron et al. 2023, arXiv 2307.09288); adapters: 40 M of rank 16 on all linear layers.

    Of NF4, 6,476,005,376 weights of layers take 4.127 bits (QLoRA, section 3), the rest 16.
    """
    tune = Tune(mode="lora", lora=LoRA(r=16, target_modules=ALL))
    options: dict[str, Any] = {"tune": tune, "dtype": "bfloat16", "quantize": quantize}
    module = MultiModalLitModule(language_model(tmp_path, tiny_llm, LLAMA_2_7B, **options))
    outline = make_outline(module)
    adapters = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert outline.counts() == {"language_model": 6_738_415_616 + adapters}
    assert outline.counts(trainable=True) == {"language_model": adapters}
    in_layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    size = held_bytes(outline, Placement())["language_model"] - 4 * adapters
    if quantize is None:
        assert size == 2 * 6_738_415_616
    else:
        with pytest.raises(ValueError, match=r"224 weights are quantised"):
            check_placement(outline, Placement(2, is_sharded=True))
        assert size == pytest.approx(4.127 / 8 * in_layers + 2 * (6_738_415_616 - in_layers), rel=1e-4)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_operations_of_a_step(mode: Any, make_lit_module: Callable[..., Any], tiny_llm: Path, tmp_path: Path) -> None:
    """Beside torch's own counter on the same step, of rows with pictures, with values."""
    tune = Tune(mode=mode, lora=LoRA(target_modules=ALL))
    module = make_lit_module(language_model=LanguageModel(str(tiny_llm), tune=tune))
    data = make_data(module, write_rows(tmp_path / "rows.jsonl", 4))
    dataset = data.dataset("train")
    batch = data.collate([dataset[row] for row in range(4)])
    cost = run_step(make_outline(module, on_cpu=True), batch, PRECISION, on_cpu=True)
    module.configure_model()
    module.train()
    module.model.features(batch)  # the first time tries out how many pictures may be run together
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        total, _ = module.step(batch, "train")
        total.backward()
    assert cost.flops == counter.get_total_flops()


def test_a_step_in_numbers(tmp_path: Path, tiny_llm: Path) -> None:
    """Gradients and AdamW's moments of all weights in float32, whole or a quarter of them; a head of which chunks exist."""
    module = MultiModalLitModule(language_model(tmp_path, tiny_llm, SMALL, tune=Tune(mode="full")))
    outline = make_outline(module)
    number = 2 * 32000 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert outline.counts(trainable=True).total() == number
    batch = text_batch(num_rows=3, length=400)
    ways = (Placement(), Placement(4, is_sharded=True))
    whole, quarter = (run_step(outline, batch, PRECISION, accumulates=True, placement=way) for way in ways)
    assert whole.at_peak[GRADIENTS] == 4 * number
    assert whole.at_peak[STATES] == pytest.approx(8 * number, rel=1e-3)
    assert quarter.at_peak[STATES] == pytest.approx(2 * number, rel=1e-3)
    assert whole.flops == quarter.flops
    assert held_bytes(outline, Placement())["language_model"] == 4 * number
    assert held_bytes(outline, Placement(4, is_sharded=True))["language_model"] == pytest.approx(number, rel=1e-3)
    assert held_bytes(outline, Placement(4, has_buckets=True))["DDP's buckets"] == 4 * number


@pytest.mark.parametrize("accumulates", [False, True])
def test_shards_in_the_memory_of_the_machine(accumulates: bool, tmp_path: Path, tiny_llm: Path) -> None:
    """A quarter of all weights, gradients and moments; the device has what is gathered, and the gradients of a backward pass."""
    outline = make_outline(MultiModalLitModule(language_model(tmp_path, tiny_llm, SMALL, tune=Tune(mode="full"))))
    number = outline.counts().total()
    here, there = Placement(4, is_sharded=True), Placement(4, is_sharded=True, offload=True)
    assert not held_bytes(outline, there)["language_model"] and host_bytes(outline, there) == number
    assert held_bytes(outline, there)["gathered layers"] == held_bytes(outline, here)["gathered layers"]
    batch = text_batch(num_rows=3, length=400)
    on_device, cost = (run_step(outline, batch, PRECISION, accumulates, placement) for placement in (here, there))
    assert cost.on_host[GRADIENTS] == number and cost.on_host[STATES] == pytest.approx(2 * number, rel=1e-3)
    assert not cost.at_peak[STATES] and not cost.at_peak[GRADIENTS]
    saved = on_device.at_peak[STATES] + on_device.at_peak[GRADIENTS]
    assert on_device.at_peak.total() - cost.at_peak.total() == pytest.approx(saved, rel=0.01) and cost.flops == on_device.flops


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_flat_shards(mode: Any, tmp_path: Path, tiny_llm: Path) -> None:
    """A quarter of the layers, without adapters; all else is whole, with its gradients and states. Two layers are gathered."""
    tune = Tune(mode=mode, lora=LoRA(r=4, target_modules=("q_proj",)))
    outline = make_outline(MultiModalLitModule(language_model(tmp_path, tiny_llm, SMALL, tune=tune)))
    layer, outside, adapters = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64, 2 * 32000 * 64 + 64, 2 * 2 * 4 * 64
    held = 4 * (2 * layer // 4 + outside) + (4 * adapters if mode == "lora" else 0)
    gathered = 4 * (2 * layer) * (2 if mode == "full" else 1)
    for sharding in ("FULL_SHARD", "SHARD_GRAD_OP"):  # of two layers the same
        placement = Placement(4, is_sharded=True, flat=sharding)
        found = held_bytes(outline, placement)
        assert found["language_model"] == held and found["gathered layers"] == gathered
        cost = run_step(outline, text_batch(3, 100), PRECISION, accumulates=True, placement=placement)
        trained = 2 * layer // 4 + outside if mode == "full" else adapters
        assert cost.at_peak[GRADIENTS] == pytest.approx(4 * trained)
        assert cost.at_peak[STATES] == pytest.approx(8 * trained, rel=1e-3 if mode == "full" else 0.02)
        dropped = run_step(outline, text_batch(3, 400), PRECISION, placement=placement)
        assert not dropped.at_peak[GRADIENTS], "those of the step before are gone when the forward pass ends, which is the peak"
        kept = run_step(outline, text_batch(3, 400), PRECISION, placement=Placement(4, is_sharded=True))
        assert kept.at_peak[GRADIENTS]


def test_whether_shards_are_offloaded_is_read() -> None:
    options = Namespace(data_parallel_size="auto", tensor_parallel_size=1, offload=True)
    strategy = Namespace(class_path="lightning_modules.strategies.ShardedStrategy", init_args=options)
    trainer = Namespace(devices=4, num_nodes=1, strategy=strategy)
    assert placement_of(trainer) == Placement(4, is_sharded=True, offload=True)
    options.tensor_parallel_size = 4
    assert placement_of(trainer) == Placement(1, split=4), "there are no shards"


def test_options_of_flat_shards_are_read() -> None:
    strategy = Namespace(class_path="lightning_modules.flat_shards.FlatShardedStrategy", init_args=Namespace())
    trainer = Namespace(devices=4, num_nodes=2, strategy=strategy, precision="bf16-mixed")
    assert placement_of(trainer) == Placement(8, is_sharded=True, flat="FULL_SHARD")
    assert str(placement_of(trainer)) == "FSDP1 over 8"
    strategy.init_args.sharding_strategy = "SHARD_GRAD_OP"
    assert placement_of(trainer) == Placement(8, is_sharded=True, flat="SHARD_GRAD_OP")
    trainer.precision = "16-mixed"
    with pytest.raises(ValueError, match="FlatShardedStrategy takes 32-true and bf16-mixed"):
        placement_of(trainer)


@pytest.mark.slow
def test_7b_on_paper(tmp_path: Path, tiny_llm: Path) -> None:
    """LoRA on Llama-2-7B in bfloat16, activations computed again, one row of 2,048 tokens.

    The peak is at the last layer, which is computed again first: the gradients of the step before have been dropped, and those
    of this step grow by 5 MiB a layer, while 16 MiB of its input are freed. So 14 GiB are, in tensors of 2,048 x 4,096 (16 MiB)
    and 2,048 x 11,008 (43 MiB) of bfloat16: 12.55 GiB of weights; adapters and two moments in float32; the inputs of 32 layers;
    and of one layer, in its feed-forward part, what two norms give, a copy of the input of each of six adapters, rotated queries
    and keys, values, what attention gives, the stream after it, the gradient and its copy; gate, up, what they give, a copy of
    it, and its gradient in float32.
    """
    cost, total = on_a100(tmp_path, tiny_llm, LLAMA_2_7B, 2048, dtype="bfloat16")
    adapters, narrow, wide = 39_976_960, 2 * 2048 * 4096, 2 * 2048 * 11008
    inputs, of_layer = 32 * narrow, (2 + 6 + 2 + 1 + 1 + 1 + 2) * narrow + (4 + 2) * wide
    assert cost.at_peak[STATES] == pytest.approx(2 * 4 * adapters, rel=1e-3)
    assert cost.at_peak[GRADIENTS] < 4 * adapters / 32
    assert sum(cost.at_peak.values()) - cost.at_peak[STATES] == pytest.approx(inputs + of_layer, rel=0.01)
    assert total == pytest.approx(2 * 6_738_415_616 + 3 * 4 * adapters + inputs + of_layer, rel=0.003)
    # a product is made forward, again, and backward for its input; the head's not again; attention's 2 products, 2, and 5
    in_layers, head = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008), 32000 * 4096
    products = 2048 * (6 * in_layers + 8 * adapters + 4 * head) + 32 * 2 * (2 + 2 + 5) * 2048**2 * 4096
    assert cost.flops == pytest.approx(products, rel=0.03)


@pytest.mark.slow
def test_published_figures_of_65b(tmp_path: Path, tiny_llm: Path) -> None:
    """QLoRA (Dettmers et al. 2023, arXiv 2305.14314, abstract) trains LLaMA-65B on one GPU of 48 GB."""
    config = LLAMA_2_7B | {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}
    _, total = on_a100(tmp_path, tiny_llm, config, 512, dtype="bfloat16", quantize="nf4")
    assert 34e9 <= total <= 48e9


@pytest.mark.slow
def test_published_figures_of_70b(tmp_path: Path, tiny_llm: Path) -> None:
    """Llama-2-70B in NF4 with double quantisation: LitGPT has measured 37.21 GB at the peak where it generates (its
    tutorials/resource-tables.md, October 2023), of which the weights are all but a decoded one, of 0.47 GB, and keys and values.
    Its head is quantised, too, which here takes 0.39 GB more. QLoRA on all layers trains on 80 GB with two rows of 2,048 tokens
    (PEFT's documentation of FSDP, of DDP with QLoRA).
    """
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = LLAMA_2_7B | large | {"num_key_value_heads": 8}
    options: dict[str, Any] = {"dtype": "bfloat16", "quantize": "nf4", "tune": Tune(mode="lora", lora=LoRA(r=8))}
    outline = make_outline(MultiModalLitModule(language_model(tmp_path, tiny_llm, config, **options)))
    adapters = 80 * 8 * (2 * 8192 + 8192 + 1024)
    assert outline.counts() == {"language_model": 68_976_648_192 + adapters}
    in_layers = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    size = held_bytes(outline, Placement())["language_model"] - 4 * adapters
    assert size == pytest.approx(4.127 / 8 * in_layers + 2 * (68_976_648_192 - in_layers), rel=1e-4)
    assert size - 0.39e9 + 0.47e9 == pytest.approx(37.21e9, rel=0.03)
    _, total = on_a100(tmp_path, tiny_llm, config, 2048, 2, dtype="bfloat16", quantize="nf4")
    assert size < total <= 80e9


def on_a100(
    folder: Path, tiny_llm: Path, config: dict[str, Any], length: int, num_rows: int = 1, **options: Any
) -> tuple[StepCost, int]:
    """The cost of a step with adapters on all layers, computed again, and all that a device holds."""
    tune = Tune(mode="lora", lora=LoRA(r=16, target_modules=ALL), activation_checkpointing=True)
    precision = precision_of("bf16-mixed")
    outline = make_outline(MultiModalLitModule(language_model(folder, tiny_llm, config, tune=tune, **options)), precision)
    cost = run_step(outline, text_batch(num_rows, length), precision)
    return cost, held_bytes(outline, Placement()).total() + sum(cost.at_peak.values())


def text_batch(num_rows: int, length: int) -> Batch:
    """Rows of random tokens, all supervised but the first."""
    generator = torch.Generator().manual_seed(20)
    rows = [torch.randint(3, 100, (length,), generator=generator).tolist() for _ in range(num_rows)]
    examples = [Example(Origin("rows.jsonl", n + 1), str(n), row, [-100, *row[1:]]) for n, row in enumerate(rows)]
    return collate(examples, pad_id=0)
