import json
import logging
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MEDIA_TOKEN_IDS
from torch import Tensor, nn

from encoders.base import Encoder, MediaShape, MediaTransform
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from models.checkpoint import check_options, fingerprints, load_saved, read_checkpoint, saved_names, start_from
from models.language import Generation, LanguageModel
from models.multimodal import MultiModalModel

FROZEN, ADAPTED, FULL = Tune(mode="frozen"), Tune(mode="lora"), Tune(mode="full")


class BatchNormEncoder(Encoder):
    """Convolution and batch norm, as if its weights could be read again."""

    def __init__(self, tune: Tune) -> None:
        super().__init__(tune)

    has_source = True
    hidden_size = 4

    @cached_property
    def transform(self) -> MediaTransform:
        raise NotImplementedError

    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4))
        self.apply_tune(self.model)

    def num_tokens(self, shape: MediaShape) -> int:
        return 16

    def forward(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.model(media).flatten(2).transpose(1, 2), None


def save(model: MultiModalModel, path: Path, names: set[str] | None = None) -> Path:
    """What a run saves of its model."""
    held = saved_names(model) if names is None else names
    state = {name: weight for name, weight in model.state_dict().items() if name in held}
    torch.save({"state_dict": state, "model": model.spec(), "fingerprints": fingerprints(model, held)}, path)
    return path


def by_part(names: set[str]) -> dict[str, set[str]]:
    parts: dict[str, set[str]] = {}
    for name in names:
        part, rest = name.split(".", 1)
        parts.setdefault(part, set()).add(rest)
    return parts


def all_names(model: MultiModalModel, part: str) -> set[str]:
    return set(model.parts()[part].state_dict())


def perturb(model: MultiModalModel) -> MultiModalModel:
    """As after some training: what trains has moved."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_lora_saves_adapters_and_projector_alone(make_model):
    parts = by_part(saved_names(make_model()))
    assert parts.keys() == {"language_model", "image_projector"}
    assert len(parts["language_model"]) == 8 and all(".lora_" in name for name in parts["language_model"])
    assert parts["image_projector"] == {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}


def test_dora_saves_its_magnitudes(make_model):
    names = by_part(saved_names(make_model(tune=Tune(mode="lora", lora=LoRA(use_dora=True)))))["language_model"]
    assert sum("lora_magnitude_vector" in name for name in names) == 4 and len(names) == 12


def test_a_frozen_projector_is_saved(make_model):
    model = make_model(projector_tune=FROZEN, tune=FROZEN)
    assert by_part(saved_names(model)) == {"image_projector": all_names(model, "image_projector")}


def test_what_cannot_be_read_again_is_saved_whole(make_model):
    model = make_model(pretrained=False, encoder_tune=FROZEN)
    assert saved_names(model) == set(model.state_dict())


def test_full_is_saved_whole_with_tied_weights(model_folder, make_model):
    model = make_model(llm=model_folder("gpt2"), tune=FULL, images=False)
    names = by_part(saved_names(model))["language_model"]
    assert {"model.transformer.wte.weight", "model.lm_head.weight"} <= names == all_names(model, "language_model")


@pytest.mark.parametrize(("tune", "saved"), [(FULL, True), (FROZEN, False)])
def test_running_statistics_are_saved_where_they_run(tiny_llm, tune, saved):
    model = MultiModalModel(LanguageModel(str(tiny_llm)), BatchNormEncoder(tune=tune), MLPProjector())
    model.build(MEDIA_TOKEN_IDS)
    statistics = {"image_encoder.model.1.running_mean", "image_encoder.model.1.running_var"}
    assert (statistics <= saved_names(model)) == saved
    before = {name: model.state_dict()[name].clone() for name in statistics}
    model.train()
    model.image_encoder(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(model.state_dict()[name], before[name]) != saved for name in statistics)


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"tune": Tune(mode="lora", lora=LoRA(use_dora=True))},
    "full": {"tune": FULL, "encoder_tune": FULL},
    "frozen": {"tune": FROZEN},
    "encoder with adapters": {"encoder_tune": ADAPTED},
    "random": {"pretrained": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_gives_the_same_model(make_model, make_batch, tmp_path, variant):
    model = perturb(make_model(**VARIANTS[variant]))
    path = save(model, tmp_path / "last.ckpt")
    again = MultiModalModel.from_checkpoint(path)
    assert not again.training
    batch = make_batch([[3, "a", 2], [2, "b", 3]], side="left")
    torch.testing.assert_close(again(batch), model(batch), rtol=0, atol=0)
    answers = [m.generate(batch, Generation(max_new_tokens=5), eos_ids=[1], pad_id=0) for m in (model, again)]
    assert answers[0] == answers[1]
    untrained = make_model(**VARIANTS[variant], seed=9)
    assert not torch.allclose(untrained(batch), model(batch), atol=1e-3)


def test_weights_of_an_earlier_stage_come_back_too(make_model, make_batch, tmp_path):
    """The vision tower was trained whole, then frozen: its weights are held, though what trains now is less."""
    first = save(perturb(make_model(encoder_tune=FULL)), tmp_path / "first.ckpt")
    model = make_model()
    loaded, _ = start_from(model, first)
    second = save(model, tmp_path / "second.ckpt", names=saved_names(model) | loaded)
    batch = make_batch([[3, "a", 2]])
    torch.testing.assert_close(MultiModalModel.from_checkpoint(second)(batch), model(batch), rtol=0, atol=0)
    assert not torch.allclose(make_model()(batch), model(batch), atol=1e-3)


def test_one_changed_value_changes_the_fingerprint(make_model):
    model = make_model()
    held = saved_names(model)
    before, generator = fingerprints(model, held), torch.Generator().manual_seed(2)
    for name, weight in model.state_dict().items():
        values = weight.view(-1)
        place = int(torch.randint(len(values), (), generator=generator))
        value = values[place].clone()
        values[place] += 1e-3
        now = fingerprints(model, held)
        assert {part for part in now if now[part] != before[part]} == (set() if name in held else {name.split(".")[0]})
        values[place] = value
    assert fingerprints(model, held) == before


def test_a_swap_of_two_values_changes_the_fingerprint(make_model):
    model = make_model()
    before = fingerprints(model, saved_names(model))
    norm = model.language_model.model.get_parameter("model.norm.weight").data
    norm[3] = 0.5
    changed = fingerprints(model, saved_names(model))
    norm[[3, 4]] = norm[[4, 3]]
    swapped = fingerprints(model, saved_names(model))
    assert len({f["language_model"] for f in (before, changed, swapped)}) == 3


def test_a_part_has_one_fingerprint_however_it_is_tuned_or_stored(make_model):
    prints = [fingerprints(make_model(tune=tune), ["image_projector"])["language_model"] for tune in (FROZEN, ADAPTED, FULL)]
    assert len(set(prints)) == 1
    half = make_model(tune=FROZEN)
    half.language_model.bfloat16()
    stored = fingerprints(half, [])["language_model"]
    half.language_model.float()
    assert fingerprints(half, [])["language_model"] == stored != prints[0]


@pytest.fixture
def checkpoint(make_model, tmp_path) -> Path:
    return save(make_model(), tmp_path / "last.ckpt")


def test_code_of_a_hub_model_needs_permission(checkpoint):
    content = torch.load(checkpoint)
    content["model"]["parts"]["language_model"]["init_args"]["trust_remote_code"] = True
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match="wants to run code that comes with"):
        MultiModalModel.from_checkpoint(checkpoint)
    assert MultiModalModel.from_checkpoint(checkpoint, trust_remote_code=True).is_built


def test_another_base_is_refused(model_folder, make_model, tmp_path):
    """Both are Llamas of the same shape; the second was trained further."""
    base = shutil.copytree(model_folder("llama"), tmp_path / "base")
    path = save(make_model(llm=base), tmp_path / "last.ckpt")
    other = make_model(llm=base, tune=FULL)
    with torch.no_grad():
        other.language_model.model.get_parameter("model.layers.1.mlp.up_proj.weight")[5, 7] += 0.01
    other.language_model.model.save_pretrained(base)
    with pytest.raises(
        ValueError, match="the frozen weights of language_model are not those that the checkpoint was trained with"
    ):
        MultiModalModel.from_checkpoint(path)


def refused(model: MultiModalModel, path: Path, message: str) -> None:
    """Loading is refused, and the model is as it was."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    content = read_checkpoint(path)
    with pytest.raises(ValueError, match=message):
        load_saved(model, content["state_dict"], content["fingerprints"], saved_names(model))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_run_goes_on_only_from_its_own_checkpoint(make_model, checkpoint):
    other_rank = Tune(mode="lora", lora=LoRA(r=4))
    more = Tune(mode="lora", lora=LoRA(target_modules=("q_proj", "v_proj", "o_proj")))
    fewer = Tune(mode="lora", lora=LoRA(target_modules=("q_proj",)))
    refused(make_model(tune=other_rank), checkpoint, r"lora_A.default.weight is \(8, 32\) in it, but \(4, 32\) in the model")
    refused(make_model(tune=more), checkpoint, r"it lacks 4 weight\(s\), such as language_model.*o_proj")
    refused(make_model(tune=fewer), checkpoint, r"it holds in addition 4 weight\(s\), such as language_model.*v_proj")
    refused(make_model(images=False), checkpoint, r"it holds in addition 4 weight\(s\), such as image_projector")
    refused(make_model(encoder_tune=FULL), checkpoint, r"it lacks \d+ weight\(s\), such as image_encoder")
    content = read_checkpoint(checkpoint)
    model = make_model(seed=9)
    load_saved(model, content["state_dict"], content["fingerprints"], saved_names(model))
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in content["state_dict"].items())


