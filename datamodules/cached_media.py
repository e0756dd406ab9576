"""Media of a dataset that are looked up before they are decoded: as features of a frozen encoder, or as transformed tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from datamodules.batch import Modality
from datamodules.cache import TensorCache
from datamodules.cache_keys import ContentHash, hash_of
from datamodules.content import Media
from datamodules.media import Decoded
from datamodules.parts import EncoderLike, Prepared, media_shape
from datamodules.sources import MediaError, MediaRoot


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
        settings: Of each modality that is cached, a hash of what makes its tensors (`media_settings`).
        media: Cache of decoded and transformed media; None: none.
        features: Where features are kept; None: nowhere.
    """

    def __init__(
        self,
        media_root: MediaRoot,
        settings: Mapping[Modality, str],
        media: TensorCache | None,
        features: FeatureStore | None,
    ) -> None:
        caches = [cache for cache in (media, features.cache if features is not None else None) if cache is not None]
        assert caches, "there is no cache"
        self.media_root = media_root
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
        try:
            content = hash_of(self._content(medium, files), self.settings[medium.modality])
        except OSError as error:
            raise MediaError(f"{medium.files[0]} cannot be read: {error}") from error
        encoder_hash = self.features.encoders.get(medium.modality) if self.features is not None else None
        feature_key = hash_of("features", content, encoder_hash) if encoder_hash is not None else ""
        if self.features is not None and feature_key and (entry := self.features.cache.get(feature_key)) is not None:
            return Prepared(entry.tensor, len(entry.tensor), has_features=True)
        media_key = hash_of("media", content)
        if self.media is not None and (entry := self.media.get(media_key)) is not None:
            shape = tuple(int(size) for size in entry.notes["shape"].split())
            return Prepared(entry.tensor, encoder.num_tokens(shape), feature_key=feature_key)
        decoded = decode(medium)
        tensor, shape = encoder.transform(decoded), media_shape(decoded)
        if ContentHash.states(medium, self.media_root) != files:  # changed meanwhile: what was read is not what was hashed
            feature_key = ""
        elif self.media is not None:
            self.media.put(media_key, tensor, {"shape": " ".join(map(str, shape))})
        return Prepared(tensor, encoder.num_tokens(shape), feature_key=feature_key)
