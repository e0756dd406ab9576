import copy
import json
import pickle
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import nn

from encoders.base import Encoder, Part, Projector
from encoders.image import HFVisionEncoder, TimmEncoder
from encoders.projectors import LinearProjector, MLPProjector, PixelShuffleMLPProjector
from encoders.tuning import LoRA, Tune


class Normed(Part):
    """A small part with what changes in training: dropout and running statistics."""

    def __init__(self, width: int = 6, tune: Tune | None = None) -> None:
        super().__init__(tune or Tune(mode="frozen"))
        self.width = width

    def build(self) -> None:
        self.model = nn.Sequential(nn.Linear(self.width, self.width), nn.BatchNorm1d(self.width), nn.Dropout(0.5))
        self.apply_tune(self.model)


class Scaled(MLPProjector):
    """A subclass in the documented idiom."""

    def __init__(self, *args: Any, scale: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale


PARTS = [
    TimmEncoder(model_name="test_vit", pretrained=False, layer=-2, tune=Tune(mode="lora", lora=LoRA(target_modules=("qkv",)))),
    HFVisionEncoder(name_or_path="some/model", tokens="all", dtype="bfloat16", resize="pad"),
    LinearProjector(tune=Tune(mode="full", lr=1e-3)),
    MLPProjector(depth=3, activation="silu", norm=True),
    PixelShuffleMLPProjector(factor=3, hidden_size=7),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_part_comes_back_from_its_json(part):
    base = Encoder if isinstance(part, Encoder) else Projector
    again = base.from_spec(json.loads(json.dumps(part.spec())))
    assert type(again) is type(part)
    for name, value in part.options.items():
        assert again.options[name] == value
    assert again.tune == part.tune


def test_options_of_a_subclass_are_remembered_flat():
    part = Scaled(depth=1, scale=3.0)
    assert part.options == {**MLPProjector().options, "depth": 1, "scale": 3.0}
    assert (part.depth, part.scale) == (1, 3.0)
    again = pickle.loads(pickle.dumps(part))
    assert again.options == part.options
    assert copy.deepcopy(part).spec() == part.spec()
    with pytest.raises(TypeError, match="takes its options by keyword"):
        Scaled(1)


@pytest.mark.parametrize(
    "spec",
    [
        {"class_path": "encoders.projectors.MLPProjector", "init_args": {"deepth": 2}},
        {"class_path": "encoders.projectors.NoSuchProjector", "init_args": {}},
        {"class_path": "encoders.image.TimmEncoder", "init_args": {"model_name": "test_vit"}},
    ],
    ids=["option", "class", "other base"],
)
def test_spec_that_does_not_fit_is_refused(spec):
    with pytest.raises(ValueError, match=f"{spec['class_path']} cannot be made from its saved options"):
        Projector.from_spec(spec)


def test_build_leaves_frozen_parts_in_evaluation_mode():
    part = Normed()
    part.build()
    assert not part.model.training
    nn.Sequential(part).train()
    assert not any(module.training for module in part.modules())
    part = Normed(tune=Tune(mode="full"))
    part.build()
    assert all(module.training for module in part.modules())
    part.eval()
    assert not any(module.training for module in part.modules())


def test_lora_keeps_the_statistics_of_the_frozen_weights():
    part = Normed(tune=Tune(mode="lora", lora=LoRA(target_modules=("0",))))
    part.build()
    part.train()
    linear, norm, dropout = part.model
    assert linear.training
    assert dropout.training
    assert not norm.training
    before = norm.running_mean.clone()
    part.model(torch.randn(4, 6, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("path", ["encoders.image.TimmEncoder", "encoders.image_timm.TimmEncoder", "TimmEncoder"])
def test_every_name_of_a_class_makes_the_same_part(path):
    part = Encoder.from_spec({"class_path": path, "init_args": {"model_name": "test_vit", "pool": 2}})
    assert type(part) is TimmEncoder
    assert part.spec() == TimmEncoder(model_name="test_vit", pool=2).spec()


class Slips(Normed):
    """A researcher's part whose properties have slips."""

    @property
    def plain(self) -> int:
        return self.width.no_such_plain

    @cached_property
    def cached(self) -> int:
        return self.plain


def test_slip_in_a_property_shows_its_own_message():
    part = Slips()
    for name in ("plain", "cached"):
        with pytest.raises(AttributeError, match="'int' object has no attribute 'no_such_plain'"):
            getattr(part, name)
    with pytest.raises(AttributeError, match="'Slips' object has no attribute 'missing'"):
        part.missing  # noqa: B018
