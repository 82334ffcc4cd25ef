"""Peak memory of `ternc quantize` on a large sharded folder of random weights, streamed to its end.

    python benchmarks/quality_memory.py --folder DIR --text FILE [--layers 24] [-- --method als ...]

DIR/model is made once: a Llama of 51 M parameters a block, bf16, in shards of 500 MB. What follows
`--` are options of `ternc quantize`. Its memory is read ten times a second: anonymous pages are the
process's own, those of files are the folder mapped. DIR/resume keeps fitted layers: a run that was
interrupted goes on there. The record is DIR/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import commit  # noqa: E402

KINDS = {"RssAnon": "anonymous", "RssFile": "file", "VmHWM": "highest"}
"""Line of /proc/PID/status -> name in the record."""

EVERY = 0.1
"""Seconds between two readings."""


def main() -> int:
    options = parse_arguments()
    model = options.folder / "model"
    if not (model / "config.json").exists():
        make_model(model, options.layers, options.width, options.hidden)
    command = [
        sys.executable, "-m", "ternc", "quantize", str(model),
        "-o", str(options.folder / "out"), "--calibration", str(options.text),
        "--resume", str(options.folder / "resume"), *options.rest,
    ]  # fmt: skip
    start = time.monotonic()
    peaks, status = watch(command)
    found = {
        "command": " ".join(
            ["ternc quantize model -o out --calibration TEXT --resume resume", *options.rest]
        ),
        "commit": commit(),
        "parameters": parameters(model),
        "folder_mib": sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2**20,
        "peak_mib": peaks,
        "seconds": time.monotonic() - start,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "status": status,
    }
    (options.folder / "memory.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return status


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="model, result and record")
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on, read as bytes")
    parser.add_argument("--layers", type=int, default=24, help="blocks of the model")
    parser.add_argument("--width", type=int, default=2048, help="of the residual stream")
    parser.add_argument("--hidden", type=int, default=5632, help="of the feed-forward layers")
    parser.add_argument("rest", nargs="*", help="after --: options of ternc quantize")
    return parser.parse_args()


def make_model(folder: Path, layers: int, width: int, hidden: int) -> None:
    """A decoder of random weights over bytes, written shard by shard."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=width // 128,
        max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


def parameters(folder: Path) -> int:
    """Numbers in the weight files of a folder."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in list(file.keys()):
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


def watch(command: list[str]) -> tuple[dict[str, float], int]:
    """Runs the command; peaks of its memory in MiB, and its exit status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peaks = dict.fromkeys(KINDS.values(), 0.0)
    while process.poll() is None:
        for line in _status(process.pid):
            name, _, value = line.partition(":")
            if kind := KINDS.get(name):
                peaks[kind] = max(peaks[kind], int(value.split()[0]) / 1024)
        time.sleep(EVERY)
    return peaks, process.returncode


def _status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return []


if __name__ == "__main__":
    sys.exit(main())
