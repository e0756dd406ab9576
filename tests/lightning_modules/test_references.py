"""References: which model each is, that training leaves it alone, and that media are encoded once.

Shape suffixes: S supervised positions.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.batch import Batch
from encoders.tuning import LoRA, Tune
from lightning_modules.references import (
    REFERENCE,
    AdapterOff,
    FrozenCopy,
    Reference,
    SecondAdapter,
    default_reference,
    label_logps,
)
from models.adapters import adapters_exchanged, adapters_off, copy_adapters
from models.multimodal import MultiModalModel
from tests.lightning_modules.answer_batches import pair_batch

FROZEN = Tune(mode="frozen")
LORA = Tune(mode="lora")
WARM = ["language_model.model.layers.0.lora_A"]

MakeModel = Callable[..., MultiModalModel]
MakeBatch = Callable[..., Batch]


def logps(reference: Reference, model: MultiModalModel, batch: Batch) -> Tensor:
    features = model.features(batch)
    return reference.logps(model, batch, features, model.encode(batch, features))


def policy(model: MultiModalModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return label_logps(model, batch, model.encode(batch))


def train(model: MultiModalModel, batch: Batch, steps: int = 3) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (-label_logps(model, batch, model.encode(batch)).sum()).backward()
        optimizer.step()


KINDS: dict[str, tuple[Reference, dict[str, Any]]] = {
    "adapter off": (AdapterOff(), {"projector_tune": FROZEN}),
    "second adapter": (SecondAdapter(), {"projector_tune": FROZEN}),
    "second adapters in every part": (SecondAdapter(), {"encoder_tune": LORA, "projector_tune": FROZEN}),
    "second adapters, DoRA": (
        SecondAdapter(),
        {"projector_tune": FROZEN, "tune": Tune(mode="lora", lora=LoRA(r=4, alpha=3, use_dora=True, use_rslora=True))},
    ),
    "copy of adapters and projector": (FrozenCopy(), {}),
    "copy of all": (FrozenCopy(), {"tune": Tune(mode="full"), "encoder_tune": Tune(mode="full")}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_move_a_reference(kind: str, make_model: MakeModel, make_batch: MakeBatch) -> None:
    made, options = KINDS[kind]
    reference = type(made)()
    model, batch = make_model(**options), pair_batch(make_batch)
    reference.prepare(model, WARM, "")
    before, start = logps(reference, model, batch), policy(model, batch)
    assert torch.equal(before, start) == (not isinstance(reference, AdapterOff))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    train(model, batch)
    assert torch.equal(logps(reference, model, batch), before)
    assert (policy(model, batch) - start).abs().max() > 0.1
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert any(flags.values()) and not any("reference" in name for name, flag in flags.items() if flag)


def test_adapters_off_are_the_model_without_adapters(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = pair_batch(make_batch)
    tuned = make_model(projector_tune=FROZEN, encoder_tune=LORA)
    plain = make_model(projector_tune=FROZEN, tune=FROZEN)
    plain.image_projector.load_state_dict(tuned.image_projector.state_dict())
    reference = AdapterOff()
    reference.prepare(tuned, WARM, "")
    assert torch.equal(logps(reference, tuned, batch), policy(plain, batch))
    assert not torch.allclose(policy(tuned, batch), policy(plain, batch), atol=0.1)


def test_a_second_adapter_is_that_of_peft(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Exchanged by hand: the policy's adapters are put back to the values that the copy was made of."""
    batch, model = pair_batch(make_batch), make_model(projector_tune=FROZEN)
    start = {name: weight.clone() for name, weight in model.state_dict().items() if "lora_" in name}
    copy_adapters(model, REFERENCE)
    train(model, batch)
    with adapters_exchanged(model, REFERENCE):
        second = policy(model, batch)
    trained = {name: weight.clone() for name, weight in model.state_dict().items() if name in start}
    assert any(not torch.equal(start[name], weight) for name, weight in trained.items())
    model.load_state_dict(start, strict=False)
    assert torch.equal(policy(model, batch), second)


