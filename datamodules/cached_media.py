"""Media of a dataset that are looked up before they are decoded: as features of a frozen encoder, or as transformed tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from datamodules.batch import FeatureKey, Modality
from datamodules.cache import TensorCache
from datamodules.cache_keys import ContentHash, hash_of
from datamodules.content import Media
from datamodules.media import Decoded, MediaLimits
from datamodules.parts import EncoderLike, Prepared, media_shape
from datamodules.sources import FileState, MediaError, MediaRoot


@dataclass(frozen=True)
class FeatureStore:
    """Where the model keeps the features of its frozen encoders.

    Args:
        cache: Their cache.
        encoders: A hash of each frozen encoder, its options, weights and way of computing; a modality without one has no
            features that could be kept.
    """

    cache: TensorCache
    encoders: Mapping[Modality, str]


class CachedMedia:
    """The media of a source, from its caches; what is not there is decoded and transformed.

    Args:
        media_root: The folder that paths are below.
        limits: How big media may be: of a bigger one not even the hash is computed.
        settings: Of each modality that is cached, a hash of what makes its tensors (`media_settings`).
        media: Cache of decoded and transformed media; None: none.
        features: Where features are kept; None: nowhere.
    """

    def __init__(
        self,
        media_root: MediaRoot,
        limits: MediaLimits,
        settings: Mapping[Modality, str],
        media: TensorCache | None,
        features: FeatureStore | None,
    ) -> None:
        caches = [cache for cache in (media, features.cache if features is not None else None) if cache is not None]
        assert caches, "there is no cache"
        self.media_root = media_root
        self.max_bytes: dict[Modality, int] = {
            "image": limits.image.max_bytes,
            "video": limits.video.max_bytes,
            "audio": limits.audio.max_bytes,
        }
        self.settings = settings
        self.media = media
        self.features = features
        self._content = ContentHash(caches[0])

    def prepare(self, medium: Media, encoder: EncoderLike, decode: Callable[[Media], Decoded]) -> Prepared:
        """A medium as its encoder takes it, or already encoded.

        Args:
            medium: What the row names, of a modality in `settings`.
            encoder: The encoder of its modality.
            decode: Decodes it, where it is in no cache.

        Raises:
            MediaError: The source cannot be used, or cannot be decoded whole.
        """
        files = ContentHash.states(medium, self.media_root)
        if any(file is not None and file.num_bytes > self.max_bytes[medium.modality] for file in files):
            decoded = decode(medium)  # it says what is wrong
            return Prepared(encoder.transform(decoded), encoder.num_tokens(media_shape(decoded)))
        try:
            content = hash_of(self._content(medium, files), self.settings[medium.modality])
        except OSError as error:
            raise MediaError(f"{medium.files[0]} cannot be read: {error}") from error
        encoder_hash = self.features.encoders.get(medium.modality) if self.features is not None else None
        key = hash_of("features", content, encoder_hash) if encoder_hash is not None else None
        if self.features is not None and key is not None and (entry := self.features.cache.get(key)) is not None:
            return Prepared(entry.tensor, int(entry.notes["num_features"]), has_features=True)
        tensor, shape = self._transformed(medium, encoder, decode, hash_of("media", content), files)
        num_features = encoder.num_tokens(shape)
        is_known = ContentHash.states(medium, self.media_root) == files  # else what was read is not what was hashed
        return Prepared(tensor, num_features, feature_key=FeatureKey(key, num_features) if key is not None and is_known else None)

    def _transformed(
        self, medium: Media, encoder: EncoderLike, decode: Callable[[Media], Decoded], key: str, files: list[FileState | None]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """The transformed medium, and the shape that it had before."""
        if self.media is not None and (entry := self.media.get(key)) is not None:
            return entry.tensor, tuple(int(size) for size in entry.notes["shape"].split())
        decoded = decode(medium)
        tensor, shape = encoder.transform(decoded), media_shape(decoded)
        if self.media is not None and ContentHash.states(medium, self.media_root) == files:
            self.media.put(key, tensor, {"shape": " ".join(map(str, shape))})
        return tensor, shape
