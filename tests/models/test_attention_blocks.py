"""Attention by blocks gives what a mask of the whole row gives, for less.

Shape suffixes: B rows, T tokens, U tokens that are looked at, H heads, D size of a head.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from datamodules.collate import collate
from encoders.tuning import Tune
from models.attention_blocks import NAME, attend_in_blocks, blocks_of, lengths_of
from models.attention_mask import visible
from tests.models.test_packed import assert_same, examples_of, packed

SEGMENTS_BT = torch.tensor([[1] * 5 + [2] * 9 + [3] * 2, [1] * 12 + [0] * 4])
BRANCHES_BT = torch.tensor(
    [[0] * 2 + [1] * 3 + [0] * 4 + [2] * 2 + [3] * 3 + [4] * 2, [0] * 6 + [1] * 2 + [2] * 3 + [3] + [0] * 4]
)
POSITIONS_BT = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 6, 0, 1, 2, 3]])


def test_the_table_as_literal_numbers():
    assert blocks_of(SEGMENTS_BT, None, 7)[0, 0].tolist() == [[5, -1, 7], [9, -1, 7], [2, -1, 7], [12, -1, 7], [4, -1, 7]]
    lengths_and_shared = [
        *([2, -1, 0], [3, 0, 0], [4, -1, 0], [2, 2, 0], [3, 2, 0], [2, -1, 0]),
        *([6, -1, 0], [2, 6, 0], [3, 6, 0], [1, 6, 0], [4, -1, 0]),
    ]
    assert blocks_of(SEGMENTS_BT, BRANCHES_BT)[0, 0].tolist() == lengths_and_shared


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("has_branches", [True, False])
def test_blocks_attend_as_a_mask_of_the_row_says(window, has_branches):
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    branches_BT = BRANCHES_BT if has_branches else None
    positions_BT = POSITIONS_BT if has_branches else torch.arange(16) - torch.tensor([[0] * 5 + [5] * 9 + [14] * 2, [0] * 16])
    x_BHTD = [torch.randn(2, heads, 16, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    inputs = [x.requires_grad_() for x in x_BHTD]
    sees_B1TU = visible(SEGMENTS_BT, branches_BT, positions_BT, window)[:, None]
    expected_BHTD = scaled_dot_product_attention(*inputs, attn_mask=sees_B1TU, scale=0.3, enable_gqa=True)
    layer = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    blocks = blocks_of(SEGMENTS_BT, branches_BT, window)
    got_BTHD, _ = attend_in_blocks(layer, *inputs, blocks, scaling=0.3, sliding_window=window)
    real_BT = SEGMENTS_BT > 0
    weights_NHD = torch.randn(28, 4, 8, generator=generator, dtype=torch.float64)
    gradients = []
    for output_BTHD in (got_BTHD, expected_BHTD.transpose(1, 2)):
        gradients.append(torch.autograd.grad((output_BTHD[real_BT] * weights_NHD).sum(), inputs))
    torch.testing.assert_close(got_BTHD[real_BT], expected_BHTD.transpose(1, 2)[real_BT], rtol=1e-12, atol=1e-12)
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", NAME), ("qwen2_window", NAME), ("mistral", NAME), ("gemma3_text", NAME), ("gpt2", NAME), ("gemma2", "eager")],
)
def test_who_attends_in_blocks_and_who_says_that_it_does_not(family, kind, make_model, model_folder, caplog):
    model = make_model(model_folder(family), tune=Tune(mode="frozen")).language_model
    assert model.model.config._attn_implementation == kind
    with caplog.at_level(logging.WARNING, "models.branches"):
        assert model.takes_packs and model.takes_branches
    assert ("a mask of the whole row" in caplog.text) == (kind != NAME)


def test_a_cap_on_the_scores_is_never_left_out(make_model, model_folder, monkeypatch):
    """Of transformers before 5.21, and of models that bring their own code."""
    from transformers import Gemma2PreTrainedModel

    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM caps the scores .*attn_implementation to eager"):
        make_model(model_folder("gemma2"))


def test_flash_attention_gets_the_lengths_of_the_samples(make_model, model_folder):
    """By a stand-in, as flash attention itself runs on GPUs alone."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    lengths = lengths_of(SEGMENTS_BT)
    assert lengths["cu_seq_lens_q"].tolist() == [0, 5, 14, 16, 28, 32] and lengths["cu_seq_lens_q"].dtype == torch.int32
    assert lengths["max_length_k"] == 12
    calls = []

    def varlen(module, query, key, value, mask, cu_seq_lens_q=None, scaling=None, max_length_q=None, **options):
        assert mask is None and options["position_ids"].shape == (query.shape[0], query.shape[2])
        rows, _, length, _ = query.shape
        own = [length] * rows if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
        calls.append(max_length_q)
        table = [[length, -1, options["sliding_window"]] for length in own]
        return attend_in_blocks(module, query, key, value, torch.tensor([[table]]), scaling=scaling)

    AttentionInterface.register("flash_stand_in", varlen)
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    model, examples = make_model(model_folder("mistral")), examples_of(slots_of_one_length())
    model.language_model.model.config._attn_implementation_internal = "flash_stand_in"
    assert_same(model, collate(packed(examples), pad_id=0), collate(examples, pad_id=0))
    assert set(calls) == {max(len(example.tokens) for example in examples), None}


def slots_of_one_length() -> list[list[int | str]]:
    """Layouts of samples that need no padding, and so no mask, where they stand alone."""
    return [[5, "a", 7, 4], ["a", 10, 6], [7, "b", 9], [3, "c", 13], [9, "a", 7]]
