"""Dropout that is turned off while modules stay in training mode."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from encoders.tuning import LoRA, Tune
from lightning_modules.dropout import turn_dropout_off
from models.language import LanguageModel


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_language_model_gives_the_same_twice(family: str, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder(family))
    config.update({"attention_dropout": 0.5} if family == "llama" else {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5})
    config.save_pretrained(tmp_path)
    target = "q_proj" if family == "llama" else "c_attn"
    tune = Tune(mode="lora", lora=LoRA(dropout=0.5, target_modules=(target,)))
    model = LanguageModel(str(tmp_path), pretrained=False, tune=tune)
    model.build()
    model.train()
    embeddings_BTD, ones_BT = torch.randn(2, 7, 32), torch.ones(2, 7, dtype=torch.long)

    def run() -> torch.Tensor:
        return model(embeddings_BTD, ones_BT, torch.arange(7).expand(2, 7))

    assert not torch.equal(run(), run())
    turn_dropout_off(model)
    assert model.model.training
    assert torch.equal(run(), run())


def test_paths_and_features_are_no_longer_dropped() -> None:
    from timm.layers.drop import DropPath

    x_BCHW = torch.randn(16, 3, 4, 4)
    for layer in (DropPath(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5)):
        given = x_BCHW[:, 0] if isinstance(layer, nn.TransformerEncoderLayer) else x_BCHW
        assert not torch.equal(layer(given), layer(given))
        turn_dropout_off(layer)
        assert layer.training and torch.equal(layer(given), layer(given))
