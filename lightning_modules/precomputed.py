"""A reference whose log-probabilities are computed once, and read by every later epoch and run.

Shape suffixes: A answers, S supervised positions, L tokens of an answer.
"""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.batch import Batch, answers_of_positions
from datamodules.cache_keys import hash_of
from lightning_modules.logp_store import LogpStore
from lightning_modules.references import AdapterOff, Reference, default_reference
from models.checkpoint import fingerprints
from models.multimodal import EncodedMedia, MultiModalModel

SOURCES = ("name_or_path", "checkpoint_path", "attn_implementation", "trust_remote_code")
"""Options of a part that say where its weights come from or how fast they compute."""


class PrecomputedReference(Reference):
    """Reads the reference's log-probabilities of each answer from a folder, and computes those that are not there.

    The first epoch fills the folder; later epochs, and other runs with other losses or another beta, read it. To fill it before
    any training, run `train.py validate` with this reference and the training rows as `data.val_path`. What is kept are the
    log-probabilities of the tokens of each answer, under a key of the answer, its prompt and its media. A folder belongs to
    one reference: with other weights, another chat template, other transforms of media or another precision it is refused.
    Media that are augmented at random are other media in each epoch, and fill the folder without end.

    Args:
        folder: Where the log-probabilities are; any number of runs may share it.
        of: The reference that they are of; None: as without this one.
        compute_missing: Compute what the folder lacks. False: an answer that it lacks is an error, and no memory is taken
            for a copy of the reference.
    """

    def __init__(self, folder: str, of: Reference | None = None, compute_missing: bool = True) -> None:
        super().__init__()
        if isinstance(of, PrecomputedReference):
            raise ValueError("model.reference.of is itself precomputed: give the reference that is to be computed, or null")
        self.folder = folder
        self.of = of
        self.compute_missing = compute_missing
        self.num_read = self.num_computed = 0
        self._store: LogpStore | None = None
        self._made_of: dict[str, str] = {}

    @property
    def description(self) -> str:
        assert self.of is not None
        return f"{self.of.description}; its log-probabilities are kept in {self.folder}"

    def prepare(self, model: MultiModalModel, warm_started: Collection[str], processing: str) -> None:
        if self.of is None:
            self.of = default_reference(model, warm_started)
        self._made_of = {"the chat template, the tokenizer or the transforms": processing, **_weights(model, self.of)}
        if self.compute_missing:
            self.of.prepare(model, warm_started, processing)

    @torch.no_grad()
    def logps(self, model: MultiModalModel, batch: Batch, features: EncodedMedia, encoded: EncodedMedia) -> Tensor:
        if self._store is None:
            self._store = LogpStore(Path(self.folder), {**self._made_of, "the precision": _precision(model, batch)})
        keys, answer_S = batch["answers"]["keys"], answers_of_positions(batch)
        counts = answer_S.bincount(minlength=len(keys)).tolist()
        known = [self._store.get(key) for key in keys]
        for answer, (logps_L, count) in enumerate(zip(known, counts, strict=True)):
            if logps_L is not None and len(logps_L) != count:
                found = f"{self.folder} has log-probabilities of {len(logps_L)}"
                raise ValueError(f"{self._of_row(batch, answer)} has {count} tokens, but {found}: give another folder")
        missing = [answer for answer, logps_L in enumerate(known) if logps_L is None]
        computed = self._compute(model, batch, features, encoded, missing, counts)
        self.num_read += len(keys) - len(missing)
        self.num_computed += len(missing)
        # answers follow each other in the order of their positions
        return torch.cat([computed[i] if x is None else x.to(answer_S.device) for i, x in enumerate(known)])

    def saved(self, model: MultiModalModel) -> dict[str, Any]:
        self.flush()  # what a resumed run has behind it is on disk, and read by both alike
        assert self.of is not None
        return {"made_of": self._made_of, "of": self.of.saved(model) if self.compute_missing else {}}

    def load(self, model: MultiModalModel, state: Mapping[str, Any]) -> None:
        self._made_of = dict(state["made_of"])
        if self.compute_missing:
            assert self.of is not None
            self.of.load(model, state["of"])

    def check_spread(self) -> None:
        if self.compute_missing:
            raise ValueError(
                "model.reference is PrecomputedReference, which would compute what is missing on some processes alone, but "
                "trainer.strategy has them run each layer together: fill the folder on one device or under "
                "configs/strategy/ddp.yaml, then set model.reference.compute_missing to false"
            )

    def flush(self) -> None:
        if self._store is not None:
            self._store.flush()

    def _compute(
        self,
        model: MultiModalModel,
        batch: Batch,
        features: EncodedMedia,
        encoded: EncodedMedia,
        missing: list[int],
        counts: list[int],
    ) -> dict[int, Tensor]:
        """The log-probabilities of missing answers, by their numbers; they are kept."""
        if not missing:
            return {}
        assert self.of is not None and self._store is not None
        if not self.compute_missing:
            raise ValueError(
                f"{self._of_row(batch, missing[0])} is not in {self.folder}, which was made of other rows or media, and "
                "model.reference.compute_missing is false: set it to true, or fill the folder as PrecomputedReference says"
            )
        parts = self.of.logps(model, batch, features, encoded).split(counts)
        for answer in missing:
            self._store.put(batch["answers"]["keys"][answer], parts[answer])
        return {answer: parts[answer] for answer in missing}

    def _of_row(self, batch: Batch, answer: int) -> str:
        example = batch["examples"][batch["answers"]["example_A"][answer]]
        return f"{example['file']}:{example['line']}: the {batch['answers']['roles'][answer]} answer"


def _weights(model: MultiModalModel, reference: Reference) -> dict[str, str]:
    """Hashes of all that the policy computes with before the first step, as far as the reference does."""
    found = {f"the weights of {part}": value for part, value in fingerprints(model, ()).items()}
    for name, part in model.slots().items():
        found[f"the options of {name}"] = hash_of(_untuned(part.spec()))
    found["the adapters"] = "none" if isinstance(reference, AdapterOff) else _adapters(model)
    return found


def _adapters(model: MultiModalModel) -> str:
    """A hash of the adapters; one whose B is still 0 adds nothing, whatever its A. `none`: they all add nothing."""
    weights = {name: weight.detach() for name, weight in model.named_parameters() if "lora_" in name}
    layers = {name.partition(".lora_")[0] for name, weight in weights.items() if _is_last(name) and bool(weight.any())}
    if not layers:
        return "none"
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(weights.items()):
        if name.partition(".lora_")[0] in layers:
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.float().cpu().contiguous().numpy().tobytes())
    scales = {name: part.spec()["init_args"]["tune"]["lora"] for name, part in model.slots().items() if "tune" in part.options}
    return hash_of(digest.hexdigest(), scales)


def _is_last(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name


def _untuned(spec: Any) -> Any:
    """A spec without how its parts are trained and where they come from."""
    if isinstance(spec, Mapping):
        return {name: _untuned(value) for name, value in spec.items() if not name.endswith("tune") and name not in SOURCES}
    return spec


def _precision(model: MultiModalModel, batch: Batch) -> str:
    device = batch["tokens_BT"].device.type
    weights = next(model.language_model.parameters()).dtype
    return f"{weights}, autocast to {torch.get_autocast_dtype(device)}" if torch.is_autocast_enabled(device) else str(weights)
