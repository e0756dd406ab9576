"""Flat shards: what of a model is in them, how its layers look, and gradients and states; runs are in test_strategies.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from encoders.tuning import LoRA, Tune
from models.flat import average, clip_flat, main_kind, own_state, whole_state
from models.flat_layer import Cut, FlatLayer, shape_of
from models.language import LanguageModel
from tests.lightning_modules.processes import in_two_processes


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_all_of_a_layer_but_adapters_is_one_row(tiny_llm: Path, mode: Any) -> None:
    """Also where there are frozen adapters, as a reference has them."""
    model = LanguageModel(str(tiny_llm), tune=Tune(mode=mode, lora=LoRA(target_modules=("q_proj", "down_proj"))))
    model.build()
    layer = model.decoder_layers[1]
    for name, weight in layer.named_parameters():
        weight.requires_grad_(weight.requires_grad and "lora_A" not in name)
    own = set(main_kind(layer))
    assert {name for name, weight in layer.named_parameters() if weight not in own} == {
        f"{module}.lora_{end}.default.weight"
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for end in "AB"
        if mode == "lora"
    }


def test_of_two_types_the_one_with_more_values_is_a_row() -> None:
    layer = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.LayerNorm(4), nn.Linear(4, 2))
    layer[0].requires_grad_(False)
    assert main_kind(layer) == list(layer[0].parameters())


def test_a_layer_looks_as_before() -> None:
    """Names, modes and what a model reads of its layers are the layer's, and the wrapper runs it."""
    layer = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    vars(layer)["attention_type"] = "sliding"
    wrapper = nn.Sequential(layer, nn.Tanh())
    looks = FlatLayer(layer, wrapper)
    assert list(dict(looks.named_parameters())) == list(looks.state_dict()) == ["0.weight", "0.bias"]
    assert dict(looks.named_modules()).keys() == dict(layer.named_modules()).keys()
    assert looks.attention_type == "sliding" and looks.get_submodule("0") is layer[0]
    assert not any(module.training for module in (looks.eval(), layer, layer[1]))
    x_BD = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(looks(x_BD), layer(x_BD).tanh())
    with pytest.raises(AttributeError, match="nothing"):
        _ = looks.nothing


def test_gradients_and_states_are_those_of_whole_weights() -> None:
    """In two processes, of which one has nothing of the first weight and of its state; the last weight is not cut."""

    def job(trainer_options: dict[str, Any]) -> None:
        dist.init_process_group("gloo")
        rank, generator = dist.get_rank(), torch.Generator().manual_seed(21)
        plain = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(2, 3), (4, 2), (3, 5)]]
        places = [slice(6 * rank, 6), slice(3 * rank, 3 + 5 * rank)]

        def shard(whole: Tensor, index: int) -> Tensor:
            return whole.clone() if index == 2 else whole.flatten()[places[index]].clone()

        cut = [nn.Parameter(shard(weight.detach(), index)) for index, weight in enumerate(plain)]
        for weight, whole_weight, place in zip(cut, plain, places, strict=False):
            vars(weight)["cut"] = Cut(whole_weight.shape, place.start)
        assert [shape_of(weight) for weight in cut] == [weight.shape for weight in plain]
        one, two = torch.optim.AdamW(plain, lr=0.1), torch.optim.AdamW(cut, lr=0.1)
        for _ in range(2):
            for index, (weight, own) in enumerate(zip(plain, cut, strict=True)):
                weight.grad = torch.randn(weight.shape, generator=generator)
                own.grad = shard(weight.grad, index) if own.numel() else None
            own.grad = None if rank == 0 else 2 * own.grad  # 0 and twice as much are once on average
            average(cut)
            clip_flat(cut, 0.5)
            nn.utils.clip_grad_norm_(plain, 0.5)
            one.step()
            two.step()
        for index, (weight, own) in enumerate(zip(plain, cut, strict=True)):
            assert torch.allclose(own, shard(weight.detach(), index), atol=1e-6)
        expected = one.state_dict()["state"]
        whole = whole_state(two.state_dict()["state"], cut, is_first=True)
        assert whole.keys() == expected.keys()
        for number, values in expected.items():
            assert values.keys() == whole[number].keys()
            assert all(torch.allclose(whole[number][name], value, atol=1e-6) for name, value in values.items())
        own_again = own_state(whole, dict(enumerate(cut)))
        assert own_again.keys() == two.state_dict()["state"].keys() == ({0, 1, 2} if rank == 0 else {1, 2})
        for number, values in two.state_dict()["state"].items():
            assert all(torch.equal(own_again[number][name], value) for name, value in values.items())
        assert not whole_state(two.state_dict()["state"], cut, is_first=False)
        with pytest.raises(ValueError, match="FlatShardedStrategy cuts weights.*such as AdamW"):
            whole_state({1: {"row": torch.zeros(4)}}, cut, is_first=True)

    assert in_two_processes(job) == [0, 0]
