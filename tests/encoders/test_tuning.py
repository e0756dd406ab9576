import math

import pytest
import torch
from torch import nn

from encoders.tuning import LoRA, Tune, apply_tune


def make_module(dtype: torch.dtype = torch.float32) -> nn.Module:
    blocks = [nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 4), "out": nn.Linear(4, 8)}) for _ in range(2)]
    return nn.ModuleDict({"norm": nn.LayerNorm(8), "blocks": nn.ModuleList(blocks)}).to(dtype)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_frozen_and_full():
    module = make_module()
    apply_tune(Tune(mode="frozen"), module, part="X")
    assert trainable(module) == {}
    apply_tune(Tune(mode="full"), module, part="X")
    assert len(trainable(module)) == len(list(module.parameters())) == 14


def test_lora_trains_adapters_alone_and_in_float32():
    module = make_module(torch.bfloat16)
    apply_tune(Tune(mode="lora", lora=LoRA(r=3)), module, part="X")
    adapters = trainable(module)
    targets = [f"blocks.{index}.{name}" for index in range(2) for name in ("q_proj", "v_proj")]
    assert set(adapters) == {f"{target}.lora_{letter}.default.weight" for target in targets for letter in "AB"}
    assert {parameter.dtype for parameter in adapters.values()} == {torch.float32}
    assert {parameter.dtype for name, parameter in module.named_parameters() if name not in adapters} == {torch.bfloat16}
    assert adapters["blocks.0.v_proj.lora_A.default.weight"].shape == (3, 8)
    assert adapters["blocks.0.v_proj.lora_B.default.weight"].shape == (4, 3)


def test_full_trains_in_float32():
    module = make_module(torch.bfloat16)
    module.register_buffer("scale", torch.ones(3, dtype=torch.bfloat16))
    module.register_buffer("count", torch.arange(3))
    values = {name: value.clone() for name, value in module.state_dict().items()}
    apply_tune(Tune(mode="full"), module, part="X")
    assert {value.dtype for name, value in module.state_dict().items() if name != "count"} == {torch.float32}
    assert module.get_buffer("count").dtype == torch.int64
    assert all(torch.equal(value, values[name].to(value.dtype)) for name, value in module.state_dict().items())
    module = make_module(torch.bfloat16)
    apply_tune(Tune(mode="frozen"), module, part="X")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_lora_computes_the_scaled_update(use_rslora, scale):
    generator = torch.Generator().manual_seed(5)
    module = make_module()
    layer = module["blocks"][1]["q_proj"]
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    apply_tune(Tune(mode="lora", lora=LoRA(r=4, alpha=6, use_rslora=use_rslora)), module, part="X")
    layer = module["blocks"][1]["q_proj"]
    x_BD = torch.randn(3, 8, generator=generator)
    torch.testing.assert_close(layer(x_BD), nn.functional.linear(x_BD, weight, bias))  # starts as the weights it adapts
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    up.data = torch.randn(up.shape, generator=generator)
    torch.testing.assert_close(layer(x_BD), nn.functional.linear(x_BD, weight + scale * up @ down, bias))


def test_dora_normalises_the_directions():
    generator = torch.Generator().manual_seed(5)
    module = make_module()
    weight, bias = (value.detach().clone() for value in module["blocks"][0]["v_proj"].parameters())
    apply_tune(Tune(mode="lora", lora=LoRA(r=2, alpha=4, use_dora=True)), module, part="X")
    assert "blocks.0.v_proj.lora_magnitude_vector.default.weight" in trainable(module)
    layer = module["blocks"][0]["v_proj"]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    up.data = torch.randn(up.shape, generator=generator)
    updated = weight + 2 * up @ down
    directed = weight.norm(dim=1, keepdim=True) * updated / updated.norm(dim=1, keepdim=True)
    x_BD = torch.randn(3, 8, generator=generator)
    torch.testing.assert_close(layer(x_BD), nn.functional.linear(x_BD, directed, bias))


def test_dropout_reaches_the_adapters():
    module = make_module()
    apply_tune(Tune(mode="lora", lora=LoRA(dropout=0.3)), module, part="X")
    assert {m.p for m in module.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_target_that_matches_nothing_lists_the_layers():
    with pytest.raises(ValueError, match=r"X: lora.target_modules names 'k_proj'.*out, q_proj, v_proj"):
        apply_tune(Tune(mode="lora", lora=LoRA(target_modules=("q_proj", "k_proj"))), make_module(), part="X")
    with pytest.raises(ValueError, match="names 'proj'"):  # the end of a name, not of a word
        apply_tune(Tune(mode="lora", lora=LoRA(target_modules=("proj",))), make_module(), part="X")
    with pytest.raises(ValueError, match=r"X: lora.target_modules \['norm'\] cannot be adapted"):
        apply_tune(Tune(mode="lora", lora=LoRA(target_modules=("norm",))), make_module(), part="X")


@pytest.mark.parametrize("options", [{"r": 0}, {"dropout": 1.0}, {"target_modules": ()}])
def test_lora_options_are_checked(options):
    with pytest.raises(ValueError, match="lora." + next(iter(options))):
        LoRA(**options)


def test_learning_rate_is_checked():
    with pytest.raises(ValueError, match=r"set tune\.mode to frozen"):
        Tune(lr=0.0)
    with pytest.raises(ValueError, match=r"tune\.lr is 0\.001, but tune\.mode frozen"):
        Tune(mode="frozen", lr=1e-3)
    assert Tune(mode="lora", lr=1e-3).lr == 1e-3
