"""The language model's loss and its answers' scores, without ever forming the logits of all positions.

Both look at supervised positions only, and at `chunk_size` of them at a time: the logits of one chunk exist, not [B, T, V].
The gradient of a chunk is computed while its logits are there, in the forward pass; backward only scales it.

Shape suffixes: B rows, T tokens, S supervised positions, C a chunk of them, D width, V vocabulary, K choices, 1 one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from datamodules.batch import IGNORE_INDEX
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


def supervised(hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Picks the hidden states that predict a label: position t predicts token t + 1.

    The label of a row's first token has nothing before it and is not used. In a packed row, the first label of
    every segment must be -100, or the last position of the segment before would predict it.

    Args:
        hidden_BTD: Last hidden states of the language model.
        labels_BT: Token ids, -100 where there is no loss; not shifted.

    Returns:
        hidden_SD and labels_S, in row-major order.

    Raises:
        ValueError: The two differ in rows or tokens.
    """
    if hidden_BTD.shape[:2] != labels_BT.shape:
        shapes = f"{tuple(hidden_BTD.shape)} and labels {tuple(labels_BT.shape)}"
        raise ValueError(f"hidden states are {shapes}: expected (B, T, D) and (B, T)")
    next_BT = _next_labels(labels_BT)
    supervised_BT = next_BT != IGNORE_INDEX
    return hidden_BTD[supervised_BT], next_BT[supervised_BT]


def supervised_rows(labels_BT: Tensor) -> Tensor:
    """The row of each position that `supervised` picks: row_S, in the same order."""
    return (_next_labels(labels_BT) != IGNORE_INDEX).nonzero()[:, 0]


