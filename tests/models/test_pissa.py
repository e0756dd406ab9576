"""PiSSA starts where its model starts, goes on bit for bit, and is never taken for its frozen weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from encoders.tuning import LoRA, Tune
from lightning_modules.checkpoints import CheckpointFile, RunCheckpoint
from lightning_modules.references import AdapterOff, FrozenCopy, SecondAdapter, default_reference
from models.checkpoint import read_checkpoint
from models.language import LanguageModel
from models.multimodal import MultiModalModel
from tests.conftest import MEDIA_TOKEN_IDS
from tests.lightning_modules.run_fakes import make_data, make_trainer, write_rows

PISSA = Tune(mode="lora", lora=LoRA(r=4, alpha=4, init="pissa"))


def test_the_start_is_the_model_and_the_adapters_hold_its_largest_singular_values(tiny_llm: Path) -> None:
    plain, pissa = LanguageModel(str(tiny_llm), tune=Tune(mode="frozen")), LanguageModel(str(tiny_llm), tune=PISSA)
    plain.build()
    pissa.build()
    tokens_BT = torch.randint(600, (2, 7))
    with torch.no_grad():
        ours, theirs = (model.eval().model(input_ids=tokens_BT).logits for model in (pissa, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    layer, weight = pissa.decoder_layers[0].self_attn.q_proj, plain.decoder_layers[0].self_attn.q_proj.weight
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(update, u[:, :4] * s[:4] @ v[:4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.base_layer.weight, weight - update, rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_bit_for_bit_and_its_checkpoint_is_the_model(tiny_llm: Path, make_lit_module: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 8)

    def fit(name: str, ckpt_path: Path | None = None) -> Any:
        torch.manual_seed(3)
        own = make_lit_module(language_model=LanguageModel(str(tiny_llm), tune=PISSA))
        saving = RunCheckpoint(every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(tmp_path / name, saving, max_steps=4, plugins=[CheckpointFile()])
        trainer.fit(own, datamodule=make_data(own, rows), ckpt_path=ckpt_path, weights_only=True)
        return own

    whole, resumed = fit("whole"), fit("resumed", tmp_path / "whole/checkpoints/epoch=0-step=2.ckpt")
    last = tmp_path / "whole/checkpoints/last.ckpt"
    ends = [{name: value.detach() for name, value in own.model.state_dict().items()} for own in (whole, resumed)]
    rebuilt = MultiModalModel.from_checkpoint(last).state_dict()
    assert all(torch.equal(value, ends[1][name]) and torch.equal(value, rebuilt[name]) for name, value in ends[0].items())
    assert not any("base_layer" in name for name in read_checkpoint(last)["state_dict"])
    plain = make_lit_module(language_model=LanguageModel(str(tiny_llm), tune=Tune(mode="lora", lora=LoRA(r=4, alpha=4))))
    with pytest.raises(ValueError, match=r"tune\.lora\.init = pissa, but here it is None"):
        make_trainer(tmp_path, max_steps=5).fit(plain, datamodule=make_data(plain, rows), ckpt_path=last, weights_only=True)


def test_frozen_weights_that_another_machine_rounded_are_refused(tiny_llm: Path, make_lit_module: Any, tmp_path: Path) -> None:
    own = make_lit_module(language_model=LanguageModel(str(tiny_llm), tune=PISSA))
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(own, datamodule=make_data(own, write_rows(tmp_path / "rows.jsonl", 4)))
    with torch.no_grad():
        own.model.language_model.decoder_layers[0].self_attn.q_proj.base_layer.weight[0, 0] *= 1 + 1e-6
    own._fingerprinted = None
    trainer.save_checkpoint(tmp_path / "1.ckpt")
    with pytest.raises(ValueError, match=r"frozen weights of language_model.*go on with a machine of the same kind"):
        MultiModalModel.from_checkpoint(tmp_path / "1.ckpt")


def test_without_its_adapters_it_is_no_reference(tiny_llm: Path) -> None:
    model = MultiModalModel(LanguageModel(str(tiny_llm), tune=PISSA))
    model.build(MEDIA_TOKEN_IDS)
    assert isinstance(default_reference(model, []), SecondAdapter)
    with pytest.raises(ValueError, match=r"does not start at 0.*PiSSA"):
        AdapterOff().prepare(model, [], "")
    for reference in (SecondAdapter(), FrozenCopy()):
        reference.prepare(model, [], "")
