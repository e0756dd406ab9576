"""Log-probabilities of answers, token by token and summed by answer: what every preference objective is made of.

As in `losses`, only supervised positions are looked at, and the logits of one chunk exist at a time.

Shape suffixes: S supervised positions, C a chunk of them, D width, V vocabulary, A answers, P pairs, 1 one.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lightning_modules.head_chunks import (
    autograd_chunks,
    capped_logits,
    check_positions,
    chunks,
    is_plain_linear,
    linear_chunks,
    product_dtype,
    wide,
    zero_gradients,
)

Statistic = Literal["entropy", "log_square", "mean_logit"]


@dataclass(frozen=True)
class TokenScores:
    """What a model makes of each label. Only `logps_S` carries gradients.

    Args:
        logps_S: Log-probability of the label (nats).
        correct_S: Whether the label is the likeliest token.
        statistics: Of each position, by name: `entropy` of the next token (nats), `log_square`, the logarithm of the sum over
            the vocabulary of p squared (WPO, arXiv 2406.11827), `mean_logit` over the vocabulary.
    """

    logps_S: Tensor
    correct_S: Tensor
    statistics: dict[Statistic, Tensor]


def token_logps(
    hidden_SD: Tensor, head: nn.Module, labels_S: Tensor, chunk_size: int = 512, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """Log-probability of each label, logps_S, with gradients for `hidden_SD` and what the head trains.

    Statistics are in float32 also where weights are not. Under a frozen head, of any kind, the gradient of each position's
    log-probability is computed while its logits are there (W[label] - p W for a plain `nn.Linear`); backward only scales it, and
    what is kept for it is as large as `hidden_SD`. Under a head that trains, backward computes the logits again, chunk by chunk.
    Differentiating twice raises, unless the head trains and is no plain linear layer.

    Args:
        hidden_SD: Hidden states of the supervised positions, from `losses.supervised`.
        head: Hidden states to logits: (C, D) to (C, V), each position for itself.
        labels_S: The token id to predict at each position.
        chunk_size: Positions whose logits exist at a time.
        softcap: Bound c of the logits, as in `losses.cross_entropy`; None: no bound.
        scale: Factor of the logits before the bound.

    Raises:
        ValueError: The arguments do not fit together.
    """
    return score_tokens(hidden_SD, head, labels_S, chunk_size, softcap, scale).logps_S


def score_tokens(
    hidden_SD: Tensor,
    head: nn.Module,
    labels_S: Tensor,
    chunk_size: int = 512,
    softcap: float | None = None,
    scale: float = 1.0,
    want: Collection[Statistic] = (),
) -> TokenScores:
    """`token_logps`, with what else the logits tell.

    Args:
        hidden_SD: As in `token_logps`.
        head: As in `token_logps`.
        labels_S: As in `token_logps`.
        chunk_size: As in `token_logps`.
        softcap: As in `token_logps`.
        scale: As in `token_logps`.
        want: Statistics to compute; each costs passes over the logits.

    Raises:
        ValueError: The arguments do not fit together.
    """
    check_positions(hidden_SD, labels_S, chunk_size, softcap)
    head_trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())
    plain = is_plain_linear(head) and softcap is None and scale == 1.0
    logits = partial(capped_logits, head, softcap, scale)
    if head_trains and not plain:
        return _checkpointed(hidden_SD, logits, labels_S, chunk_size, want)
    gradients = {} if head_trains else zero_gradients(hidden_SD, head)
    parts: dict[Statistic, list[Tensor]] = {name: [] for name in want}

    def observe(rows: slice, logits_CV: Tensor) -> None:
        for name, values in parts.items():
            values.append(_STATISTICS[name](logits_CV))

    with torch.no_grad():
        if is_plain_linear(head) and plain:
            dtype = product_dtype(head)
            nll_S, correct_S = linear_chunks(hidden_SD, head, labels_S, chunk_size, dtype, gradients, observe=observe)
        else:
            nll_S, correct_S = autograd_chunks(hidden_SD, logits, labels_S, chunk_size, gradients, observe)
        logps_S = -nll_S
    if head_trains:
        logps_S = _Recomputed.apply(logps_S, head, labels_S, chunk_size, dtype, hidden_SD, head.weight, head.bias)
    elif gradients:
        logps_S = _WithDirections.apply(logps_S, gradients[hidden_SD].neg_().to(hidden_SD.dtype), hidden_SD)
    return TokenScores(logps_S, correct_S, {name: _cat(values, logps_S) for name, values in parts.items()})


class _WithDirections(torch.autograd.Function):
    """Gives the value of each position the gradient that was computed beside it."""

    @staticmethod
    def forward(ctx: Any, logps_S: Tensor, directions_SD: Tensor, hidden_SD: Tensor) -> Tensor:
        ctx.save_for_backward(directions_SD)
        return logps_S.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:
        (directions_SD,) = ctx.saved_tensors
        return None, None, (grad_S.unsqueeze(1) * directions_SD).to(directions_SD.dtype)


class _Recomputed(torch.autograd.Function):
    """Gives the values of a plain linear head that trains their gradients, from logits that are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        logps_S: Tensor,
        head: nn.Linear,
        labels_S: Tensor,
        chunk_size: int,
        dtype: torch.dtype,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden_SD, labels_S, weight_VD, bias_V)  # also tells of a weight that was changed in between
        ctx.options = head, chunk_size, dtype
        return logps_S.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:
        hidden_SD, labels_S, *_ = ctx.saved_tensors
        head, chunk_size, dtype = ctx.options
        inputs = [hidden_SD, head.weight, head.bias]
        needed = ctx.needs_input_grad[-3:]
        gradients = {x: torch.zeros_like(x, dtype=wide(x)) for x, need in zip(inputs, needed, strict=True) if need}
        linear_chunks(hidden_SD, head, labels_S, chunk_size, dtype, gradients, weight_S=-grad_S)
        totals = (gradients[x].to(x.dtype) if need else None for x, need in zip(inputs, needed, strict=True))
        return None, None, None, None, None, *totals


