"""The data side of a model: the processor that makes what the model takes."""

from datamodules.pretrained_processor import PretrainedProcessor
from datamodules.processor import Processor
from datamodules.prompt_options import PromptOptions
from models.multimodal import MultiModalModel
from models.pretrained import PretrainedMLLM


def make_processor(model: MultiModalModel, prompt: PromptOptions) -> Processor:
    """The processor of a model, which need not be built.

    Args:
        model: The model.
        prompt: Template, system message and length limit.
    """
    language_model = model.language_model
    if isinstance(language_model, PretrainedMLLM):
        return PretrainedProcessor(language_model.name_or_path, prompt, language_model)
    towers = model.towers()
    return Processor(
        language_model.name_or_path,
        prompt,
        encoders={modality: encoder for modality, (encoder, _) in towers.items()},
        projectors={modality: projector for modality, (_, projector) in towers.items()},
        fusion=model.fusion,
    )
