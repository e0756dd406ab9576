"""What an engine that sums up gradients in buckets relies on: their order does not depend on the media of a batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.batch import Batch
from encoders.tuning import LoRA, Tune
from models.cross_attention import GatedCrossAttentionFusion
from models.fusion import ConcatFusion, Fusion
from models.multimodal import MultiModalModel
from models.zero import LastGradients
from tests.conftest import NUM_PATCHES

LAYOUTS: list[list[list[int | str]]] = [[[3, "a", 4], [2, "b", 3]], [[5, 3], [4]]]


def backward(model: MultiModalModel, batch: Batch) -> dict[str, Tensor]:
    """The gradients of all weights that get some, in the order in which they get them."""
    names: list[str] = []
    model.zero_grad()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    hooks = [
        weight.register_post_accumulate_grad_hook(lambda _, name=name: names.append(name)) for name, weight in weights.items()
    ]
    model(batch).square().sum().backward()
    for hook in hooks:
        hook.remove()
    return {name: gradient.clone() for name in names if (gradient := weights[name].grad) is not None}


@pytest.mark.parametrize(
    ("fusion", "placeholders"),
    [(ConcatFusion(), NUM_PATCHES), (GatedCrossAttentionFusion(every=1, num_heads=2, head_dim=4), 0)],
    ids=["concatenated", "attended to"],
)
def test_gradients_come_in_one_order(
    make_model: Callable[..., Any], make_batch: Callable[..., Batch], fusion: Fusion, placeholders: int
) -> None:
    model = make_model(fusion=fusion, encoder_tune=Tune(mode="lora", lora=LoRA(target_modules=("q_proj",))))
    batches = [make_batch(layout, placeholders=placeholders) for layout in LAYOUTS]
    alone = [backward(model, batch) for batch in batches]
    assert alone[1].keys() < alone[0].keys()
    last = LastGradients(model, by_layer=False)
    helped = []
    for batch in batches:
        last.begin()
        helped.append(backward(model, batch))
        last.end()
    assert list(helped[0]) == list(helped[1]) and helped[0].keys() == alone[0].keys()
    for own, gradients in zip(alone, helped, strict=True):
        assert all(torch.equal(gradient, own.get(name, torch.zeros_like(gradient))) for name, gradient in gradients.items())
