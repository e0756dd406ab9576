"""Scorers that need a model of their own, each by name where its package and weights are there.

They are given to `data.reward_criteria` like those without a model. Each process that loads data then has a copy of the model, on
the CPU: for much data, or a large model, score the rows once, before training, and filter the file.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.media import Decoded
from datamodules.media_video import Clip
from datamodules.scorers import Response, Scorer


class FolderScorer(Scorer):
    """Base of scorers with weights in a folder. Nothing is downloaded.

    Args:
        model_folder: A folder in the layout of Hugging Face.
        batch_size: Answers in one pass of the model.
    """

    def __init__(self, model_folder: str, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"{type(self).__name__}.batch_size is a number of answers, at least 1, got {batch_size}")
        self.model_folder = model_folder
        self.batch_size = batch_size

    def __getstate__(self) -> dict[str, Any]:
        """The options: a process that loads data reads the weights itself."""
        return {"model_folder": self.model_folder, "batch_size": self.batch_size}

    def _load(self, of: Any, what: str, **options: Any) -> Any:
        """A part of the folder, by a class of transformers.

        Raises:
            ValueError: It is not there.
        """
        if not (Path(self.model_folder) / "config.json").is_file():
            raise ValueError(
                f"{type(self).__name__}.model_folder: there is no config.json in {self.model_folder!r}. Give the folder of "
                f"{what} with its weights and tokenizer, as save_pretrained writes it or as it was downloaded from the hub"
            )
        return of.from_pretrained(self.model_folder, local_files_only=True, **options)


class EmbeddingRelevanceScorer(FolderScorer):
    """Relevance by sentence embeddings: the cosine of question and answer, or 0 where it is negative.

    The embedding is the mean of the last hidden states over the tokens, as most encoders of sentences are trained (Reimers and
    Gurevych 2019, arXiv 1908.10084). 0.5 is what such encoders give texts about the same subject; unrelated ones have 0.05 to
    0.25 (all-MiniLM-L6-v2). It says nothing where question or answer is empty.
    """

    name = "relevance"

    def __call__(self, responses: Sequence[Response]) -> list[float | None]:
        """The score of each answer."""
        scores: list[float | None] = [None] * len(responses)
        full = [number for number, each in enumerate(responses) if each.prompt.strip() and each.response.strip()]
        for start in range(0, len(full), self.batch_size):
            numbers = full[start : start + self.batch_size]
            prompts_BD = self._embed([responses[number].prompt for number in numbers])
            answers_BD = self._embed([responses[number].response for number in numbers])
            cosine_B = torch.cosine_similarity(prompts_BD, answers_BD).clamp(0, 1)
            for number, cosine in zip(numbers, cosine_B.tolist(), strict=True):
                scores[number] = cosine
        return scores

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        what = "an encoder of sentences (all-MiniLM-L6-v2, bge, e5, …)"
        return self._load(AutoTokenizer, what), self._load(AutoModel, what, dtype=torch.float32).eval()

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> Tensor:
        tokenizer, model = self._parts
        limit = model.config.max_position_embeddings
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        hidden_BTD, mask_BT1 = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)


class EntailmentScorer(FolderScorer):
    """Whether a column of the row, such as a reference answer or a caption, entails the answer: the probability that a model of
    natural language inference gives.

    0.5 is an answer that it thinks as likely to follow as not. It says nothing where the row has no such column, or the answer is
    empty.

    Args:
        column: The column with what is known to be true.
    """

    name = "entailment"

    def __init__(self, *args: Any, column: str = "reference", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.column = column

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"column": self.column}

    def __call__(self, responses: Sequence[Response]) -> list[float | None]:
        """The score of each answer.

        Raises:
            ValueError: The folder has no such model, or the column is no text.
        """
        return [self._score(response) for response in responses]

    @torch.no_grad()
    def _score(self, response: Response) -> float | None:
        truth = response.columns.get(self.column)
        if truth is None or not response.response.strip():
            return None
        if not isinstance(truth, str):
            raise ValueError(f"EntailmentScorer.column: {self.column!r} must hold texts, got {str(truth)[:80]!r}")
        tokenizer, model, entailed = self._parts
        inputs = tokenizer(truth, response.response, truncation=True, return_tensors="pt")
        return float(model(**inputs).logits[0].softmax(-1)[entailed])

    @cached_property
    def _parts(self) -> tuple[Any, Any, int]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        what = "a model of natural language inference"
        model = self._load(AutoModelForSequenceClassification, what, dtype=torch.float32).eval()
        labels = {label.lower(): number for number, label in model.config.id2label.items()}
        if "entailment" not in labels:
            raise ValueError(
                f"EntailmentScorer.model_folder: {self.model_folder} has the labels {', '.join(labels)}, and none is entailment: "
                "give the folder of a model of natural language inference"
            )
        return self._load(AutoTokenizer, what), model, labels["entailment"]


class ClipScorer(FolderScorer):
    """CLIPScore (Hessel et al. 2021, arXiv 2104.08718) by torchmetrics: 2.5 cos(picture, answer), in [0, 1], the mean over the
    pictures of the conversation and the frames of its clips.

    0.5 is a cosine of 0.2; captions that fit have 0.25 to 0.35 (ViT-B/32). It reads about 77 tokens, and likes lists of keywords.
    It says nothing about answers without pictures and clips.
    """

    name = "clip_score"
    needs_media = True

    def __call__(self, responses: Sequence[Response]) -> list[float | None]:
        """The score of each answer.

        Raises:
            ValueError: The folder has no such model.
        """
        return [self._score(response) for response in responses]

    @torch.no_grad()
    def _score(self, response: Response) -> float | None:
        media = [*response.media.get("image", ()), *response.media.get("video", ())]
        pictures = [picture for medium in media for picture in _pictures(medium)]
        if not pictures or not response.response.strip():
            return None
        from torchmetrics.functional.multimodal import clip_score

        captions = [response.response] * len(pictures)
        return min(1.0, 2.5 * float(clip_score(pictures, captions, lambda: self._parts)) / 100)

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor

        what = "a CLIP model (clip-vit-base-patch32, …)"
        return _Pooled(self._load(CLIPModel, what, dtype=torch.float32).eval()), self._load(CLIPProcessor, what)


class _Pooled(torch.nn.Module):
    """A CLIP model whose features are tensors, as torchmetrics reads them: newer versions of transformers wrap them."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.config = clip.config

    def get_image_features(self, *args: Any) -> Tensor:
        """Of pictures, projected."""
        return self.clip.get_image_features(*args).pooler_output

    def get_text_features(self, *args: Any) -> Tensor:
        """Of texts, projected."""
        return self.clip.get_text_features(*args).pooler_output


