"""What `ternc.quantize` may rotate offline, found in the graph: one kind of fold a file."""
