"""A model with a video encoder: its parts, its checkpoint, and that it looks at the clip.

Shape suffixes: B rows, T tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.batch import IGNORE_INDEX, Batch, Example, MediaItem, Origin
from datamodules.collate import collate
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.sampling import FrameSampling
from encoders.tuning import LoRA, Tune
from encoders.video import VideoEncoder
from models.checkpoint import fingerprints, load_saved, saved_names
from models.language import LanguageModel
from models.multimodal import MultiModalModel
from tests.conftest import MEDIA_TOKEN_IDS, randomise_adapters

LORA = Tune(mode="lora", lr=1e-4, lora=LoRA(r=2, target_modules=("q_proj",)))


@pytest.fixture
def make_video_model(tiny_llm: Path, tiny_clip: Path) -> Callable[..., MultiModalModel]:
    def make(frames_tune: Tune = LORA, seed: int = 5) -> MultiModalModel:
        frames = HFVisionEncoder(name_or_path=str(tiny_clip), layer=-2, pool=2, tune=frames_tune)
        encoder = VideoEncoder(frames, FrameSampling(num_frames=3), num_layers=1)
        model = MultiModalModel(
            language_model=LanguageModel(str(tiny_llm)), video_encoder=encoder, video_projector=MLPProjector()
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.build(MEDIA_TOKEN_IDS)
            randomise_adapters(model)
            for parameter in encoder.blocks.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


def make_clip_batch(lengths: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(3)
    examples = []
    for number, length in enumerate(lengths):
        media = torch.randn(length, 3, 32, 32, generator=generator)
        text = torch.randint(3, 600, (5,), generator=generator).tolist()
        tokens = [*text, *[MEDIA_TOKEN_IDS["video"]] * (4 * length), *text]
        labels = [IGNORE_INDEX] * (len(tokens) - 2) + tokens[-2:]
        items: dict[str, Any] = {"video": [MediaItem(str(number), media, 4 * length, 5)]}
        examples.append(Example(Origin("rows.jsonl", number + 1), str(number), tokens, labels, items))
    return collate(examples, pad_id=0)


def test_parts_are_listed_for_themselves(make_video_model: Callable[..., MultiModalModel]) -> None:
    model = make_video_model()
    parts = model.parts()
    names = list(parts)
    assert names[names.index("video_encoder") + 1] == "video_encoder.frames"
    own = {name: {path for path, p in part.own_named_parameters() if p.requires_grad} for name, part in parts.items()}
    assert own["video_encoder"] and all(path.startswith("blocks.") for path in own["video_encoder"])
    assert own["video_encoder.frames"] and all("lora_" in path for path in own["video_encoder.frames"])


def test_a_padded_batch_is_each_row_alone(make_video_model: Callable[..., MultiModalModel]) -> None:
    model, batch = make_video_model(), make_clip_batch([3, 1, 2])
    together_BTD = model(batch)
    for row, length in enumerate([3, 1, 2]):
        example = Example(
            Origin("rows.jsonl", 1),
            "x",
            batch["tokens_BT"][row, : 10 + 4 * length].tolist(),
            [IGNORE_INDEX] * (10 + 4 * length),
            {"video": [MediaItem("k", batch["video"]["media"][row, :length], 4 * length, 5)]},
        )
        alone_1TD = model(collate([example], pad_id=0))
        torch.testing.assert_close(together_BTD[row, : 10 + 4 * length], alone_1TD[0], atol=1e-5, rtol=1e-5)


def test_a_checkpoint_holds_the_blocks_and_the_adapters_of_the_frames(make_video_model: Callable[..., MultiModalModel]) -> None:
    model, batch = make_video_model(), make_clip_batch([3, 2])
    saved = saved_names(model)
    of_video = {name for name in saved if name.startswith("video_encoder.")}
    assert any(name.startswith("video_encoder.blocks.0.time_attention") for name in of_video)
    of_frames = {name for name in of_video if name.startswith("video_encoder.frames.")}
    assert of_frames and all("lora_" in name for name in of_frames)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in saved}
    again = MultiModalModel.from_spec(model.spec())
    again.build(MEDIA_TOKEN_IDS)
    load_saved(again, state, fingerprints(model, saved))
    assert torch.equal(again.eval()(batch), model(batch))
    other = make_video_model(seed=6)
    assert not torch.equal(other(batch), model(batch))


def test_pixels_get_a_gradient_where_the_frames_train(make_video_model: Callable[..., MultiModalModel]) -> None:
    for tune, reaches in ((Tune(mode="full"), True), (Tune(mode="frozen"), False)):
        model, batch = make_video_model(frames_tune=tune), make_clip_batch([3, 2])
        before = {name: parameter.detach().clone() for name, parameter in model.video_encoder.frames.named_parameters()}
        batch["video"]["media"].requires_grad_(reaches)
        hidden_BTD = model(batch)
        hidden_BTD[:, -1].square().sum().backward()
        gradient = batch["video"]["media"].grad
        assert (gradient is not None and bool(gradient[0].any())) == reaches
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.optim.SGD(trained, lr=0.1).step()
        changed = {name for name, p in model.video_encoder.frames.named_parameters() if not torch.equal(p, before[name])}
        assert bool(changed) == reaches
        assert all(parameter.grad is not None for _, parameter in model.video_encoder.own_named_parameters())
