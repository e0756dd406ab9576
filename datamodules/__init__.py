"""Files to samples, examples and batches."""
