import pytest
import torch
from torch import Tensor

from models.fusion import PlacedMedia, concatenate

# Two rows of five and three tokens; row 0 has media of 2 and 1 tokens, row 1 one of 2.
EMBEDDINGS_BTD = torch.tensor(
    [
        [[1.0, 1.5], [2.0, 2.5], [3.0, 3.5], [4.0, 4.5], [5.0, 5.5]],
        [[6.0, 6.5], [7.0, 7.5], [8.0, 8.5], [9.0, 9.5], [10.0, 10.5]],
    ]
)
PLACEHOLDER_BT = torch.tensor([[False, True, True, False, True], [True, True, False, False, False]])
MEDIA_OMD = torch.tensor([[[-1.0, -1.5], [-2.0, -2.5]], [[-3.0, -3.5], [-4.0, -4.5]], [[-5.0, -5.5], [-6.0, -6.5]]])
MASK_OM = torch.tensor([[True, True], [False, True], [True, True]])
ROW_O = torch.tensor([0, 0, 1])
NUM_TOKENS_O = torch.tensor([2, 1, 2])


def placed(
    placeholder_BT: Tensor = PLACEHOLDER_BT,
    media_OMD: Tensor = MEDIA_OMD,
    mask_OM: Tensor | None = MASK_OM,
    num_tokens_O: Tensor = NUM_TOKENS_O,
) -> PlacedMedia:
    return PlacedMedia(media_OMD, mask_OM, ROW_O, torch.tensor([1, 4, 0]), num_tokens_O, placeholder_BT)


def test_media_are_written_in_reading_order():
    fused_BTD = concatenate(EMBEDDINGS_BTD, placed())
    assert fused_BTD.tolist() == [
        [[1.0, 1.5], [-1.0, -1.5], [-2.0, -2.5], [4.0, 4.5], [-4.0, -4.5]],
        [[-5.0, -5.5], [-6.0, -6.5], [8.0, 8.5], [9.0, 9.5], [10.0, 10.5]],
    ]
    assert EMBEDDINGS_BTD[0, 1, 0] == 2.0  # the tokens' own are left as they were


def test_without_a_mask_everything_is_real():
    placeholder_BT = torch.tensor([[False, True, True, True, True], [True, True, False, False, False]])
    fused_BTD = concatenate(EMBEDDINGS_BTD, placed(placeholder_BT, mask_OM=None, num_tokens_O=torch.tensor([2, 2, 2])))
    assert fused_BTD[0, :, 0].tolist() == [1, -1, -2, -3, -4]
    assert fused_BTD[1, :, 0].tolist() == [-5, -6, 8, 9, 10]


def test_each_place_gets_the_gradient_of_what_stands_there():
    embeddings_BTD, media_OMD = EMBEDDINGS_BTD.clone().requires_grad_(), MEDIA_OMD.clone().requires_grad_()
    weights_BTD = torch.arange(1.0, 21.0).reshape(2, 5, 2)
    (concatenate(embeddings_BTD, placed(media_OMD=media_OMD)) * weights_BTD).sum().backward()
    assert embeddings_BTD.grad[..., 0].tolist() == [[1, 0, 0, 7, 0], [0, 0, 15, 17, 19]]
    assert media_OMD.grad[..., 0].tolist() == [[3, 5], [0, 9], [11, 13]]


def test_media_take_the_dtype_of_the_embeddings():
    fused_BTD = concatenate(EMBEDDINGS_BTD.bfloat16(), placed())
    assert fused_BTD.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("mask_OM", "num_tokens_O", "message"),
    [
        (MASK_OM, [2, 1, 1], r"row 1 of the batch has 2 media placeholders, but its media take 1"),
        (MASK_OM, [2, 2, 2], r"row 0 of the batch has 3 media placeholders, but its media take 4"),
        # as many in the row, but other media would stand in the places of the first
        (MASK_OM, [1, 2, 2], r"row 0 of the batch has 1 placeholders for a medium that gives 2 embeddings"),
        ([[True, True], [False, True], [True, False]], [2, 1, 2], r"row 1 of the batch has 2 placeholders .* gives 1 embeddings"),
        (None, [2, 1, 2], r"row 0 of the batch has 1 placeholders for a medium that gives 2 embeddings"),
    ],
)
def test_other_numbers_are_refused_with_the_row(mask_OM, num_tokens_O, message):
    mask = None if mask_OM is None else torch.as_tensor(mask_OM)
    with pytest.raises(ValueError, match=message):
        concatenate(EMBEDDINGS_BTD, placed(mask_OM=mask, num_tokens_O=torch.tensor(num_tokens_O)))
