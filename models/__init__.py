"""Plain torch: the language model, fusion, and the composed multimodal model."""
