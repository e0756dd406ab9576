"""Pixels, frames and waveforms to features, and features to embeddings."""
