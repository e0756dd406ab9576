"""A video encoder around a tiny image encoder: what it gives, what it trains, and that padding does not count."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.media_video import Clip
from encoders.base import Encoder
from encoders.image import HFVisionEncoder, TimmEncoder
from encoders.sampling import FrameSampling
from encoders.tuning import LoRA, Tune
from encoders.video import Pool, VideoEncoder

FROZEN, FULL = Tune(mode="frozen"), Tune(mode="full")
NUM_PATCHES, SIZE = 16, 24


@pytest.fixture
def clip_folder(tiny_clip: Path) -> str:
    return str(tiny_clip)


def make(folder: str, frames_tune: Tune = FROZEN, trained: bool = True, **options: Any) -> VideoEncoder:
    """A built encoder; `trained`: with blocks whose zeros have become something."""
    encoder = VideoEncoder(HFVisionEncoder(name_or_path=folder, layer=-2, tune=frames_tune), num_heads=4, **options)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        encoder.build()
        if trained:
            for parameter in encoder.blocks.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
    return encoder


def clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def some_clip(num_frames: int, height: int, width: int) -> Clip:
    frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    return Clip(frames, np.arange(num_frames) / 4)


def expected_mask(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("masked", [False, True])
def test_untrained_it_is_the_image_encoder_on_each_frame(masked: bool, clip_folder: str) -> None:
    encoder, media = make(clip_folder, trained=False), clips(2, 3)
    mask = expected_mask([3, 2]) if masked else None
    features_BMD, mask_BM = encoder(media, mask)
    alone = torch.stack([encoder.frames(clip)[0].flatten(0, 1) for clip in media])
    real = torch.ones(2, 48, dtype=torch.bool) if mask_BM is None else mask_BM
    assert real.sum().item() == (80 if masked else 96)
    torch.testing.assert_close(features_BMD[real], alone[real], atol=1e-6, rtol=1e-6)
    assert not torch.equal(make(clip_folder)(media)[0], alone)


@pytest.mark.parametrize("pool", ["none", "time", "space"])
@pytest.mark.parametrize("num_layers", [0, 2])
def test_numbers_and_padding(pool: Pool, num_layers: int, clip_folder: str) -> None:
    encoder = make(clip_folder, pool=pool, num_layers=num_layers)
    lengths = [4, 1, 3]
    mask = expected_mask(lengths)
    media = clips(3, 4) * mask[..., None, None, None]
    features_BMD, mask_BM = encoder(media, mask)
    for place, length in enumerate(lengths):
        alone_1MD, mask_1M = encoder(media[place : place + 1, :length])
        assert mask_1M is None
        assert alone_1MD.shape == (1, encoder.num_tokens((length, 50, 70)), SIZE)
        real = slice(None) if mask_BM is None else mask_BM[place]
        torch.testing.assert_close(features_BMD[place, real], alone_1MD[0], atol=1e-5, rtol=1e-5)
    assert encoder.num_tokens((5, 480, 640)) == {"none": 80, "time": NUM_PATCHES, "space": 5}[pool]
    assert encoder.hidden_size == SIZE


def test_pooling_averages(clip_folder: str) -> None:
    whole_BFND = make(clip_folder)(clips(2, 3))[0].unflatten(1, (3, NUM_PATCHES))
    torch.testing.assert_close(make(clip_folder, pool="time")(clips(2, 3))[0], whole_BFND.mean(1))
    torch.testing.assert_close(make(clip_folder, pool="space")(clips(2, 3))[0], whole_BFND.mean(2))


def test_forward_is_refine_of_features(clip_folder: str) -> None:
    encoder, media, mask = make(clip_folder), clips(2, 3), expected_mask([3, 2])
    features_BND, mask_BN = encoder.features(media, mask)
    assert features_BND.shape == (2, 48, SIZE) and mask_BN is not None
    torch.testing.assert_close(features_BND[0, 16:32], encoder.frames(media[0, 1:2])[0][0])
    ours, theirs = encoder(media, mask), encoder.refine(features_BND, mask_BN)
    assert torch.equal(ours[0], theirs[0]) and ours[1] is not None and torch.equal(ours[1], mask_BN)
    assert (encoder.has_frozen_features, make(clip_folder, frames_tune=FULL).has_frozen_features) == (True, False)


@pytest.mark.parametrize("frames_tune", [FROZEN, FULL])
@pytest.mark.parametrize("tune", [FROZEN, FULL])
def test_gradients_reach_what_trains(frames_tune: Tune, tune: Tune, clip_folder: str) -> None:
    encoder = make(clip_folder, frames_tune=frames_tune, tune=tune)
    media = clips(2, 3).requires_grad_(frames_tune.mode == "full")
    mask = expected_mask([3, 2])
    features_BMD, mask_BM = encoder(media, mask)
    assert mask_BM is not None
    if frames_tune.mode == tune.mode == "frozen":
        assert not features_BMD.requires_grad
        return
    features_BMD[mask_BM].square().sum().backward()
    of_frames = [parameter.grad for parameter in encoder.frames.parameters() if parameter.requires_grad]
    of_blocks = [parameter.grad for _, parameter in encoder.own_named_parameters()]
    assert all(gradient is not None and gradient.any() for gradient in of_frames)
    assert bool(of_frames) == (frames_tune.mode == "full")
    assert all((gradient is not None and bool(gradient.any())) == (tune.mode == "full") for gradient in of_blocks)
    if frames_tune.mode == "full":
        assert media.grad is not None
        assert ((media.grad != 0).flatten(2).any(2) == mask).all()  # pixels of padding get none


def test_lora_on_the_frames(clip_folder: str) -> None:
    tune = Tune(mode="lora", lora=LoRA(r=2, target_modules=("q_proj", "fc1")))
    encoder = make(clip_folder, frames_tune=tune, trained=False)
    assert not any("lora" in name for name, _ in encoder.own_named_parameters())
    trained = {name for name, parameter in encoder.frames.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    encoder(clips(1, 2))[0].square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    assert not encoder.has_frozen_features


def test_padding_does_not_reach_running_statistics() -> None:
    states = []
    for num_padded in (0, 2):
        frames = TimmEncoder(model_name="test_resnet", pretrained=False, image_size=64, tune=FULL)
        encoder = VideoEncoder(frames, num_layers=0)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            encoder.build()
        media = torch.randn(1, 3, 3, 64, 64, generator=torch.Generator().manual_seed(8))
        media = torch.cat([media, torch.zeros(1, num_padded, 3, 64, 64)], dim=1)
        encoder(media, torch.arange(3 + num_padded)[None] < 3)
        states.append(encoder.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_transform_is_that_of_the_frames(clip_folder: str) -> None:
    sampling = FrameSampling(num_frames=3)
    encoder = VideoEncoder(HFVisionEncoder(name_or_path=clip_folder), sampling)
    clip = some_clip(3, 40, 57)
    frames_FCHW = encoder.transform(clip)
    assert frames_FCHW.shape == (3, 3, 32, 32) and encoder.transform.sampling is sampling
    for place in range(3):
        assert torch.equal(frames_FCHW[place], encoder.frames.transform(Image.fromarray(clip.frames_FHW3[place])))
    assert torch.equal(pickle.loads(pickle.dumps(encoder.transform))(clip), frames_FCHW)


def test_it_is_made_again_from_its_spec(clip_folder: str) -> None:
    options = {"sampling": FrameSampling(fps=2.0, max_frames=6), "pool": "space", "num_layers": 1}
    encoder = make(clip_folder, frames_tune=Tune(mode="lora", lr=1e-4, lora=LoRA(r=3)), **options)
    again = Encoder.from_spec(encoder.spec())
    assert isinstance(again, VideoEncoder)
    assert again.spec() == encoder.spec()
    assert (again.sampling, again.pool, again.num_heads) == (encoder.sampling, "space", 4)
    assert isinstance(again.frames, HFVisionEncoder) and again.frames.tune == encoder.frames.tune
    again.build()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(clips(1, 2))[0], encoder(clips(1, 2))[0])


def test_float32_blocks_on_frames_of_another_type(clip_folder: str) -> None:
    encoder = VideoEncoder(HFVisionEncoder(name_or_path=clip_folder, dtype="bfloat16"), num_layers=1)
    encoder.build()
    assert {parameter.dtype for _, parameter in encoder.own_named_parameters()} == {torch.float32}
    features_BMD, _ = encoder(clips(1, 2))
    assert features_BMD.dtype == torch.float32
    assert torch.equal(features_BMD, encoder.frames(clips(1, 2)[0])[0].flatten(0, 1)[None].float())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_layers": -1}, "num_layers is the number of space-time blocks, 0 or more, got -1"),
        ({"num_heads": 0}, "num_heads must be at least 1, or null .* got 0"),
    ],
)
def test_options_are_checked(options: dict[str, int], reason: str, clip_folder: str) -> None:
    with pytest.raises(ValueError, match=reason):
        VideoEncoder(HFVisionEncoder(name_or_path=clip_folder), **options)  # type: ignore[arg-type]


def test_heads_must_divide_the_width(clip_folder: str) -> None:
    with pytest.raises(ValueError, match="num_heads = 5 does not divide the width of the features, 24"):
        VideoEncoder(HFVisionEncoder(name_or_path=clip_folder), num_heads=5).build()
