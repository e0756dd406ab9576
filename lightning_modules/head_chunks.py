"""The language model's head, a chunk of positions at a time: likelihoods of the labels, and their gradients.

What `losses` and `logprobs` share. The logits of one chunk exist, never those of all positions.

Shape suffixes: S positions, C a chunk of them, D width, V vocabulary, 1 one.
"""

from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.tuning import is_plain

Gradients = dict[Tensor, Tensor]  # the running gradient of each tensor that needs one; tensors hash by identity
Observer = Callable[[slice, Tensor], None]  # sees the logits of a chunk, and which positions they are


def zero_gradients(hidden_SD: Tensor, head: nn.Module) -> Gradients:
    """A zero, in float32 at least, for each tensor that needs a gradient; none where gradients are off."""
    inputs = [hidden_SD, *head.parameters()] if torch.is_grad_enabled() else []
    return {x: torch.zeros_like(x, dtype=wide(x)) for x in inputs if x.requires_grad}


def linear_chunks(
    hidden_SD: Tensor,
    head: nn.Linear,
    labels_S: Tensor,
    chunk_size: int,
    dtype: torch.dtype,
    gradients: Gradients,
    weight_S: Tensor | None = None,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each label, and whether it is the likeliest token, for a plain linear head.

    Args:
        hidden_SD: Hidden states.
        head: The head, `is_plain_linear`.
        labels_S: The token id to predict at each position.
        chunk_size: Positions whose logits exist at a time.
        dtype: In which the products run, from `product_dtype`.
        gradients: Gets the gradients of the sum of nll_S * weight_S.
        weight_S: Weight of each position in the gradients; None: 1.
        observe: Sees the logits of each chunk; may not change them.
    """
    weight_VD = head.weight.to(dtype)
    nll_S = hidden_SD.new_empty(len(labels_S), dtype=wide(weight_VD))
    correct_S = torch.empty_like(labels_S, dtype=torch.bool)
    buffer_CV = weight_VD.new_empty(min(chunk_size, len(labels_S)), len(weight_VD))
    with torch.autocast(hidden_SD.device.type, enabled=False):
        for rows in chunks(len(labels_S), chunk_size):
            hidden_CD, label_C1 = hidden_SD[rows].to(dtype), labels_S[rows].unsqueeze(1)
            product_CV = torch.mm(hidden_CD, weight_VD.T, out=buffer_CV[: len(hidden_CD)])
            logits_CV = product_CV.to(nll_S.dtype)  # the same tensor, unless the weights have fewer bits
            if head.bias is not None:
                logits_CV += head.bias
            if observe is not None:
                observe(rows, logits_CV)
            probs_CV, nll_C1, best_C1 = _softmax_(logits_CV, label_C1)
            nll_S[rows], correct_S[rows] = nll_C1[:, 0], (best_C1 == label_C1)[:, 0]
            if gradients:
                probs_CV.scatter_add_(1, label_C1, torch.full_like(nll_C1, -1.0))
                weight_C = None if weight_S is None else weight_S[rows]
                _add_linear_gradients(hidden_SD, head, weight_VD, rows, probs_CV, hidden_CD, weight_C, gradients)
    return nll_S, correct_S


def _add_linear_gradients(
    hidden_SD: Tensor,
    head: nn.Linear,
    weight_VD: Tensor,
    rows: slice,
    residual_CV: Tensor,
    hidden_CD: Tensor,
    weight_C: Tensor | None,
    gradients: Gradients,
) -> None:
    """Adds a chunk's gradients; a weight of the position scales what is D wide, never what is V wide."""
    grad_CV = residual_CV.to(weight_VD.dtype)
    if hidden_SD in gradients:
        gradient_CD = grad_CV @ weight_VD
        gradients[hidden_SD][rows] = gradient_CD if weight_C is None else gradient_CD * weight_C.unsqueeze(1)
    if head.weight in gradients:
        weighted_CD = hidden_CD if weight_C is None else (hidden_CD * weight_C.unsqueeze(1)).to(hidden_CD.dtype)
        _add_product_(gradients[head.weight], grad_CV.T, weighted_CD)
    if head.bias is not None and head.bias in gradients:
        gradients[head.bias] += residual_CV.sum(0) if weight_C is None else residual_CV.T @ weight_C.to(residual_CV.dtype)


def _softmax_(logits_CV: Tensor, label_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turns logits into probabilities, in place; returns them with the labels' nll and the likeliest ids."""
    max_C1, best_C1 = logits_CV.max(1, keepdim=True)
    label_logit_C1 = logits_CV.gather(1, label_C1)
    sum_C1 = logits_CV.sub_(max_C1).exp_().sum(1, keepdim=True)
    return logits_CV.div_(sum_C1), sum_C1.log() + max_C1 - label_logit_C1, best_C1


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)  # without a temporary as large as the head
    else:
        total += left @ right


def autograd_chunks(
    hidden_SD: Tensor,
    logits: Callable[[Tensor], Tensor],
    labels_S: Tensor,
    chunk_size: int,
    gradients: Gradients,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear_chunks`, for any head: hidden states of a chunk to its logits. Adds the gradients of the sum of nll_S."""
    nll_S = hidden_SD.new_empty(len(labels_S), dtype=wide(hidden_SD))
    correct_S = torch.empty_like(labels_S, dtype=torch.bool)
    for rows in chunks(len(labels_S), chunk_size):
        hidden_CD = hidden_SD[rows].detach().requires_grad_(hidden_SD in gradients)
        with torch.set_grad_enabled(bool(gradients)):
            logits_CV = logits(hidden_CD)
            nll_C = F.cross_entropy(logits_CV, labels_S[rows], reduction="none")
            total_nll = nll_C.sum()
        nll_S[rows] = nll_C.detach()
        correct_S[rows] = logits_CV.detach().argmax(1) == labels_S[rows]
        if observe is not None:
            observe(rows, logits_CV.detach())
        if gradients:
            wanted = [hidden_CD if x is hidden_SD else x for x in gradients]
            totals = [total[rows] if x is hidden_SD else total for x, total in gradients.items()]
            for total, gradient in zip(totals, torch.autograd.grad(total_nll, wanted, materialize_grads=True), strict=True):
                total += gradient
    return nll_S, correct_S


def capped_logits(head: nn.Module, softcap: float | None, scale: float, hidden_CD: Tensor) -> Tensor:
    """softcap(scale * head(hidden)) in float32 at least, where softcap(x) = c * tanh(x / c); None: not capped."""
    logits_CV = head(hidden_CD)
    logits_CV = logits_CV.to(wide(logits_CV))
    if scale != 1.0:
        logits_CV = scale * logits_CV
    return logits_CV if softcap is None else softcap * torch.tanh(logits_CV / softcap)


def is_plain_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling `head` is one matrix product: no subclass, no quantised or sharded weight, no hooks."""
    return (
        type(head) is nn.Linear
        and is_plain(head.weight)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )


def product_dtype(head: nn.Linear) -> torch.dtype:
    """In which the head's product runs: that of its weight, or autocast's."""
    device = head.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype


def chunks(total: int, chunk_size: int) -> Iterator[slice]:
    """Slices of at most `chunk_size` that cover `total` positions."""
    return (slice(start, min(start + chunk_size, total)) for start in range(0, total, chunk_size))


def wide(x: Tensor) -> torch.dtype:
    """In which sums over `x` are kept: its own type, float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def check_positions(hidden_SD: Tensor, labels_S: Tensor, chunk_size: int, softcap: float | None) -> None:
    """Refuses hidden states, labels and options that do not fit together.

    Raises:
        ValueError: With what was got.
    """
    if hidden_SD.ndim != 2 or labels_S.shape != hidden_SD.shape[:1]:
        shapes = f"{tuple(hidden_SD.shape)} and labels {tuple(labels_S.shape)}"
        raise ValueError(f"hidden states are {shapes}: expected (S, D) and (S,), as losses.supervised gives them")
    if (labels_S < 0).any():
        raise ValueError(f"labels hold {int(labels_S.min())}: expected token ids alone, as losses.supervised gives them")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is a number of positions and must be at least 1, got {chunk_size}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap bounds the logits and must be above 0, got {softcap}; None means no bound")
