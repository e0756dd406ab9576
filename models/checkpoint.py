"""What a checkpoint holds: the weights that cannot be read again from where they came, and proof of those that can."""

import hashlib
import logging
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from models.manifest import fault, manifest_path
from models.spread import spread_like, whole

if TYPE_CHECKING:
    from models.multimodal import MultiModalModel

log = logging.getLogger(__name__)

METADATA = "meta.pt"
"""Lightning's name for what is no tensor, in a checkpoint that is a folder."""

KEYS = {"state_dict", "model", "fingerprints"}
MAPPED = {"state_dict", "optimizer_states"}
"""What `read_checkpoint` leaves in the file, which is read when a model or an optimizer takes it up."""
DAMAGE = (zipfile.BadZipFile, zlib.error, UnpicklingError, RuntimeError, ValueError, OSError, EOFError)
"""What zipfile and torch raise for a damaged or foreign file."""


def saved_names(model: "MultiModalModel") -> set[str]:
    """Names in the state dict that a checkpoint of the model holds.

    These are what trains (with the running statistics of a fully trained part), and every weight of a part that has no
    source to read it from again, such as a projector.
    """
    names: set[str] = set()
    for part_name, part in model.parts().items():
        trainable = {name for name, parameter in part.own_named_parameters() if parameter.requires_grad}
        frozen = {name for name, parameter in part.own_named_parameters() if not parameter.requires_grad}
        for name in part.own_names():
            is_buffer = name not in trainable and name not in frozen
            if not part.has_source or name in trainable or (is_buffer and part.tune.mode == "full"):
                names.add(f"{part_name}.{name}")
    return names


def fingerprints(model: "MultiModalModel", saved: Iterable[str]) -> dict[str, str]:
    """A hash by part of the weights that a checkpoint does not hold: names, shapes, 64 values and a sum of each.

    Adapters do not count, nor that a layer has some, so that a part has one fingerprint however it is tuned.
    """
    held = set(saved)
    hashes: dict[str, str] = {}
    for part_name, part in model.parts().items():
        own = part.own_names()
        weights = {
            name.replace(".base_layer", ""): tensor.detach()
            for name, tensor in part.state_dict().items()
            if name in own and f"{part_name}.{name}" not in held and "lora_" not in name
        }
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(weights.items()):
            flat = whole(tensor).reshape(-1)
            values = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(tensor.shape)} {_sum_of_bits(flat)}".encode())
            digest.update(values.numpy().tobytes())
        hashes[part_name] = digest.hexdigest()
    return hashes


def _sum_of_bits(flat: Tensor) -> int:
    """The bits of all values, as float32, summed as integers: exact, so in any order and on any device the same."""
    return sum(int(part.to(torch.float32).view(torch.int32).sum()) for part in flat.split(2**24))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint without running code from it.

    Weights and the states of optimizers are mapped, not read: the processes of a machine share what they look at, instead of
    having a copy each. They are to be taken up at once, and copied. Where another machine replaces a file on a network disk, what
    is still mapped of it is lost, and ends the process that looks at it. So all else is read.

    Raises:
        ValueError: There is no such file, or it is no checkpoint of ours.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder with the shards of several processes, from which --ckpt_path goes on under a ShardedStrategy. "
            f"For all else make it one file: python -m lightning.fabric.utilities.consolidate_checkpoint {path}"
        )
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        found = f"that folder has {', '.join(there)}" if there else "there is no checkpoint in that folder"
        raise ValueError(f"there is no checkpoint {path}; {found}")
    if problem := fault(path):
        raise ValueError(
            f"{path} is not what its manifest {manifest_path(path).name} says: {problem}. Take another checkpoint of the run, or "
            "delete the manifest if the file was exchanged on purpose"
        )
    try:
        damaged = _damaged_entry(path)
        checkpoint = None if damaged else torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}): it is cut off, or not one that this project wrote"
        ) from error
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged} in it is not what was written. Take another checkpoint of the run")
    if not isinstance(checkpoint, dict) or not set(checkpoint) >= KEYS:
        raise ValueError(f"{path} is a torch file but no checkpoint of this project: it lacks {', '.join(sorted(KEYS))}")
    return {name: value if name in MAPPED else in_memory(value) for name, value in checkpoint.items()}


def in_memory(value: Any) -> Any:
    """The same with tensors of its own, where they are not on another device; of nested lists and dictionaries, too."""
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.device.type == "cpu" else tensor, value)


def peek(path: Path) -> dict[str, Any]:
    """What a checkpoint holds that is no tensor; those of a file stay on the disk.

    Raises:
        ValueError: There is no such file, or it is no checkpoint of ours.
    """
    try:
        found = torch.load(path / METADATA if path.is_dir() else path, map_location="cpu", mmap=True, weights_only=True)
    except DAMAGE:
        return {} if path.is_dir() else read_checkpoint(path)  # who loads a folder says what is wrong with it
    return found if isinstance(found, dict) else {}


