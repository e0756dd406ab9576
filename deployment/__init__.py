"""Using what was trained: asking it, exporting it, serving it."""