def _checkpointed(
    hidden_SD: Tensor, logits: Callable[[Tensor], Tensor], labels_S: Tensor, chunk_size: int, want: Collection[Statistic]
) -> TokenScores:
    """Any head that trains: autograd through one chunk at a time (with the same dropout when it is computed again)."""

    def score(hidden_CD: Tensor, label_C: Tensor) -> tuple[Tensor, ...]:
        logits_CV = logits(hidden_CD)
        logps_C = -F.cross_entropy(logits_CV, label_C, reduction="none")
        with torch.no_grad():
            return logps_C, logits_CV.argmax(1) == label_C, *(_STATISTICS[name](logits_CV) for name in want)

    slices = list(chunks(len(labels_S), chunk_size)) or [slice(0, 0)]
    parts = [checkpoint(score, hidden_SD[rows], labels_S[rows], use_reentrant=False) for rows in slices]
    logps_S, correct_S, *statistics = (torch.cat(values) for values in zip(*parts, strict=True))
    return TokenScores(logps_S, correct_S, dict(zip(want, statistics, strict=True)))


def _entropy(logits_CV: Tensor) -> Tensor:
    logps_CV = logits_CV.log_softmax(1)
    return -(logps_CV.exp() * logps_CV).sum(1)


def _log_square(logits_CV: Tensor) -> Tensor:
    return (2 * logits_CV).logsumexp(1) - 2 * logits_CV.logsumexp(1)


_STATISTICS: dict[Statistic, Callable[[Tensor], Tensor]] = {
    "entropy": _entropy,
    "log_square": _log_square,
    "mean_logit": lambda logits_CV: logits_CV.mean(1),
}


def _cat(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(values) if values else like.new_empty(0)


@dataclass(frozen=True)
class AnswerLogps:
    """Log-probabilities of the tokens of A answers, and their sums.

    Args:
        logps_S: Log-probability of each supervised token.
        answer_S: The answer that it belongs to; tokens of one answer are in reading order.
        num_answers: A.
    """

    logps_S: Tensor
    answer_S: Tensor
    num_answers: int

    def counts(self) -> Tensor:
        """Tokens of each answer, count_A."""
        return self.logps_S.new_zeros(self.num_answers).index_add(0, self.answer_S, torch.ones_like(self.logps_S))

    def sums(self, weight_S: Tensor | None = None) -> Tensor:
        """Log-probability of each answer, sum_A.

        Args:
            weight_S: Factor of each token's log-probability, such as the larger one of corrected tokens in RLHF-V
                (arXiv 2312.00849); None: 1.
        """
        values_S = self.logps_S if weight_S is None else weight_S * self.logps_S
        return values_S.new_zeros(self.num_answers).index_add(0, self.answer_S, values_S)

    def means(self) -> Tensor:
        """Log-probability of each answer divided by its tokens, mean_A; 0 for an answer without tokens."""
        return self.sums() / self.counts().clamp(min=1)

    def sums_by_length(self, answer_P: Tensor, length_P: Tensor, weight_beyond: float) -> Tensor:
        """Log-probability of some answers, in which the tokens beyond a length count less, sum_P.

        Args:
            answer_P: The answers; one may come several times, with several lengths.
            length_P: Tokens that count fully.
            weight_beyond: Factor of the log-probability of those after them.
        """
        belongs_AS = torch.arange(self.num_answers, device=self.answer_S.device).unsqueeze(1) == self.answer_S
        place_S = belongs_AS.cumsum(1).gather(0, self.answer_S.unsqueeze(0))[0]  # counted from 1 within the answer
        weight_PS = torch.where(place_S <= length_P.unsqueeze(1), 1.0, weight_beyond) * belongs_AS[answer_P]
        return (weight_PS.to(self.logps_S.dtype) * self.logps_S).sum(1)  # no product of matrices: autocast would round it
