"""What `plan` counts, by hand; what it reads, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from planning.allocations import GRADIENTS
from planning.step import STATES
from train import main

TINY = "configs/sft/tiny.yaml"


@pytest.fixture
def sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of rows are kept in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def planned(*arguments: str, path: Path) -> dict[str, Any]:
    main(["plan", "--config", TINY, "--json", str(path), *arguments])
    return json.loads(path.read_text(encoding="utf-8"))


def test_counts_of_a_tiny_model(tmp_path: Path, sizes: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A Llama of 2 layers, width 64, vocabulary as its config has it, all trained; a ViT of 192 that is frozen; an MLP."""
    plan = planned("--device", "A100-80GB", path=tmp_path / "plan.json")
    parts = {part["name"]: part for part in plan["parts"]}
    config = json.loads(Path("demo/tiny/llm/config.json").read_text(encoding="utf-8"))
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
    layer = 2 * width * width + 2 * width * keys + 3 * width * inner + 2 * width
    heads = 1 if config["tie_word_embeddings"] else 2
    assert parts["language_model"]["parameters"] == heads * config["vocab_size"] * width + layers * layer + width
    assert parts["language_model"]["trainable"] == parts["language_model"]["parameters"]
    assert parts["image_projector"]["parameters"] == 192 * width + width + width * width + width
    assert parts["image_encoder"]["trainable"] == 0
    trainable = sum(part["trainable"] for part in parts.values())
    assert plan["memory"][GRADIENTS] == 4 * trainable
    assert 8 * trainable <= plan["memory"][STATES] <= 8 * trainable + 4 * 1000  # two moments, and a step count of each weight
    assert plan["fits"] and not plan["advice"]
    assert plan["epoch"]["rows"] == 32 and plan["epoch"]["steps"] == 4 and plan["epoch"]["total_steps"] == 80
    shown = capsys.readouterr().out
    assert "A100-80GB with 79.2 GiB has room for it" in shown and f"{trainable:,}" in shown


def test_neither_weights_nor_media_are_read(tmp_path: Path, sizes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a medium was decoded, or a weight was made")

    monkeypatch.setattr("datamodules.dataset.decode", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    with pytest.raises(AssertionError, match="was decoded"):
        main(["inspect", "--config", TINY])
    assert planned(path=tmp_path / "plan.json")["total"] > 0


def test_under_zero(tmp_path: Path, sizes: None, capsys: pytest.CaptureFixture[str]) -> None:
    """What the overlay keeps in the memory of the machine is a line of its own."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -r requirements-deepspeed.txt")
    overlay = ("--config", "configs/strategy/deepspeed_zero2.yaml", "--world_size", "2", "--trainer.precision", "32-true")
    plan = planned(*overlay, path=tmp_path / "plan.json")
    offloaded = planned(*overlay, "--trainer.strategy.offload_optimizer", "true", path=tmp_path / "plan.json")
    assert plan["memory"][STATES] == offloaded["on_host"][STATES] and STATES not in offloaded["memory"] and not plan["on_host"]
    shown = capsys.readouterr().out.splitlines()
    [line] = [line for line in shown if "in the machine's memory, for each device" in line]
    assert "ZeRO-2 over 2" in "".join(shown) and line.split()[-2] == f"{sum(offloaded['on_host'].values()) / 2**20:,.2f}"
