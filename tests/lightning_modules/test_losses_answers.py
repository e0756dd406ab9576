"""`score_answers` of lightning_modules/losses.py; shape suffixes as there."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.losses import AnswerScores, cross_entropy, score_answers, supervised, supervised_rows

S, D, V = 37, 16, 50


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


def random_problem(generator: torch.Generator) -> tuple[Tensor, nn.Linear, Tensor]:
    head = nn.Linear(D, V).requires_grad_(False)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return torch.randn(S, D, generator=generator), head, torch.randint(0, V, (S,), generator=generator)


class TinyLanguageModel(nn.Module):
    """A recurrent network: causal, so that a forced answer and a decoded one see the same prefix."""

    def __init__(self, generator: torch.Generator, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 12)
        self.rnn = nn.GRU(12, 12, batch_first=True)
        self.head = nn.Linear(12, vocabulary)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.rnn(self.embedding(tokens_BT))[0]


def decode(model: TinyLanguageModel, prompt: list[int], answers: list[list[int]] | None, end: int, limit: int) -> list[int]:
    """Greedy, a token at a time; restricted to the answers where there are some."""
    given: list[int] = []
    while len(given) < limit and given[-1:] != [end]:
        logits_V = model.head(model(torch.tensor([prompt + given]))[0, -1]).tolist()
        allowed = range(len(logits_V)) if answers is None else continuations(answers, given)
        given.append(max(allowed, key=lambda token: logits_V[token]))
    return given


def continuations(answers: list[list[int]], prefix: list[int]) -> list[int]:
    return sorted({answer[len(prefix)] for answer in answers if answer[: len(prefix)] == prefix and len(answer) > len(prefix)})


def score(model: TinyLanguageModel, prompt: list[int], target: list[int], answers: list[list[int]] | None) -> AnswerScores:
    tokens_BT = torch.tensor([prompt + target])
    labels_BT = torch.tensor([[-100] * len(prompt) + target])
    choices = [[-1] if answers is None else continuations(answers, target[:n]) for n in range(len(target))]
    width = max(map(len, choices))
    choices_SK = torch.tensor([row + [-1] * (width - len(row)) for row in choices])
    hidden_SD, labels_S = supervised(model(tokens_BT), labels_BT)
    return score_answers(hidden_SD, model.head, labels_S, choices_SK, supervised_rows(labels_BT), chunk_size=2)


def random_answers(generator: torch.Generator, end: int) -> Iterator[list[int]]:
    """Over two letters, so that answers share their beginnings and some begin others."""
    for length in torch.randint(1, 4, (5,), generator=generator).tolist():
        yield [*torch.randint(0, 2, (length,), generator=generator).tolist(), end]


class TestScoreAnswers:
    def test_choice_is_greedy_decoding_along_the_trie(self, generator: torch.Generator) -> None:
        verdicts = []
        for _ in range(20):
            model, end = TinyLanguageModel(generator, 6), 5
            prompt = torch.randint(0, 5, (3,), generator=generator).tolist()
            answers = list(random_answers(generator, end))
            decoded = decode(model, prompt, answers, end, limit=9)
            for target in (decoded, answers[0]):
                scores = score(model, prompt, target, answers)
                assert scores.closed_B.tolist() == [True]
                assert scores.choice_B.tolist() == [target == decoded]
                verdicts.append(target == decoded)
        assert 20 <= sum(verdicts) < 40  # both verdicts were met

    def test_exact_is_greedy_decoding(self, generator: torch.Generator) -> None:
        for _ in range(10):
            model, end = TinyLanguageModel(generator, 6), 5
            prompt = torch.randint(0, 5, (3,), generator=generator).tolist()
            decoded = decode(model, prompt, None, end, limit=5)
            changed = [*decoded[:-1], (decoded[-1] + 1) % 6]
            for target in (decoded, changed):
                scores = score(model, prompt, target, None)
                assert scores.exact_B.tolist() == [target == decoded]
                assert scores.closed_B.tolist() == [False]
                assert scores.choice_B.tolist() == [False]

    def test_rows_are_kept_apart(self, generator: torch.Generator) -> None:
        hidden_SD, head, labels_S = random_problem(generator)
        hidden_SD, labels_S = hidden_SD[:6].detach(), labels_S[:6]
        labels_S[:4] = head(hidden_SD[:4]).argmax(1)
        labels_S[4:] = head(hidden_SD[4:]).argmin(1)
        row_S = torch.tensor([0, 0, 2, 2, 2, 3])
        others_S = (labels_S + 1) % V
        choices_SK = torch.stack([others_S, labels_S], dim=1)
        choices_SK[5] = labels_S[5]  # a single way to go on, and an unlikely one
        choices_SK[1] = -1  # row 0 is closed at its first position only, and that is what counts

        scores = score_answers(hidden_SD, head, labels_S, choices_SK, row_S, chunk_size=4, num_rows=5)

        assert scores.count_B.tolist() == [2, 0, 3, 1, 0]
        assert scores.exact_B.tolist() == [True, False, False, False, False]
        assert scores.closed_B.tolist() == [True, False, True, True, False]
        assert scores.choice_B.tolist() == [True, False, False, True, False]
        nll_S = F.cross_entropy(head(hidden_SD), labels_S, reduction="none")
        expected_B = torch.stack([nll_S[row_S == row].sum() for row in range(5)])
        torch.testing.assert_close(scores.nll_B, expected_B.detach(), rtol=1e-6, atol=0)

    def test_no_position(self, generator: torch.Generator) -> None:
        hidden_SD, head, labels_S = random_problem(generator)
        scores = score_answers(hidden_SD[:0], head, labels_S[:0], labels_S.new_empty(0, 0), labels_S[:0])
        assert scores.count_B.shape == scores.exact_B.shape == scores.choice_B.shape == (0,)

    def test_padding_is_no_choice(self, generator: torch.Generator) -> None:
        hidden_SD, head, _ = random_problem(generator)
        with torch.no_grad():
            head.bias[0] = 1000.0  # token 0 is the likeliest everywhere; -1 must not stand for it, nor hide it
        choices_SK = torch.tensor([[3, -1, -1], [0, 3, -1]])
        scores = score_answers(hidden_SD[:2], head, torch.tensor([3, 3]), choices_SK, torch.tensor([0, 1]))
        assert scores.choice_B.tolist() == [True, False]

    def test_equally_likely_tokens(self, generator: torch.Generator) -> None:
        hidden_SD, head, _ = random_problem(generator)
        with torch.no_grad():
            head.weight[7], head.bias[7] = head.weight[4], head.bias[4].add_(1000.0)
        scores = score_answers(hidden_SD[:2], head, torch.tensor([4, 7]), torch.tensor([[7, 4], [7, 4]]), torch.tensor([0, 1]))
        assert scores.exact_B.tolist() == [True, False]
        assert scores.choice_B.tolist() == [True, False]

    def test_same_likelihood_as_the_loss(self, generator: torch.Generator) -> None:
        hidden_SD, head, labels_S = random_problem(generator)
        row_S = torch.arange(S) // 10
        scores = score_answers(hidden_SD, head, labels_S, labels_S.new_empty(S, 0), row_S, 8, softcap=4.0, scale=0.5)
        expected, _, _ = cross_entropy(hidden_SD, head, labels_S, 8, softcap=4.0, scale=0.5)
        torch.testing.assert_close(scores.nll_B.sum(), expected, rtol=1e-6, atol=0)
        assert not scores.closed_B.any()

    def test_other_number_of_choices_is_refused(self, generator: torch.Generator) -> None:
        hidden_SD, head, labels_S = random_problem(generator)
        with pytest.raises(ValueError, match="37 labels, 36 rows of choices"):
            score_answers(hidden_SD, head, labels_S, labels_S[1:, None], torch.zeros(S, dtype=torch.long))
