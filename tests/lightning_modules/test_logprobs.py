"""Shape suffixes as in lightning_modules/logprobs.py."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.logprobs import AnswerLogps, score_tokens, token_logps
from lightning_modules.losses import cross_entropy

S, D, V = 37, 16, 50
Options = dict[str, float]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(31)


def random_head(generator: torch.Generator, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Linear:
    head = nn.Linear(D, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return head


def random_positions(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    hidden_SD = torch.randn(S, D, generator=generator).to(dtype).requires_grad_()
    return hidden_SD, torch.randint(0, V, (S,), generator=generator)


def lora_head(generator: torch.Generator) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.ModuleDict({"head": random_head(generator)})
    head = inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"]), model)["head"].double()
    with torch.no_grad():
        head.lora_B["default"].weight.copy_(torch.randn(V, 2, generator=generator))
    return head


def hooked_head(generator: torch.Generator) -> nn.Module:
    head = random_head(generator)
    head.register_forward_hook(lambda module, args, output: output.tanh())
    return head


def frozen(make: Callable[[torch.Generator], nn.Module]) -> Callable[[torch.Generator], nn.Module]:
    return lambda generator: make(generator).requires_grad_(False)


def plain_logps(hidden_SD: Tensor, head: nn.Module, labels_S: Tensor, softcap: float | None = None, scale: float = 1.0) -> Tensor:
    logits_SV = head(hidden_SD)
    logits_SV = scale * logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
    if softcap is not None:
        logits_SV = softcap * (logits_SV / softcap).tanh()
    return logits_SV.log_softmax(1).gather(1, labels_S[:, None])[:, 0]


HEADS = {
    "trains": random_head,
    "trains without bias": lambda generator: random_head(generator, bias=False),
    "frozen": frozen(random_head),
    "frozen without bias": frozen(lambda generator: random_head(generator, bias=False)),
    "lora": lora_head,
    "frozen lora": frozen(lora_head),
    "hooked": hooked_head,
    "frozen hooked": frozen(hooked_head),
}
OPTIONS: list[Options] = [{}, {"softcap": 3.0}, {"scale": 0.25}, {"softcap": 2.0, "scale": 4.0}]


class TestTokenLogps:
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("chunk_size", [8, 512])
    @pytest.mark.parametrize("name", HEADS)
    def test_values_and_gradients_are_the_plain_ones(
        self, generator: torch.Generator, name: str, chunk_size: int, options: Options
    ) -> None:
        head = HEADS[name](generator)
        hidden_SD, labels_S = random_positions(generator)
        weight_S = torch.randn(S, generator=generator, dtype=torch.float64)  # as different as a loss makes them
        inputs = [x for x in (hidden_SD, *head.parameters()) if x.requires_grad]

        logps_S = token_logps(hidden_SD, head, labels_S, chunk_size, **options)
        expected_S = plain_logps(hidden_SD, head, labels_S, **options)

        torch.testing.assert_close(logps_S, expected_S, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad((weight_S * logps_S).sum(), inputs)
        for gradient, expected in zip(gradients, torch.autograd.grad((weight_S * expected_S).sum(), inputs), strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("name", HEADS)
    def test_gradcheck(self, generator: torch.Generator, name: str) -> None:
        head = HEADS[name](generator)
        hidden_SD, labels_S = random_positions(generator)
        hidden_SD = hidden_SD[:5].detach().requires_grad_()
        parameters = [x for x in head.parameters() if x.requires_grad]
        assert torch.autograd.gradcheck(
            lambda hidden_SD, *_: token_logps(hidden_SD, head, labels_S[:5], chunk_size=2), (hidden_SD, *parameters)
        )

    @pytest.mark.parametrize("name", ["trains", "frozen"])
    def test_float32_is_exact_to_a_millionth(self, generator: torch.Generator, name: str) -> None:
        head = HEADS[name](generator)
        hidden_SD, labels_S = random_positions(generator)
        expected_S = plain_logps(hidden_SD, head, labels_S)
        logps_S = token_logps(hidden_SD.float(), copy.deepcopy(head).float(), labels_S, 8)
        assert logps_S.dtype == torch.float32
        torch.testing.assert_close(logps_S.double(), expected_S, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("name", ["trains without bias", "frozen without bias"])
    def test_bfloat16_weights_have_float32_statistics(self, generator: torch.Generator, name: str) -> None:
        head = HEADS[name](generator).to(torch.bfloat16)
        hidden_SD, labels_S = random_positions(generator, torch.bfloat16)
        exact_SD, exact_head = hidden_SD.detach().double().requires_grad_(), copy.deepcopy(head).double()
        weight_S = torch.randn(S, generator=generator)

        logps_S = token_logps(hidden_SD, head, labels_S, 8)

        assert logps_S.dtype == torch.float32
        plain_S = plain_logps(hidden_SD, head, labels_S)
        torch.testing.assert_close(logps_S, plain_S, rtol=1e-6, atol=1e-6)  # what is lost is lost in the product
        inputs, exact_inputs = (
            [x for x in (h, *m.parameters()) if x.requires_grad] for h, m in [(hidden_SD, head), (exact_SD, exact_head)]
        )
        exact = torch.autograd.grad((weight_S * plain_logps(exact_SD, exact_head, labels_S)).sum(), exact_inputs)
        for gradient, expected in zip(torch.autograd.grad((weight_S * logps_S).sum(), inputs), exact, strict=True):
            assert gradient.dtype == torch.bfloat16
            assert (gradient - expected).norm() <= 2**-7 * expected.norm()

    @pytest.mark.parametrize("name", ["trains without bias", "frozen without bias", "lora"])
    def test_autocast_holds_in_backward_too(self, generator: torch.Generator, name: str) -> None:
        head = HEADS[name](generator).float()
        hidden_SD, labels_S = random_positions(generator, torch.float32)
        inputs = [x for x in (hidden_SD, *head.parameters()) if x.requires_grad]
        weight_S = torch.randn(S, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            logps_S = token_logps(hidden_SD, head, labels_S, 8)
            expected_S = plain_logps(hidden_SD, head, labels_S)
        torch.testing.assert_close(logps_S, expected_S, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad((weight_S * logps_S).sum(), inputs)  # outside of autocast, as Lightning does it
        for gradient, expected in zip(gradients, torch.autograd.grad((weight_S * expected_S).sum(), inputs), strict=True):
            assert (gradient - expected).norm() <= 2**-6 * expected.norm()
        exact_S = plain_logps(hidden_SD, head, labels_S)
        assert (logps_S - exact_S).abs().max() > 1e-4  # the product did run in bfloat16

    def test_a_frozen_head_keeps_one_gradient_as_large_as_the_hidden_states(self, generator: torch.Generator) -> None:
        head = HEADS["frozen"](generator)
        hidden_SD, labels_S = random_positions(generator)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            token_logps(hidden_SD, head, labels_S, 8)
        assert [tuple(x.shape) for x in kept] == [(S, D)]

    def test_a_head_that_trains_keeps_no_logits(self, generator: torch.Generator) -> None:
        head = random_head(generator)
        hidden_SD, labels_S = random_positions(generator)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            token_logps(hidden_SD, head, labels_S, 8)
        assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (hidden_SD, labels_S, head.weight, head.bias)}

    def test_dropout_in_the_head_is_the_same_in_backward(self, generator: torch.Generator) -> None:
        head = nn.Sequential(nn.Dropout(0.5), random_head(generator))
        hidden_SD, labels_S = random_positions(generator)
        torch.manual_seed(7)
        logps_S = token_logps(hidden_SD, head, labels_S)
        (gradient,) = torch.autograd.grad(logps_S.sum(), hidden_SD)
        torch.manual_seed(7)
        (expected,) = torch.autograd.grad(plain_logps(hidden_SD, head, labels_S).sum(), hidden_SD)
        torch.testing.assert_close(gradient, expected)

    @pytest.mark.parametrize("name", ["trains", "frozen"])
    def test_a_second_backward_is_as_the_first_and_differentiating_twice_raises(
        self, generator: torch.Generator, name: str
    ) -> None:
        head = HEADS[name](generator)
        hidden_SD, labels_S = random_positions(generator)
        logps_S = token_logps(hidden_SD, head, labels_S, 8)
        (first,) = torch.autograd.grad(logps_S.sum(), hidden_SD, retain_graph=True)
        (second,) = torch.autograd.grad(3 * logps_S.sum(), hidden_SD, retain_graph=True)
        torch.testing.assert_close(second, 3 * first)
        (gradient,) = torch.autograd.grad(logps_S.square().sum(), hidden_SD, create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            gradient.sum().backward()

    @pytest.mark.parametrize("name", ["trains", "lora"])
    def test_only_what_trains_gets_a_gradient(self, generator: torch.Generator, name: str) -> None:
        head = HEADS[name](generator)
        hidden_SD, labels_S = random_positions(generator)
        hidden_SD = hidden_SD.detach()
        first, *_ = trained = [x for x in head.parameters() if x.requires_grad]
        first.requires_grad_(False)
        token_logps(hidden_SD, head, labels_S, 8).sum().backward()
        assert [x.grad is None for x in trained] == [True] + [False] * (len(trained) - 1)

    @pytest.mark.parametrize("name", HEADS)
    def test_nothing_trains(self, generator: torch.Generator, name: str) -> None:
        head = HEADS[name](generator)
        hidden_SD, labels_S = random_positions(generator)
        expected_S = plain_logps(hidden_SD, head, labels_S)
        with torch.no_grad():
            logps_S = token_logps(hidden_SD, head, labels_S, 8)
        assert not logps_S.requires_grad
        torch.testing.assert_close(logps_S, expected_S.detach())

    @pytest.mark.parametrize("name", HEADS)
    def test_no_position_has_zero_gradients(self, generator: torch.Generator, name: str) -> None:
        head = HEADS[name](generator)
        hidden_SD, labels_S = random_positions(generator)
        scores = score_tokens(hidden_SD[:0], head, labels_S[:0], want=("entropy",))
        scores.logps_S.sum().backward()
        assert scores.statistics["entropy"].shape == scores.correct_S.shape == (0,)
        assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (hidden_SD, *head.parameters()) if x.requires_grad)

    def test_their_sum_is_the_cross_entropy(self, generator: torch.Generator) -> None:
        head = random_head(generator, torch.float32)
        hidden_SD, labels_S = random_positions(generator, torch.float32)
        nll, _, _ = cross_entropy(hidden_SD, head, labels_S, 8)
        torch.testing.assert_close(-token_logps(hidden_SD, head, labels_S, 8).sum(), nll)

    def test_what_does_not_fit_is_refused(self, generator: torch.Generator) -> None:
        hidden_SD, labels_S = random_positions(generator)
        with pytest.raises(ValueError, match="chunk_size"):
            token_logps(hidden_SD, random_head(generator), labels_S, 0)
        with pytest.raises(ValueError, match=r"expected \(S, D\) and \(S,\)"):
            token_logps(hidden_SD, random_head(generator), labels_S[1:])


class TestScoreTokens:
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("name", HEADS)
    def test_statistics_are_those_of_the_whole_softmax(self, generator: torch.Generator, name: str, options: Options) -> None:
        head = HEADS[name](generator)
        hidden_SD, labels_S = random_positions(generator)
        logits_SV = options.get("scale", 1.0) * head(hidden_SD.detach()).detach()
        if cap := options.get("softcap"):
            logits_SV = cap * (logits_SV / cap).tanh()
        labels_S[:9] = logits_SV[:9].argmax(1)

        scores = score_tokens(hidden_SD, head, labels_S, 8, want=("mean_logit", "entropy", "log_square"), **options)

        probs_SV = logits_SV.softmax(1)
        torch.testing.assert_close(scores.statistics["entropy"], torch.distributions.Categorical(probs_SV).entropy())
        torch.testing.assert_close(scores.statistics["log_square"], probs_SV.square().sum(1).log())
        torch.testing.assert_close(scores.statistics["mean_logit"], logits_SV.mean(1))
        assert torch.equal(scores.correct_S, logits_SV.argmax(1) == labels_S)
        assert scores.correct_S.sum() >= 9
        assert not any(x.requires_grad for x in scores.statistics.values())
        plain_S = token_logps(hidden_SD, head, labels_S, 8, **options)
        torch.testing.assert_close(scores.logps_S, plain_S, rtol=0, atol=0)


class TestAnswerLogps:
    def test_sums_means_and_counts(self) -> None:
        logps_S = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], requires_grad=True)
        answers = AnswerLogps(logps_S, torch.tensor([0, 0, 2, 0, 2]), num_answers=4)
        assert answers.counts().tolist() == [3, 0, 2, 0]
        assert answers.sums().tolist() == [-11, 0, -20, 0]
        assert answers.means().tolist() == pytest.approx([-11 / 3, 0, -10, 0])
        assert answers.sums(torch.tensor([1.0, 5.0, 1.0, 1.0, 0.5])).tolist() == [-19, 0, -12, 0]
        (gradient_S,) = torch.autograd.grad(answers.means()[2], logps_S)
        assert gradient_S.tolist() == [0, 0, 0.5, 0, 0.5]

    def test_tokens_beyond_a_length_count_less(self) -> None:
        logps_S = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0], requires_grad=True)
        answers = AnswerLogps(logps_S, torch.tensor([0, 0, 0, 1, 1, 2]), num_answers=3)
        sum_P = answers.sums_by_length(torch.tensor([0, 0, 1, 2]), torch.tensor([2, 1, 2, 0]), weight_beyond=0.25)
        assert sum_P.tolist() == [-1 - 2 - 1, -1 - 0.5 - 1, -24, -8]
        (gradient_S,) = torch.autograd.grad(sum_P[0], logps_S)
        assert gradient_S.tolist() == [1, 1, 0.25, 0, 0, 0]