class DetoxifyScorer(Scorer):
    """1 minus the largest of the probabilities that Detoxify gives its labels (toxicity, obscene, threat, insult, …).

    0.5 is an answer that it is not sure about. Nothing is downloaded.

    Args:
        checkpoint: A checkpoint file of Detoxify.
        config_folder: A folder with the configuration and the tokenizer of its base model.
    """

    name = "toxicity"

    def __init__(self, checkpoint: str, config_folder: str) -> None:
        self.checkpoint = checkpoint
        self.config_folder = config_folder

    def __getstate__(self) -> dict[str, Any]:
        """The options: a process that loads data reads the weights itself."""
        return {"checkpoint": self.checkpoint, "config_folder": self.config_folder}

    def __call__(self, responses: Sequence[Response]) -> list[float | None]:
        """The score of each answer.

        Raises:
            ValueError: The package or a file is missing.
        """
        by_label: dict[str, list[float]] = self._model.predict([response.response for response in responses])
        return [1 - float(max(own)) for own in zip(*by_label.values(), strict=True)]

    @cached_property
    def _model(self) -> Any:
        try:
            from detoxify import Detoxify
        except ImportError as error:
            raise ValueError(
                f"DetoxifyScorer needs a package that is missing ({error}): pip install detoxify, and give the file of one of "
                "its models as checkpoint; ToxicityScorer needs neither"
            ) from error
        for path in (Path(self.checkpoint), Path(self.config_folder)):
            if not path.exists():
                raise ValueError(
                    f"DetoxifyScorer: there is no {path}. Give a checkpoint of Detoxify and the folder of its base model"
                )
        return Detoxify(checkpoint=self.checkpoint, huggingface_config_path=self.config_folder)


def _pictures(medium: Decoded) -> list[Tensor]:
    """A picture, or the frames of a clip: picture_CHW, uint8."""
    match medium:
        case Clip():
            return [torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1) for frame in medium.frames_FHW3]
        case Image.Image():
            return [torch.from_numpy(np.array(medium.convert("RGB"))).permute(2, 0, 1)]
    raise AssertionError(f"{type(medium).__name__} is neither a picture nor a clip")