def _damaged_entry(path: Path) -> str | None:
    """The first entry of the archive that is not as it was written: torch does not compare the checksums that it writes."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            is_folder = entry.external_attr & 0x10  # torch would leave it unread
            if is_folder or entry.compress_type != zipfile.ZIP_STORED:  # and map it as it stands there
                return entry.filename
        return archive.testzip()


def load_saved(
    model: "MultiModalModel", state: Mapping[str, Tensor], expected: Mapping[str, str], names: set[str] | None = None
) -> None:
    """Puts the weights of a checkpoint into a built model.

    Args:
        model: The model, built.
        state: The checkpoint's weights, by name in the model.
        expected: The checkpoint's fingerprints of the weights that it does not hold.
        names: What the checkpoint must hold; None: what a checkpoint of this model would, and what else the model has a place
            for (after a warm start that is more).

    Raises:
        ValueError: The names differ from what the model saves, or a frozen part is not the one that was trained with.
    """
    own = model.state_dict()
    wanted = saved_names(model) | (set(state) & set(own)) if names is None else names
    if wanted != set(state):
        raise ValueError(
            "the checkpoint does not fit the model: "
            f"{describe_difference(wanted - set(state), set(state) - wanted)}. Parts, LoRA options and what trains must be as in "
            "the run that wrote it; to start another run from its weights, use --model.init_from"
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"the checkpoint does not fit the model: {name} is {tuple(tensor.shape)} in it, but {tuple(own[name].shape)} in "
                "the model. Give the parts the same options (LoRA rank, projector, models) as in the run that wrote it"
            )
    if other := other_bases(model, expected, wanted):
        raise ValueError(
            f"the frozen weights of {' and '.join(other)} are not those that the checkpoint was trained with: what was trained "
            "beside them would not fit. Point the part at the same model as in training, quantised in the same way; with "
            "tune.lora.init pissa, which computes them, go on with a machine of the same kind"
        )
    model.load_state_dict({name: spread_like(tensor, own[name]) for name, tensor in state.items()}, strict=False)


def other_bases(model: "MultiModalModel", expected: Mapping[str, str], held: Iterable[str]) -> list[str]:
    """Parts whose weights outside a checkpoint are not those that it was trained with.

    Args:
        model: The model, built.
        expected: The checkpoint's fingerprints.
        held: Names of the weights that the checkpoint holds.
    """
    return [part for part, fingerprint in fingerprints(model, held).items() if expected.get(part) != fingerprint]


ELSEWHERE = {
    *("name_or_path", "checkpoint_path", "pretrained", "dtype", "compute_dtype", "quantize"),
    *("attn_implementation", "trust_remote_code"),
    *("image_resize", "video_resize"),
}
"""Options that say where weights come from or how they are computed, which their fingerprints judge, or how big the media are
that a ready model is shown, which the processor's fingerprint judges."""

HOW_FAST = {"tune.lr", "tune.lora.dropout", "tune.mode", "tune.activation_checkpointing"}
"""Options of training that do not change what a checkpoint's weights compute."""


def check_options(parts: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuses parts that would compute something else with the weights of a checkpoint.

    Args:
        parts: Specs of the model's parts, by name.
        saved: Those of the checkpoint's; a part that only one of the two has is not compared.

    Raises:
        ValueError: An option differs, such as the scale of an adapter or an activation.
    """
    for name in parts.keys() & saved.keys():
        own, other = _flat(parts[name]), _flat(saved[name])
        for option in sorted(own.keys() | other.keys()):
            owner, _, last = option.rpartition("init_args.")  # a part may be an option of another
            tune, _, of_tune = last.partition(".")
            if tune.endswith("_tune"):  # a part that has no options of its own, such as a tower of a ready model
                last = f"tune.{of_tune}"
            mode = f"{owner}init_args.{tune}.mode"
            if (
                last.startswith("tune.lora.") and not own.get(mode) == other.get(mode) == "lora"
            ):  # there are no adapters to compare
                continue
            if last.split(".")[0] in ELSEWHERE or last in HOW_FAST:
                continue
            if own.get(option) != other.get(option):
                shown = option.replace("init_args.", "")
                raise ValueError(
                    f"the checkpoint was trained with {name}.{shown} = {other.get(option)}, but here it is {own.get(option)}: "
                    "its weights would compute something else. Give the part the option that it was trained with"
                )


def _flat(spec: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted name; tuples as lists, as JSON has them."""
    if not isinstance(spec, Mapping):
        return {prefix: list(spec) if isinstance(spec, tuple) else spec}
    return {name: leaf for key, value in spec.items() for name, leaf in _flat(value, f"{prefix}.{key}".strip(".")).items()}


def describe_difference(missing: set[str], unexpected: set[str]) -> str:
    """A sentence about names that differ."""
    parts = []
    for what, names in (("it lacks", missing), ("it holds in addition", unexpected)):
        if names:
            parts.append(f"{what} {len(names)} weight(s), such as {sorted(names)[0]}")
    return " and ".join(parts)


def start_from(model: "MultiModalModel", path: str | Path) -> tuple[set[str], set[str]]:
    """A warm start: puts the weights that a checkpoint holds into a built model that may train something else.

    Warns where they were trained beside other frozen weights than the model has.

    Returns:
        Names that were loaded, and names that the model will save but were not in the checkpoint (they start afresh).

    Raises:
        ValueError: The checkpoint holds weights that the model has no place for, or whose part has other options now.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint["state_dict"]
    own = model.state_dict()
    homeless = sorted(name for name, tensor in state.items() if name not in own or own[name].shape != tensor.shape)
    if homeless:
        raise ValueError(
            f"model.init_from: {path} holds {len(homeless)} weight(s) that the model has no place for, such as {homeless[0]}: "
            "an adapter or a projector would be lost. Give the parts the same options (LoRA rank and target_modules, projector) "
            "as in that run"
        )
    held = {name.split(".")[0] for name in state}
    check_options(model.spec()["parts"], {name: spec for name, spec in checkpoint["model"]["parts"].items() if name in held})
    if other := [part for part in other_bases(model, checkpoint["fingerprints"], state) if part in checkpoint["fingerprints"]]:
        log.warning("init_from: %s was trained beside other frozen weights of %s than this run has", path, " and ".join(other))
    model.load_state_dict(state, strict=False)
    return set(state), saved_names(model) - set(state)
