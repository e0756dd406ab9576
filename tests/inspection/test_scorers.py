"""CLIP as a scorer of pairs: its cosine against the model's own, and what it cannot tell."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.media_audio import Waveform
from inspection.scorers import CLIPScorer
from tests.inspection.planted import mosaic


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP of image and text, with its processor."""
    import transformers as hf

    from tests.tiny import make_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    num = len(make_tokenizer(folder, "chatml"))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": num, "max_position_embeddings": 16, "eos_token_id": 0}
    config = hf.CLIPConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 8}, projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        hf.CLIPModel(config).save_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, model_max_length=16)
    images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    hf.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_a_score_is_the_cosine_of_the_two(clip: Path) -> None:
    import transformers as hf

    scorer = CLIPScorer(str(clip))
    texts = ["A bus.", "red", "two trains", "What is it?", "0", "It is seven."]
    scores = [scorer.score(mosaic(0), text) for text in texts]
    model, processor = hf.CLIPModel.from_pretrained(clip).eval(), hf.AutoProcessor.from_pretrained(clip)
    inputs = processor(text=texts, images=[mosaic(0)], return_tensors="pt", padding=True)
    with torch.inference_mode():
        cosines = model(**inputs).logits_per_image[0] / model.logit_scale.exp()
    assert scores == pytest.approx(cosines.clamp(min=0).tolist(), abs=1e-5)
    assert max(score for score in scores if score is not None) > 0


def test_a_long_text_is_cut_and_what_it_does_not_know_has_no_score(clip: Path) -> None:
    scorer = CLIPScorer(str(clip))
    score = scorer.score(mosaic(0), "word " * 500)
    assert score is not None
    assert 0 <= score <= 1
    assert scorer.score(mosaic(0), " ") is None
    assert scorer.score(Waveform(np.zeros(9, dtype=np.float32), 16_000), "a sound") is None


def test_a_scorer_that_cannot_be_loaded_says_so() -> None:
    with pytest.raises(ValueError, match=r"scorer.name_or_path = 'nowhere/at-all' cannot be loaded"):
        CLIPScorer("nowhere/at-all").score(Image.new("RGB", (4, 4)), "a text")
    with pytest.raises(ValueError, match=r"min_score is a score, in \[0, 1\], got 1.5"):
        CLIPScorer(min_score=1.5)