def cross_entropy(
    hidden_SD: Tensor, head: nn.Module, labels_S: Tensor, chunk_size: int = 512, softcap: float | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the labels, summed, with gradients for `hidden_SD` and what the head trains.

    The logits are softcap(scale * head(hidden)), where softcap(x) = c * tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2).
    Softmax and sums are in float32 also where weights are not. A plain `nn.Linear` has a path of its own; any other head
    (with adapters, quantised, hooked, scaled, capped) is differentiated by autograd. Differentiating twice raises.

    Args:
        hidden_SD: Hidden states of the supervised positions, from `supervised`.
        head: Hidden states to logits: (C, D) to (C, V).
        labels_S: The token id to predict at each position.
        chunk_size: Positions whose logits exist at a time.
        softcap: Bound c of the logits; None: no bound.
        scale: Factor of the logits before the bound.

    Returns:
        The sum (nats), the number of positions, and `correct`, the number of positions whose likeliest token is the label.

    Raises:
        ValueError: The arguments do not fit together.
    """
    check_positions(hidden_SD, labels_S, chunk_size, softcap)
    gradients = zero_gradients(hidden_SD, head)
    with torch.no_grad():
        if is_plain_linear(head) and softcap is None and scale == 1.0:
            nll_S, correct_S = linear_chunks(hidden_SD, head, labels_S, chunk_size, product_dtype(head), gradients)
        else:
            logits = partial(capped_logits, head, softcap, scale)
            nll_S, correct_S = autograd_chunks(hidden_SD, logits, labels_S, chunk_size, gradients)
        nll = sum((nll_S[rows].sum() for rows in chunks(len(labels_S), chunk_size)), start=nll_S.new_zeros(()))
    if gradients:
        nll = _WithGradients.apply(nll, [total.to(x.dtype) for x, total in gradients.items()], *gradients)
    return nll, torch.tensor(len(labels_S), device=hidden_SD.device), {"correct": correct_S.sum()}


@dataclass(frozen=True)
class AnswerScores:
    """How a model takes the right answers, by row.

    Args:
        nll_B: Negative log-likelihood of the row's labels, summed (nats).
        count_B: Supervised positions of the row.
        exact_B: Greedy decoding gives exactly the labels. False where nothing is supervised.
        choice_B: Greedy decoding among the row's choices gives exactly the labels that are closed. False where none is.
        closed_B: The row has choices, at some of its supervised positions (of several answers the last may be closed).
    """

    nll_B: Tensor
    count_B: Tensor
    exact_B: Tensor
    choice_B: Tensor
    closed_B: Tensor


@torch.no_grad()
def score_answers(
    hidden_SD: Tensor,
    head: nn.Module,
    labels_S: Tensor,
    choices_SK: Tensor,
    row_S: Tensor,
    chunk_size: int = 512,
    softcap: float | None = None,
    scale: float = 1.0,
    num_rows: int | None = None,
) -> AnswerScores:
    """Likelihood of the right answers, and whether greedy decoding would give them, in one forward pass.

    Greedy decoding that has given the first n labels stands before the prefix that the forward pass over prompt and labels
    has there, so it gives label n + 1 if and only if that is the likeliest token of the position. By induction it gives
    exactly the labels if and only if each is the likeliest at its position. The same holds for decoding along the trie of
    some allowed answers: behind the first n labels it may give the tokens with which some answer continues, which are the
    choices of that position; so it ends at the right answer if and only if each label is the likeliest of its choices.
    Labels and choices include the end token. Of equally likely tokens the lowest id is taken.

    Args:
        hidden_SD: Hidden states of the supervised positions, from `supervised`.
        head: Hidden states to logits: (C, D) to (C, V).
        labels_S: The token id to predict at each position.
        choices_SK: The token ids allowed at each position, padded with -1; only -1: the answer is open.
        row_S: Row of each position, from `supervised_rows`.
        chunk_size: Positions whose logits exist at a time.
        softcap: As in `cross_entropy`.
        scale: As in `cross_entropy`.
        num_rows: Rows B of the result; None: up to the last row with a supervised position.

    Raises:
        ValueError: The arguments do not fit together.
    """
    check_positions(hidden_SD, labels_S, chunk_size, softcap)
    if len(choices_SK) != len(labels_S) or len(row_S) != len(labels_S):
        lengths = f"{len(labels_S)} labels, {len(choices_SK)} rows of choices, {len(row_S)} row numbers"
        raise ValueError(f"got {lengths}: expected one of each for every supervised position, in row-major order")
    logits = partial(capped_logits, head, softcap, scale)
    nll_S, exact_S, choice_S = _score_positions(hidden_SD, logits, labels_S, choices_SK, chunk_size)
    if num_rows is None:
        num_rows = int(row_S.max()) + 1 if len(row_S) else 0

    def per_row(values_S: Tensor) -> Tensor:
        return values_S.new_zeros(num_rows).index_add_(0, row_S, values_S)

    def everywhere(flags_S: Tensor) -> Tensor:
        return (per_row(flags_S.long()) == count_B) & (count_B > 0)

    count_B = per_row(torch.ones_like(row_S))
    closed_S = (choices_SK >= 0).any(1)
    closed_B = per_row(closed_S.long()) > 0
    return AnswerScores(per_row(nll_S), count_B, everywhere(exact_S), everywhere(choice_S | ~closed_S) & closed_B, closed_B)


class _WithGradients(torch.autograd.Function):
    """Gives a value the gradients that were computed beside it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * grad for gradient in ctx.saved_tensors)  # not in place: may run again


def _score_positions(
    hidden_SD: Tensor, logits: Callable[[Tensor], Tensor], labels_S: Tensor, choices_SK: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each position: nll, whether the label is the likeliest token, and whether it is the likeliest choice."""
    nll_S = hidden_SD.new_empty(len(labels_S), dtype=wide(hidden_SD))
    exact_S = torch.empty_like(labels_S, dtype=torch.bool)
    choice_S = torch.empty_like(exact_S)
    choices_SK = F.pad(choices_SK, (0, 1), value=-1)  # so that K is not 0
    for rows in chunks(len(labels_S), chunk_size):
        logits_CV, label_C, choices_CK = logits(hidden_SD[rows]), labels_S[rows], choices_SK[rows]
        nll_S[rows] = F.cross_entropy(logits_CV, label_C, reduction="none")
        exact_S[rows] = logits_CV.argmax(1) == label_C
        scores_CK = logits_CV.gather(1, choices_CK.clamp(min=0)).masked_fill(choices_CK < 0, -torch.inf)
        likeliest_CK = scores_CK == scores_CK.amax(1, keepdim=True)
        choice_S[rows] = choices_CK.where(likeliest_CK, logits_CV.shape[1]).amin(1) == label_C
    return nll_S, exact_S, choice_S


def _next_labels(labels_BT: Tensor) -> Tensor:
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
