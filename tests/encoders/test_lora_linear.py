"""Our LoRA layer gives what PEFT's own gives: values, gradients, and every case that it leaves to PEFT."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from encoders.lora_linear import LoRALinear
from encoders.tuning import LoRA, Tune, apply_tune


class Layers(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 20, bias=bias), nn.Linear(20, 7, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.v_proj(torch.tanh(self.q_proj(x)))


def pair(bias: bool = True, **options: Any) -> tuple[Layers, Layers]:
    """The same layers with our adapters and with PEFT's, none of them 0."""
    ours = Layers(bias)
    theirs = copy.deepcopy(ours)
    apply_tune(Tune(mode="lora", lora=LoRA(r=3, alpha=5.0, **options)), ours, "test")
    inject_adapter_in_model(
        LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], **{_PEFT.get(k, k): v for k, v in options.items()}),
        theirs,
    )
    theirs.requires_grad_(False)
    for (name, own), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if "lora_" in name:
            nn.init.normal_(own)
            other.data.copy_(own.data)
            other.requires_grad_()
    return ours, theirs


_PEFT = {"dropout": "lora_dropout"}


def plain_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a layer was ours."""
    calls: list[bool] = []
    found = LoRALinear._plain_adapter

    def look(self: LoRALinear, x: Tensor) -> str | None:
        calls.append((adapter := found(self, x)) is not None)
        return adapter

    monkeypatch.setattr(LoRALinear, "_plain_adapter", look)
    return calls


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_peft(shape, bias, monkeypatch):
    ours, theirs = (layers.double() for layers in pair(bias))
    calls = plain_calls(monkeypatch)
    own = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    other = own.detach().clone().requires_grad_()
    out, expected = ours(own), theirs(other)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(own.grad, other.grad)
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
    assert calls == [True, True]


def test_the_gradient_is_that_of_finite_differences():
    ours, _ = pair()
    ours.double()
    adapters = [p for p in ours.parameters() if p.requires_grad]
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *adapters))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"dropout": 0.5}], ids=["dora", "dropout"])
def test_other_kinds_are_left_to_peft(options, monkeypatch):
    ours, theirs = pair(**options)
    calls = plain_calls(monkeypatch)
    x = torch.randn(3, 12)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        out = ours(x)
        torch.manual_seed(1)
        expected = theirs(x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-5)
    assert calls == [False, False]


def test_dropout_is_off_in_evaluation(monkeypatch):
    ours, theirs = pair(dropout=0.5)
    calls = plain_calls(monkeypatch)
    x = torch.randn(3, 12)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-6, atol=1e-5)
    assert calls == [True, True]


def test_an_adapter_that_is_off_or_merged_is_left_to_peft(monkeypatch):
    ours, _ = pair()
    x = torch.randn(3, 12)
    calls = plain_calls(monkeypatch)
    with_adapters = ours(x)
    layers = [layer for layer in ours.modules() if isinstance(layer, LoRALinear)]
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(ours(x), with_adapters, rtol=1e-5, atol=1e-5)
    for layer in layers:
        layer.unmerge()
        layer.enable_adapters(False)
    base = nn.functional.linear(torch.tanh(nn.functional.linear(x, *_base(ours.q_proj))), *_base(ours.v_proj))
    torch.testing.assert_close(ours(x), base, rtol=1e-5, atol=1e-5)
    assert calls == [True, True] + 4 * [False]


def test_autocast_is_left_to_peft(monkeypatch):
    ours, theirs = pair()
    calls = plain_calls(monkeypatch)
    x = torch.randn(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = ours(x), theirs(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert calls == [False, False]


class Quantised(nn.Linear):
    """Stands for a linear layer whose weight means something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_of_a_linear_layer_is_left_to_peft():
    module = nn.ModuleDict({"q_proj": Quantised(4, 4), "v_proj": nn.Linear(4, 4)})
    apply_tune(Tune(mode="lora"), module, "test")
    assert not isinstance(module["q_proj"], LoRALinear)
    assert isinstance(module["v_proj"], LoRALinear)


def _base(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.base_layer.weight, layer.base_layer.bias
