"""Divided space-time attention, against torch's own attention run sequence by sequence."""

import math

import pytest
import torch
from torch import nn

from encoders.space_time import SelfAttention, SpaceTimeBlock, time_positions

SIZE, HEADS = 12, 3


def random_block(seed: int = 1) -> SpaceTimeBlock:
    """A block all of whose weights count."""
    block = SpaceTimeBlock(SIZE, HEADS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return block


def random_features(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, SIZE, generator=torch.Generator().manual_seed(seed))


def attend(ours: SelfAttention, sequence_TD: torch.Tensor) -> torch.Tensor:
    theirs = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
    weights = {
        "in_proj_weight": ours.qkv_proj.weight,
        "in_proj_bias": ours.qkv_proj.bias,
        "out_proj.weight": ours.o_proj.weight,
        "out_proj.bias": ours.o_proj.bias,
    }
    theirs.load_state_dict(weights)
    return theirs(sequence_TD[None], sequence_TD[None], sequence_TD[None], need_weights=False)[0][0]


def plain(block: SpaceTimeBlock, features_FND: torch.Tensor) -> torch.Tensor:
    """One clip, one sequence after the other."""
    num_frames, num_places, _ = features_FND.shape
    x = features_FND.clone()
    for place in range(num_places):
        read_FD = block.time_norm(features_FND[:, place]) + time_positions(num_frames, SIZE)
        x[:, place] += attend(block.time_attention, read_FD)
    y = x.clone()
    for frame in range(num_frames):
        y[frame] += attend(block.space_attention, block.space_norm(x[frame]))
    return y + block.down_proj(nn.functional.gelu(block.up_proj(block.mlp_norm(y))))


def test_it_is_what_a_plain_implementation_computes() -> None:
    block, features_BFND = random_block(), random_features(2, 5, 4)
    expected_BFND = torch.stack([plain(block, clip) for clip in features_BFND])
    torch.testing.assert_close(block(features_BFND), expected_BFND, atol=1e-5, rtol=1e-5)


def test_padded_frames_change_nothing() -> None:
    block, features_BFND = random_block(), random_features(3, 6, 4)
    mask_BF = torch.arange(6) < torch.tensor([6, 2, 5])[:, None]
    padded_BFND = block(features_BFND, mask_BF)
    other_BFND = block(torch.where(mask_BF[..., None, None], features_BFND, torch.full_like(features_BFND, 7.0)), mask_BF)
    for clip, length in enumerate((6, 2, 5)):
        alone = block(features_BFND[clip : clip + 1, :length])[0]
        torch.testing.assert_close(padded_BFND[clip, :length], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other_BFND[clip, :length], alone, atol=1e-5, rtol=1e-5)


def test_frames_see_each_other_and_know_their_order() -> None:
    block, features_BFND = random_block(), random_features(1, 4, 3)
    before_BFND = block(features_BFND)
    changed_BFND = features_BFND.clone()
    changed_BFND[0, 3] = random_features(3, seed=4)
    assert ((block(changed_BFND) - before_BFND).abs().amax((0, 2, 3)) > 1e-4).all()
    backwards_BFND = block(features_BFND.flip(1)).flip(1)
    assert (backwards_BFND - before_BFND).abs().max() > 1e-2


def test_a_new_block_changes_nothing_and_learns_at_once() -> None:
    block, features_BFND = SpaceTimeBlock(SIZE, HEADS), random_features(2, 3, 4)
    first_BFND = block(features_BFND)
    assert torch.equal(first_BFND, features_BFND)
    target = random_features(2, 3, 4, seed=9)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (block(features_BFND) - target).square().mean().backward()
        learning = {name.rpartition(".")[0] for name, p in block.named_parameters() if p.grad is not None and p.grad.any()}
        if step == 0:
            assert learning == {"time_attention.o_proj", "space_attention.o_proj", "down_proj"}
        optimizer.step()
    assert learning == {name.rpartition(".")[0] for name, _ in block.named_parameters()}


@pytest.mark.parametrize("size", [8, 7])
def test_positions(size: int) -> None:
    position_FD = time_positions(50, size)
    half = (size + 1) // 2
    for frame in (0, 1, 37):
        for place in range(half):
            angle = frame / 10_000 ** (place / half)
            assert position_FD[frame, place] == pytest.approx(math.sin(angle), abs=1e-4)
            if half + place < size:
                assert position_FD[frame, half + place] == pytest.approx(math.cos(angle), abs=1e-4)
    assert torch.equal(time_positions(9, size), position_FD[:9])
