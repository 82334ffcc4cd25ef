"""The main job end to end: train a byte-level language model, rewrite, compile, measure."""
