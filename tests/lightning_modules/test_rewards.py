"""Scorers with a model of their own: with tiny random weights they give what transformers computes of the same folder."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.media_video import Clip
from datamodules.scorers import Response
from lightning_modules.rewards import ClipScorer, DetoxifyScorer, EmbeddingRelevanceScorer, EntailmentScorer

ANSWERS = [
    Response("What is this?", "It is a red bus in front of a house."),
    Response("Who stands there?", "A small brown dog."),
    Response("", "A bus."),
    Response("What colour is it?", "red"),
]


def test_embeddings_are_means_over_tokens(tiny_llm: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llm), AutoModel.from_pretrained(tiny_llm, dtype=torch.float32).eval()

    @torch.no_grad()
    def embed(text: str) -> torch.Tensor:
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    scorer = EmbeddingRelevanceScorer(str(tiny_llm), batch_size=2)
    scores = scorer(ANSWERS)
    for answer, score in zip(ANSWERS, scores, strict=True):
        if not answer.prompt:
            assert score is None
            continue
        cosine = float(torch.cosine_similarity(embed(answer.prompt), embed(answer.response), dim=0))
        assert score == pytest.approx(max(cosine, 0.0), abs=1e-5)
    assert len({score for score in scores if score is not None}) > 1
    assert len(pickle.dumps(scorer)) < 500  # the options, and not the weights
    assert pickle.loads(pickle.dumps(scorer))(ANSWERS) == scores


@pytest.fixture
def inference_folder(tmp_path: Path, tiny_llm: Path) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig.from_pretrained(tiny_llm, num_labels=3, pad_token_id=0)
    config.id2label = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path)
    return tmp_path


def test_entailment_is_that_of_a_column(inference_folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    truths = ["A bus stands before a house.", "There is a cat."]
    answers = [Response("What?", "A bus.", columns={"caption": truth}) for truth in truths]
    scores = EntailmentScorer(str(inference_folder), column="caption")([*answers, Response("What?", "A bus.")])
    model = AutoModelForSequenceClassification.from_pretrained(inference_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(inference_folder)
    for truth, score in zip(truths, scores, strict=False):
        with torch.no_grad():
            logits = model(**tokenizer(truth, "A bus.", return_tensors="pt")).logits[0]
        assert score == pytest.approx(float(logits.softmax(0)[2]), abs=1e-6)
    assert scores[0] != scores[1] and scores[2] is None
    with pytest.raises(ValueError, match="'caption' must hold texts, got '3'"):
        EntailmentScorer(str(inference_folder), column="caption")([Response("", "A bus.", columns={"caption": 3})])


def test_a_model_of_something_else_is_refused(inference_folder: Path, tiny_llm: Path) -> None:
    import json

    path = inference_folder / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {"0": "bad", "1": "fair", "2": "good"}
    config["label2id"] = {"bad": 0, "fair": 1, "good": 2}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has the labels bad, fair, good, and none is entailment"):
        EntailmentScorer(str(inference_folder), column="caption")([Response("", "A bus.", columns={"caption": "A bus."})])


@pytest.fixture
def clip_folder(tmp_path: Path, tiny_llm: Path) -> Path:
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 77}
    config = CLIPConfig(text_config=sizes | text, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        CLIPModel(config).save_pretrained(tmp_path)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(tmp_path)
    return tmp_path


def test_clip_score_is_the_cosine_of_picture_and_answer(clip_folder: Path, picture: Callable[..., Image.Image]) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    images = [picture(seed) for seed in range(6)]
    texts = ["A red bus.", "Two dogs.", "A house.", "It is blue.", "Nothing.", "What?"]
    frames = np.stack([np.array(image) for image in images[:2]])
    clip = Clip(frames, np.array([0.0, 1.0]))
    answers = [Response("", text, {"image": [image]}) for text, image in zip(texts, images, strict=True)]
    scores = ClipScorer(str(clip_folder))([*answers, Response("", texts[0], {"video": [clip]}), Response("", "A bus.")])

    @torch.no_grad()
    def cosine(text: str, image: Image.Image) -> float:
        inputs = processor(text=[text], images=[image], return_tensors="pt", padding=True)
        out = model(**inputs)
        return float(torch.cosine_similarity(out.image_embeds, out.text_embeds)[0])

    expected = [min(1.0, 2.5 * max(0.0, cosine(text, image))) for text, image in zip(texts, images, strict=True)]
    assert scores[:6] == pytest.approx(expected, abs=1e-4) and len(set(scores)) > 2
    mean = (cosine(texts[0], images[0]) + cosine(texts[0], images[1])) / 2
    assert scores[6] == pytest.approx(min(1.0, 2.5 * max(0.0, mean)), abs=1e-4)
    assert scores[7] is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    answer = [Response("What?", "A bus.", {"image": [Image.new("RGB", (8, 8))]}, {"reference": "A bus."})]
    for scorer in (EmbeddingRelevanceScorer, EntailmentScorer, ClipScorer):
        with pytest.raises(
            ValueError, match=rf"{scorer.__name__}\.model_folder: there is no config\.json in .*: ?Give|Give the folder"
        ):
            scorer(str(tmp_path))(answer)
    with pytest.raises(ValueError, match="batch_size is a number of answers"):
        ClipScorer(str(tmp_path), batch_size=0)
    with pytest.raises(ValueError, match="pip install detoxify|there is no"):
        DetoxifyScorer(str(tmp_path / "toxic.ckpt"), str(tmp_path))(answer)


def test_detoxify_gives_the_largest_of_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    class Detoxify:
        def __init__(self, checkpoint: str, huggingface_config_path: str) -> None:
            assert Path(checkpoint).exists() and Path(huggingface_config_path).exists()

        def predict(self, texts: list[str]) -> dict[str, list[float]]:
            return {"toxicity": [len(text) / 10 for text in texts], "threat": [0.25 for _ in texts]}

    module = types.ModuleType("detoxify")
    module.__dict__["Detoxify"] = Detoxify
    monkeypatch.setitem(sys.modules, "detoxify", module)
    (tmp_path / "toxic.ckpt").touch()
    scorer = DetoxifyScorer(str(tmp_path / "toxic.ckpt"), str(tmp_path))
    assert scorer([Response("", "12345"), Response("", "1")]) == [0.5, 0.75]
    with pytest.raises(ValueError, match="there is no .*none"):
        DetoxifyScorer(str(tmp_path / "none"), str(tmp_path))([Response("", "1")])
