"""One rule a file; their order is the list in `ternc.passes.pipeline`."""
