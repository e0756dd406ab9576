"""How well a medium fits its text: the interface, and CLIP."""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from datamodules.media import Decoded


class PairScorer(ABC):
    """Scores media against their text. A subclass says how, by `score`; it is made, and runs, in each loader worker.

    Args:
        min_score: A pair below it is found not to fit.
    """

    def __init__(self, min_score: float) -> None:
        if not 0 <= min_score <= 1:
            raise ValueError(f"scorer.min_score is a score, in [0, 1], got {min_score}")
        self.min_score = min_score

    @abstractmethod
    def score(self, media: "Decoded", text: str) -> float | None:
        """How well the two fit, from 0 to 1; None: it cannot tell, as of a kind of media that it does not know.

        Args:
            media: Decoded: an RGB image, a `Clip` or a `Waveform`.
            text: The question and the answer of the row.
        """


class CLIPScorer(PairScorer):
    """CLIPScore (Hessel et al. 2021, arXiv 2104.08718) without its factor: the cosine of image and text, at least 0.

    Long texts are cut at what the model reads. Only images are scored.

    Args:
        name_or_path: Hub name or folder of a CLIP-like model (CLIP, SigLIP) with its processor.
        min_score: Pairs that fit lie around 0.25 to 0.35, pairs that do not around 0.1 to 0.2.
    """

    def __init__(self, name_or_path: str = "openai/clip-vit-base-patch32", min_score: float = 0.18) -> None:
        super().__init__(min_score)
        self.name_or_path = name_or_path

    def score(self, media: "Decoded", text: str) -> float | None:
        if not isinstance(media, Image.Image) or not text.strip():
            return None
        import torch

        model, processor = self._model
        inputs = processor(text=[text], images=[media], return_tensors="pt", padding=True, truncation=True)
        with torch.inference_mode():
            output = model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        return max(float(cosine), 0.0)

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoProcessor

        try:
            model = AutoModel.from_pretrained(self.name_or_path)
            processor = AutoProcessor.from_pretrained(self.name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"scorer.name_or_path = {self.name_or_path!r} cannot be loaded: {error}. Give a folder or the hub name of a CLIP "
                "model with its processor, or leave the scorer out"
            ) from error
        return model.eval(), processor
