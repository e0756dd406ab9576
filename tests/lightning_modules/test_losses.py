"""Shape suffixes as in lightning_modules/losses.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.losses import cross_entropy, supervised, supervised_rows

S, D, V = 37, 16, 50


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


def random_problem(generator: torch.Generator, bias: bool, dtype: torch.dtype) -> tuple[Tensor, nn.Linear, Tensor]:
    head = nn.Linear(D, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden_SD = torch.randn(S, D, generator=generator).to(dtype).requires_grad_()
    return hidden_SD, head, torch.randint(0, V, (S,), generator=generator)


def plain_loss(hidden_SD: Tensor, head: nn.Module, labels_S: Tensor, softcap: float | None = None, scale: float = 1.0) -> Tensor:
    logits_SV = head(hidden_SD)
    logits_SV = scale * (logits_SV.float() if logits_SV.dtype.itemsize < 4 else logits_SV)
    if softcap is not None:
        logits_SV = softcap * (logits_SV / softcap).tanh()
    return F.cross_entropy(logits_SV, labels_S, reduction="sum")


def trainable(hidden_SD: Tensor, head: nn.Module) -> list[Tensor]:
    return [x for x in (hidden_SD, *head.parameters()) if x.requires_grad]


def assert_same(loss: Tensor, expected: Tensor, inputs: list[Tensor], rtol: float) -> None:
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
    # Divided, as a trainer does: the incoming gradient is not 1.
    gradients, expected_gradients = (torch.autograd.grad(x / 7, inputs, retain_graph=True) for x in (loss, expected))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == expected_gradient.dtype
        assert (gradient - expected_gradient).norm() <= rtol * expected_gradient.norm()


class TestSupervised:
    def test_position_predicts_the_next_token(self, generator: torch.Generator) -> None:
        hidden_BTD = torch.randn(2, 4, 3, generator=generator)
        labels_BT = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])

        hidden_SD, labels_S = supervised(hidden_BTD, labels_BT)

        assert labels_S.tolist() == [7, 8, 9]  # label 5 has no position before it
        assert torch.equal(hidden_SD, torch.stack([hidden_BTD[0, 1], hidden_BTD[0, 2], hidden_BTD[1, 2]]))
        assert supervised_rows(labels_BT).tolist() == [0, 0, 1]

    def test_other_shapes_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\(2, 4, 3\) and labels \(2, 5\)"):
            supervised(torch.empty(2, 4, 3), torch.empty(2, 5, dtype=torch.long))

    @pytest.mark.parametrize("chunk_size", [3, 512])
    def test_loss_is_hugging_faces(self, generator: torch.Generator, chunk_size: int) -> None:
        from transformers.loss.loss_utils import ForCausalLMLoss

        _, head, _ = random_problem(generator, bias=False, dtype=torch.float32)
        hidden_BTD = torch.randn(3, 9, D, generator=generator, requires_grad=True)
        labels_BT = torch.randint(0, V, (3, 9), generator=generator)
        labels_BT[torch.rand(3, 9, generator=generator) < 0.6] = -100

        hidden_SD, labels_S = supervised(hidden_BTD, labels_BT)
        nll, count, _ = cross_entropy(hidden_SD, head, labels_S, chunk_size)

        expected = ForCausalLMLoss(head(hidden_BTD), labels_BT, V, num_items_in_batch=count)
        assert_same(nll / count, expected, [hidden_BTD, head.weight], rtol=1e-6)


class TestCrossEntropy:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("chunk_size", [1, 8, 37, 100])
    def test_loss_and_gradients_are_the_plain_ones(self, generator: torch.Generator, bias: bool, chunk_size: int) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias, torch.float32)
        nll, count, metrics = cross_entropy(hidden_SD, head, labels_S, chunk_size)
        assert_same(nll, plain_loss(hidden_SD, head, labels_S), trainable(hidden_SD, head), rtol=1e-6)
        assert count.item() == S
        assert metrics["correct"].item() == (head(hidden_SD).argmax(1) == labels_S).sum().item()

    def test_correct_counts_the_likeliest_labels(self, generator: torch.Generator) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias=True, dtype=torch.float32)
        labels_S[:11] = head(hidden_SD[:11]).argmax(1)
        labels_S[11:] = head(hidden_SD[11:]).argmin(1)
        assert cross_entropy(hidden_SD, head, labels_S, 8)[2]["correct"].item() == 11

    @pytest.mark.parametrize(("softcap", "scale"), [(None, 0.25), (3.0, 1.0), (2.0, 4.0)])
    def test_scaled_and_capped_logits(self, generator: torch.Generator, softcap: float | None, scale: float) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias=True, dtype=torch.float64)
        nll, _, _ = cross_entropy(hidden_SD, head, labels_S, 8, softcap, scale)
        assert_same(nll, plain_loss(hidden_SD, head, labels_S, softcap, scale), trainable(hidden_SD, head), rtol=1e-12)

    @pytest.mark.parametrize("frozen", [("weight", "bias"), ("weight",), ("bias",), ("hidden",), ("hidden", "weight")])
    def test_only_what_trains_gets_a_gradient(self, generator: torch.Generator, frozen: tuple[str, ...]) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias=True, dtype=torch.float32)
        everything = {"hidden": hidden_SD, **dict(head.named_parameters())}
        for name in frozen:
            everything[name].requires_grad_(False)
        nll, _, _ = cross_entropy(hidden_SD, head, labels_S, 8)
        assert_same(nll, plain_loss(hidden_SD, head, labels_S), trainable(hidden_SD, head), rtol=1e-6)
        nll.backward()
        assert {name for name, x in everything.items() if x.grad is None} == set(frozen)

    def test_nothing_trains(self, generator: torch.Generator) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias=True, dtype=torch.float32)
        expected = plain_loss(hidden_SD, head, labels_S)
        with torch.no_grad():
            under_no_grad, _, _ = cross_entropy(hidden_SD, head, labels_S, 8)
        frozen, _, _ = cross_entropy(hidden_SD.detach(), head.requires_grad_(False), labels_S, 8)
        for nll in (under_no_grad, frozen):
            assert not nll.requires_grad
            torch.testing.assert_close(nll, expected.detach(), rtol=1e-6, atol=0)

    def test_no_position_is_a_zero_with_zero_gradients(self, generator: torch.Generator) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias=True, dtype=torch.float32)
        nll, count, _ = cross_entropy(hidden_SD[:0], head, labels_S[:0])
        nll.backward()
        assert nll.item() == 0
        assert count.item() == 0
        assert torch.equal(head.weight.grad, torch.zeros(V, D))
        assert torch.equal(hidden_SD.grad, torch.zeros(S, D))

    @pytest.mark.parametrize("softcap", [None, 5.0])
    def test_large_logits_stay_exact(self, generator: torch.Generator, softcap: float | None) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias=False, dtype=torch.float32)
        hidden_SD = (300 * hidden_SD).detach().requires_grad_()  # probabilities of most labels underflow
        nll, _, _ = cross_entropy(hidden_SD, head, labels_S, 8, softcap)
        assert nll.isfinite()
        assert_same(nll, plain_loss(hidden_SD, head, labels_S, softcap), [hidden_SD, head.weight], rtol=1e-5)

    @pytest.mark.parametrize("softcap", [None, 5.0])
    def test_bfloat16_weights_lose_no_more_than_the_plain_loss(self, generator: torch.Generator, softcap: float | None) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias=False, dtype=torch.bfloat16)
        nll, _, _ = cross_entropy(hidden_SD, head, labels_S, 8, softcap)
        assert nll.dtype == torch.float32
        torch.testing.assert_close(nll, plain_loss(hidden_SD, head, labels_S, softcap), rtol=1e-6, atol=0)
        gradients = torch.autograd.grad(nll, trainable(hidden_SD, head))

        exact_hidden_SD, exact_head = hidden_SD.detach().double().requires_grad_(), copy.deepcopy(head).double()
        exact_nll = plain_loss(exact_hidden_SD, exact_head, labels_S, softcap)
        exact = torch.autograd.grad(exact_nll, trainable(exact_hidden_SD, exact_head))
        for gradient, expected in zip(gradients, exact, strict=True):
            assert gradient.dtype == torch.bfloat16
            assert (gradient - expected).norm() <= 2**-7 * expected.norm()

    @pytest.mark.parametrize("softcap", [None, 5.0])
    def test_autocast(self, generator: torch.Generator, softcap: float | None) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias=True, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            nll, _, _ = cross_entropy(hidden_SD, head, labels_S, 8, softcap)
            expected = plain_loss(hidden_SD, head, labels_S, softcap)
        assert_same(nll, expected, trainable(hidden_SD, head), rtol=2**-7)
        exact = plain_loss(hidden_SD, head, labels_S, softcap)
        assert nll.item() != pytest.approx(exact.item(), rel=1e-7)  # the product did run in bfloat16

    def test_tied_embedding_gets_both_gradients(self, generator: torch.Generator) -> None:
        _, head, labels_S = random_problem(generator, bias=False, dtype=torch.float32)
        tokens_S = torch.randint(0, V, (S,), generator=generator)
        embedding = nn.Embedding(V, D)
        embedding.weight = head.weight
        hidden_SD = embedding(tokens_S).tanh()
        nll, _, _ = cross_entropy(hidden_SD, head, labels_S, 8)
        assert_same(nll, plain_loss(hidden_SD, head, labels_S), [head.weight], rtol=1e-6)

    def test_second_backward(self, generator: torch.Generator) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias=False, dtype=torch.float32)
        nll, _, _ = cross_entropy(hidden_SD, head, labels_S, 8)
        (first,) = torch.autograd.grad(nll, hidden_SD, retain_graph=True)
        (second,) = torch.autograd.grad(3 * nll, hidden_SD)
        torch.testing.assert_close(second, 3 * first)
        with pytest.raises(RuntimeError, match="second time"):
            nll.backward()

    def test_differentiating_twice_raises(self, generator: torch.Generator) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias=False, dtype=torch.float32)
        nll, _, _ = cross_entropy(hidden_SD, head, labels_S, 8)
        (gradient,) = torch.autograd.grad(nll**2, hidden_SD, create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            gradient.sum().backward()

    def test_hooks_see_a_chunk_at_a_time(self, generator: torch.Generator) -> None:
        hidden_SD, head, labels_S = random_problem(generator, bias=False, dtype=torch.float32)
        seen: list[int] = []
        head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        cross_entropy(hidden_SD, head, labels_S, 8)
        assert seen == [8, 8, 8, 8, 5]

    def test_a_subclass_keeps_its_own_forward(self, generator: torch.Generator) -> None:
        class Squared(nn.Linear):
            def forward(self, hidden_CD: Tensor) -> Tensor:
                return super().forward(hidden_CD) ** 2

        hidden_SD, linear, labels_S = random_problem(generator, bias=True, dtype=torch.float32)
        head = Squared(D, V)
        head.load_state_dict(linear.state_dict())
        nll, _, _ = cross_entropy(hidden_SD, head, labels_S, 8)
        assert_same(nll, plain_loss(hidden_SD, head, labels_S), trainable(hidden_SD, head), rtol=1e-6)

    def test_lora_head(self, generator: torch.Generator) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        hidden_SD, linear, labels_S = random_problem(generator, bias=True, dtype=torch.float32)
        model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"]), nn.ModuleDict({"head": linear}))
        head = model["head"]
        with torch.no_grad():
            head.lora_B["default"].weight.copy_(torch.randn(V, 2, generator=generator))
        assert len(trainable(hidden_SD, head)) == 3
        nll, _, _ = cross_entropy(hidden_SD, head, labels_S, 8)
        assert_same(nll, plain_loss(hidden_SD, head, labels_S), trainable(hidden_SD, head), rtol=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels_S": torch.tensor([1, 2])}, r"expected \(S, D\) and \(S,\)"),
            ({"labels_S": torch.tensor([1, -100, 2])}, "labels hold -100"),
            ({"chunk_size": 0}, "chunk_size"),
            ({"softcap": 0.0}, "softcap"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, generator: torch.Generator, change: dict, message: str) -> None:
        hidden_SD, head, _ = random_problem(generator, bias=False, dtype=torch.float32)
        arguments = {"hidden_SD": hidden_SD[:3], "head": head, "labels_S": torch.tensor([1, 2, 3])} | change
        with pytest.raises(ValueError, match=message):
            cross_entropy(**arguments)