def test_a_missing_fingerprint_is_refused(make_model, checkpoint):
    content, model = read_checkpoint(checkpoint), make_model()
    del content["fingerprints"]["image_encoder"]
    with pytest.raises(ValueError, match="the frozen weights of image_encoder"):
        load_saved(model, content["state_dict"], content["fingerprints"])


def test_a_second_stage_starts_from_the_first(make_model, tmp_path, caplog):
    """LLaVA's: first the projector beside a frozen language model, then adapters as well."""
    first = perturb(make_model(tune=FROZEN))
    path = save(first, tmp_path / "first.ckpt")
    model = make_model(seed=9)
    with caplog.at_level(logging.WARNING):
        loaded, fresh = start_from(model, path)
    assert loaded == {f"image_projector.{name}" for name in all_names(model, "image_projector")}
    assert by_part(fresh).keys() == {"language_model"} and all("lora_" in name for name in fresh)
    assert all(torch.equal(model.state_dict()[name], first.state_dict()[name]) for name in loaded)
    assert not caplog.records


def test_a_warm_start_that_would_lose_weights_is_refused(make_model, checkpoint):
    for model in (make_model(tune=FROZEN), make_model(tune=Tune(mode="lora", lora=LoRA(r=4)))):
        with pytest.raises(ValueError, match=r"holds 8 weight\(s\) that the model has no place for, such as language_model"):
            start_from(model, checkpoint)


