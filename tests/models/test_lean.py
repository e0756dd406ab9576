"""Lean blocks compute what the modules compute that they replace."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from models.lean import GatedMLP, RMSNorm, make_lean
from tests.tiny_configs import LLAMA

SMALL = {name: size for name, size in LLAMA.items() if name != "vocab_size"}


def model_of(kind: str, **options: object) -> nn.Module:
    configs = {
        "llama": hf.LlamaConfig,
        "qwen2": hf.Qwen2Config,
        "qwen3": hf.Qwen3Config,
        "mistral": hf.MistralConfig,
        "gemma2": hf.Gemma2Config,
        "gpt2": hf.GPT2Config,
    }
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else SMALL
    config = configs[kind](vocab_size=50, **sizes, **options)
    model = hf.AutoModel.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("weight"):
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(("kind", "replaced"), [("llama", 7), ("qwen2", 7), ("qwen3", 11), ("mistral", 7)])
def test_states_and_gradients_stay(kind, replaced):
    plain = model_of(kind)
    lean = copy.deepcopy(plain)
    assert make_lean(lean) == replaced  # two norms and an MLP a layer (Qwen3: four norms), and the last norm
    assert plain.state_dict().keys() == lean.state_dict().keys()
    tokens_BT = torch.randint(50, (3, 9))
    weight = torch.randn(3, 9, 32)
    for model in (plain, lean):
        (model(input_ids=tokens_BT).last_hidden_state * weight).sum().backward()
    for (name, own), (_, other) in zip(lean.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5 * float(other.grad.abs().max()), msg=name)
    with torch.no_grad():
        states, expected = (model(input_ids=tokens_BT).last_hidden_state for model in (lean, plain))
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [("gemma2", {"head_dim": 8}), ("gpt2", {}), ("llama", {"hidden_act": "gelu"})])
def test_what_computes_something_else_is_left_alone(kind, options):
    model = model_of(kind, **options)
    tokens_BT = torch.randint(50, (2, 5))
    with torch.no_grad():
        before = model.eval()(input_ids=tokens_BT).last_hidden_state
        make_lean(model)
        after = model(input_ids=tokens_BT).last_hidden_state
    assert not any(isinstance(module, GatedMLP) for module in model.modules())
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_round_as_before(dtype):
    norm = LlamaRMSNorm(16, eps=1e-5).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(4, 16, dtype=dtype)
    assert torch.equal(RMSNorm(norm.weight, 1e-5)(x), norm(x))
    mlp = LlamaMLP(hf.LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=4)).to(dtype)
    assert torch.equal(GatedMLP(mlp.gate_proj, mlp.up_proj, mlp.down_proj)(x), mlp(x))


def test_the_gradients_are_those_of_finite_differences():
    norm = RMSNorm(nn.Parameter(torch.randn(6)), 1e-5)
    x = torch.randn(5, 6)
    theirs = LlamaRMSNorm(6, eps=1e-5)
    theirs.weight.data.copy_(norm.weight.data)
    weight = torch.randn(5, 6)
    gradients = []
    for module in (norm, theirs):
        own = x.clone().requires_grad_()
        (module(own) * weight).sum().backward()
        gradients.append((own.grad, module.weight.grad))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_a_module_with_hooks_is_left_alone():
    model = model_of("llama")
    model.norm.register_forward_hook(lambda module, args, output: output * 2)
    make_lean(model)
    assert isinstance(model.norm, LlamaRMSNorm)
