"""What ZeRO keeps of gradients and of the optimizer's state: by hand, and beside what DeepSpeed's engine has."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from torch import nn

from encoders.tuning import LoRA, Tune
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.optim import parameter_groups
from models.language import LanguageModel
from planning.allocations import GRADIENTS
from planning.devices import find_device
from planning.gradients import STATES, UPDATE
from planning.outline import make_outline
from planning.placement import Placement, held_bytes, host_bytes, placement_of
from planning.precision import precision_of
from planning.run import Run, plan_run
from planning.step import run_step
from planning.zero import BUCKETS, GATHERED, MASTERS, Shares, Zero, gathered
from tests.lightning_modules.processes import in_two_processes, zero
from tests.lightning_modules.run_fakes import Watch, make_data, make_trainer, write_rows
from tests.planning.test_outline import SMALL, language_model, text_batch

PRECISION = precision_of("32-true")
LAYER = 4 * 64 * 64 + 3 * 64 * 128
MATRICES, NORMS = 2 * 32000 * 64 + 2 * LAYER, 5 * 64


def weights(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(size)) for size in sizes]


def test_shares_of_stage_2() -> None:
    """Two rows, of 19 and 5, cut in three of 8 (the last one with 5 more) and of 2, of which each must be even."""
    first, second = weights(5, 10, 4), weights(3, 2)
    shares = Shares([first, second], 3, stage=2)
    assert shares.sizes == [8, 2]
    assert [shares.places[weight] for weight in first] == [[(0, 5)], [(0, 3), (1, 7)], [(1, 1), (2, 3)]]
    assert [shares.places[weight] for weight in second] == [[(0, 2), (1, 1)], [(1, 1), (2, 1)]]
    assert (shares.rank, shares.whole, shares.longest) == (1, 10 + 4 + 3 + 2, 7)
    assert shares.copied([first[0]], 100) == 0, "the bucket is that of one rank: it is summed up in place"
    assert shares.copied([first[2], first[1]], 100) == 14
    assert shares.copied([first[2], first[1]], 3) == 10, "1 and 3 are more than 3; then 3 are not, but 3 and 7"


def test_shares_of_stage_3() -> None:
    """Each weight is cut for itself, in parts of one size."""
    first, second = weights(5, 10), weights(4)
    shares = Shares([first, second], 3, stage=3)
    assert shares.sizes == [2 + 4, 2] and shares.whole == 8
    assert shares.own(first[1]) == shares.longest == 4


def test_gathered_layers() -> None:
    """All layers where they are small; of 7B one, its copy, and of the next one 5e7 elements and a matrix."""
    small, of_7b = [(1000, 4000), (10, 40)], 4 * [(4096**2, 2 * 4096**2)] + 3 * [(4096 * 11008, 2 * 4096 * 11008)]
    elements = sum(number for number, _ in of_7b)
    assert gathered([small] * 8) == 8 * 4040
    assert gathered([[(40_000_000, 80_000_000)]] * 50) == 2 * 1_000_000_000, "no more than 1e9 elements"
    ahead = 2 * (50_000_000 + 4096 * 11008)
    assert gathered([of_7b] * 32) == gathered([of_7b] * 32, kept=10) == 2 * 2 * elements + ahead
    assert gathered([of_7b] * 32, kept=2 * 32 * elements) == 2 * 33 * elements + ahead


@pytest.fixture
def small(tmp_path: Path, tiny_llm: Path) -> MultiModalLitModule:
    """A language model of 4 million weights, all of which train, in two groups."""
    return MultiModalLitModule(language_model(tmp_path, tiny_llm, SMALL, tune=Tune(mode="full")))


def test_a_step_of_stage_2(small: MultiModalLitModule) -> None:
    outline, batch = make_outline(small), text_batch(num_rows=3, length=400)
    placement = Placement(4, zero=Zero(reduce_bucket_size=1000))
    cost = run_step(outline, batch, PRECISION, accumulates=True, placement=placement)
    assert cost.at_peak[MASTERS] == 4 * (MATRICES + NORMS) // 4
    assert cost.at_peak[STATES] == 2 * cost.at_peak[MASTERS] + 2 * 4, "two moments, and a step count of each group"
    assert cost.at_peak[GRADIENTS] >= cost.at_peak[MASTERS]
    assert held_bytes(outline, placement)["language_model"] == 4 * (MATRICES + NORMS)
    assert not cost.on_host
    whole = run_step(outline, batch, PRECISION, accumulates=True)
    assert sum(whole.at_peak.values()) - sum(cost.at_peak.values()) > 4 * (MATRICES + NORMS), "12 bytes a weight, against 4 or 5"
    assert whole.flops == cost.flops


def test_what_is_offloaded(small: MultiModalLitModule) -> None:
    """Float32 shares, gradients, two moments and a copy for the device, a weight each; and the gradient of the largest weight."""
    share, largest = 4 * (MATRICES + NORMS) // 4, 4 * 32000 * 64
    placement = Placement(4, zero=Zero(offload_optimizer=True, reduce_bucket_size=1000))
    cost = run_step(make_outline(small), text_batch(2, 100), PRECISION, placement=placement)
    assert not cost.at_peak.keys() & {MASTERS, STATES, GRADIENTS}
    assert cost.at_peak[BUCKETS] >= largest
    assert cost.on_host[MASTERS] == cost.on_host[GRADIENTS] == share
    assert cost.on_host[STATES] == 2 * share + 2 * 4
    assert cost.on_host[BUCKETS] == share + largest


def test_stage_3(small: MultiModalLitModule) -> None:
    """Layers and what trains are in shares, gathered whole: of so small a model all layers. Shares may be offloaded."""
    outline, number = make_outline(small), MATRICES + NORMS
    placement = Placement(4, is_sharded=True, zero=Zero(3, reduce_bucket_size=1000))
    held = held_bytes(outline, placement)
    assert held["language_model"] == number and held["gathered layers"] == 4 * number and not host_bytes(outline, placement)
    cost = run_step(outline, text_batch(2, 100), PRECISION, placement=placement)
    assert cost.at_peak[MASTERS] == cost.at_peak[GRADIENTS] == number, "each device has a gradient of its share, at all times"
    offloaded = Placement(4, is_sharded=True, zero=Zero(3, offload_optimizer=True, offload_parameters=True))
    assert not held_bytes(outline, offloaded)["language_model"] and host_bytes(outline, offloaded) == number
    on_host = run_step(outline, text_batch(2, 100), PRECISION, placement=offloaded).on_host
    assert [on_host[kind] for kind in (MASTERS, GRADIENTS, BUCKETS)] == [number] * 3 and on_host[STATES] == 2 * number + 2 * 4


@pytest.mark.parametrize("recomputed", [False, True])
def test_what_autograd_keeps(recomputed: bool, tmp_path: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of all linear layers, of which but one layer would be gathered; nothing, where layers are computed again."""
    monkeypatch.setattr("planning.zero.PREFETCHED", 1000)
    tune = Tune(mode="full", activation_checkpointing=recomputed)
    outline = make_outline(MultiModalLitModule(language_model(tmp_path, tiny_llm, SMALL, tune=tune)))
    placement = Placement(4, is_sharded=True, zero=Zero(3, reduce_bucket_size=1000))
    cost = run_step(outline, text_batch(2, 100), PRECISION, placement=placement)
    assert cost.at_peak[GATHERED] == (0 if recomputed else 4 * (2 * LAYER - (LAYER + 2 * 64)))