def test_a_warm_start_on_another_base_warns(model_folder, make_model, tmp_path, caplog):
    path = save(make_model(), tmp_path / "last.ckpt")
    model = make_model()
    with torch.no_grad():
        model.language_model.model.get_parameter("model.norm.weight")[0] += 0.1
    with caplog.at_level(logging.WARNING):
        start_from(model, path)
    assert "trained beside other frozen weights of language_model than this run has" in caplog.text


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [
        ("language_model", "tune.lora.alpha", 64.0),
        ("language_model", "tune.lora.use_rslora", True),
        ("image_projector", "activation", "relu"),
        ("image_encoder", "tokens", "all"),
    ],
)
def test_an_option_that_changes_what_weights_compute_is_named(make_model, part, option, value):
    parts = make_model().spec()["parts"]
    saved = json.loads(json.dumps(parts))
    check_options(parts, saved)
    place = saved[part]["init_args"]
    *path, last = option.split(".")
    for key in path:
        place = place[key]
    place[last] = value
    with pytest.raises(ValueError, match=rf"(?s){part}\.{option} = {value}, but here it is"):
        check_options(parts, saved)


def test_where_weights_lie_and_how_fast_they_learn_may_differ(make_model):
    parts = make_model().spec()["parts"]
    saved = json.loads(json.dumps(parts))
    saved["language_model"]["init_args"] |= {"name_or_path": "elsewhere", "dtype": "bfloat16"}
    saved["language_model"]["init_args"]["tune"] |= {"lr": 0.5}
    check_options(parts, saved)