def test_an_error_inside_leaves_the_adapters_on(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model, batch = make_model(), pair_batch(make_batch)
    before = policy(model, batch)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        assert not torch.equal(policy(model, batch), before)
        raise RuntimeError("inside")
    assert torch.equal(policy(model, batch), before)
    assert all(p.requires_grad for name, p in model.language_model.named_parameters() if "lora_" in name)


def test_a_copy_shares_what_is_frozen(make_model: MakeModel) -> None:
    model, reference = make_model(), FrozenCopy()
    reference.prepare(model, [], "")
    own = dict(model.named_parameters())
    for name, parameter in reference.model.named_parameters():
        assert (parameter is own[name]) == (not own[name].requires_grad), name
        assert not parameter.requires_grad
    assert reference.train().model.training is False


@pytest.mark.parametrize(
    ("reference", "options", "passes"),
    [
        (AdapterOff(), {"projector_tune": FROZEN}, 1),
        (SecondAdapter(), {"projector_tune": LORA}, 1),
        (FrozenCopy(), {}, 1),
        (FrozenCopy(), {"encoder_tune": Tune(mode="full")}, 2),  # what trains sees the pictures for itself
        (AdapterOff(), {"encoder_tune": LORA, "projector_tune": FROZEN}, 2),
    ],
)
def test_media_are_encoded_once(
    reference: Reference, options: dict[str, Any], passes: int, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    if options.get("projector_tune") == LORA:
        options = {"projector_tune": Tune(mode="lora", lora=LoRA(target_modules=("linear_1",)))}
    model, batch = make_model(**options), pair_batch(make_batch, num_pairs=3)
    reference.prepare(model, WARM, "")
    seen: list[int] = []
    count = lambda module, args, output: seen.append(len(args[0]))  # noqa: E731
    model.image_encoder.register_forward_hook(count)
    if isinstance(reference, FrozenCopy) and reference.model.image_encoder is not model.image_encoder:
        reference.model.image_encoder.register_forward_hook(count)
    features = model.features(batch)
    encoded = model.encode(batch, features)
    reference.logps(model, batch, features, encoded)
    label_logps(model, batch, encoded)
    assert sum(seen) == 3 * passes  # three pictures, six rows


def test_the_default_is_the_start_of_the_run(make_model: MakeModel) -> None:
    lora = make_model(projector_tune=FROZEN)
    assert type(default_reference(lora, [])) is AdapterOff
    assert type(default_reference(lora, ["image_projector.linear_1.weight"])) is AdapterOff
    assert type(default_reference(lora, WARM)) is SecondAdapter
    assert type(default_reference(make_model(), [])) is FrozenCopy
    assert type(default_reference(make_model(tune=Tune(mode="full"), projector_tune=FROZEN), [])) is FrozenCopy


@pytest.mark.parametrize("kind", [AdapterOff, SecondAdapter])
def test_what_training_would_move_is_refused(kind: type[Reference], make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="image_projector trains in full") as error:
        kind().prepare(make_model(), WARM, "")
    assert "model.reference FrozenCopy" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="language_model and image_projector train in full"):
        kind().prepare(make_model(tune=Tune(mode="full")), [], "")


def test_adapters_that_start_elsewhere_have_no_base(make_model: MakeModel) -> None:
    model = make_model(projector_tune=FROZEN)  # whose B is not 0, as after PiSSA
    with pytest.raises(ValueError, match="does not start at 0.*PiSSA.*SecondAdapter"):
        AdapterOff().prepare(model, [], "")


@pytest.mark.parametrize("kind", [SecondAdapter, FrozenCopy])
def test_a_resumed_run_gets_its_reference_back(kind: type[Reference], make_model: MakeModel, make_batch: MakeBatch) -> None:
    options = {"projector_tune": FROZEN} if kind is SecondAdapter else {}
    batch, model, reference = pair_batch(make_batch), make_model(**options), kind()
    reference.prepare(model, WARM, "")
    before = logps(reference, model, batch)
    train(model, batch)
    resumed, other = make_model(**options, seed=9), kind()
    other.prepare(resumed, WARM, "")
    assert not torch.equal(logps(other, resumed, batch), before)
    resumed.load_state_dict(model.state_dict(), strict=False)
    other.load(resumed, reference.saved(model))
    assert torch.equal(logps(other, resumed, batch), before)
    assert torch.equal(policy(resumed, batch), policy(model, batch))
    with pytest.raises(ValueError, match="another model.reference"):
        other.load(resumed, {})