def test_options_are_read() -> None:
    options = {"stage": 3, "offload_optimizer": True, "pin_memory": True, "reduce_bucket_size": 7}
    strategy = Namespace(class_path="lightning_modules.zero.ZeroStrategy", init_args=Namespace(options))
    trainer = Namespace(devices=4, num_nodes=2, strategy=strategy, precision="bf16-mixed")
    assert placement_of(trainer) == Placement(8, is_sharded=True, zero=Zero(3, offload_optimizer=True, reduce_bucket_size=7))
    trainer.precision = "bf16-true"
    with pytest.raises(ValueError, match="precision is bf16-true, but ZeroStrategy takes 32-true and bf16-mixed"):
        placement_of(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_what_the_engine_has(
    make_lit_module: Callable[..., Any], tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    """Tensor by tensor, in two processes that accumulate two batches a step."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -r requirements-deepspeed.txt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tune, rows = Tune(mode="lora", lora=LoRA(r=4, target_modules=("q_proj", "v_proj"))), write_rows(tmp_path / "rows.jsonl", 8)

    def make() -> MultiModalLitModule:
        return make_lit_module(language_model=LanguageModel(str(tiny_llm), tune=tune))

    def job(trainer: dict[str, Any]) -> None:
        def look(trainer: Any, module: MultiModalLitModule) -> None:
            zero: Any = trainer.strategy.deepspeed_engine.optimizer
            shares = zero.single_partition_of_fp32_groups
            states = [x for state in zero.optimizer.state.values() for x in state.values()]
            found = {
                "shares": [share.numel() for share in shares],
                "states": sum(x.untyped_storage().nbytes() for x in states),
                "whole": sum(weight.numel() for group in zero.params_in_partition for weight in group),
            }
            if offload:
                copies = zero.param_buffer_of_bit16_for_cpu_offload_groups
                held = [*shares, *(share.grad for share in shares), *copies, zero.temp_grad_buffer_for_cpu_offload]
                held += [*zero.accumulated_grads_in_cpu.values(), *states]
                found["on_host"] = sum(x.untyped_storage().nbytes() for x in held)
            (tmp_path / f"{trainer.global_rank}.json").write_text(json.dumps(found), encoding="utf-8")

        module = make()
        data = make_data(module, rows, batch_size=1)
        make_trainer(tmp_path, Watch(look), accumulate_grad_batches=2, **trainer).fit(module, datamodule=data)

    assert in_two_processes(job, strategy=partial(zero, offload_optimizer=offload)) == [0, 0]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    module, options = make(), Namespace(stage=2, offload_optimizer=offload, reduce_bucket_size=1000)
    strategy = Namespace(class_path="lightning_modules.zero.ZeroStrategy", init_args=options)
    trainer = Namespace(devices=2, num_nodes=1, strategy=strategy, precision="32-true", max_epochs=1, accumulate_grad_batches=2)
    data = make_data(module, rows, batch_size=1)
    plan = plan_run(Run(module, data, trainer, placement_of(trainer), find_device("cpu")))
    groups = [group["params"] for group in parameter_groups(make_outline(module).module.parts())]
    assert Shares(groups, 2, stage=2).whole == max(found["whole"] for found in ranks)
    memory = plan.on_host if offload else plan.memory
    for found in ranks:
        assert memory[MASTERS] == 4 * sum(found["shares"]) and memory[STATES] == found["states"]
    if offload:
        assert plan.on_host.total() - plan.on_host[UPDATE] == max(found["on_host"] for found in ranks)
