"""One GGUF file through llama.cpp, in a process of its own: answers as model_child.py does.

llama-cpp-python's C interface, every thread and default of llama.cpp; the logits of a short prompt
are compared with those that gguf_models.py kept before anything is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path
from typing import Any

import decoders
import gguf_models
import model_child
import torch

WAYS = {f"llama.cpp {kind}": kind for kind in gguf_models.KINDS}


class Runner:
    """A context for tokens and one for prompts, over one model."""

    def __init__(self, folder: Path, shape: str, kind: str, prompt: int, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        path = gguf_models.path_of(folder, shape, kind)
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, f"llama.cpp does not read {path}"
        self.contexts = {size: self._context(size, threads) for size in (model_child.CACHE, prompt)}
        self.prompt = (llama_cpp.llama_token * prompt)(*decoders.prompt(prompt))
        self.used = 0
        kept = gguf_models.logits_of(folder, shape, kind)
        weights = llama_cpp.llama_model_n_params(self.model)
        self.bits = 8.0 * llama_cpp.llama_model_size(self.model) / weights
        self._check(torch.load(kept, weights_only=True))

    def _context(self, places: int, threads: int) -> Any:
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = places
        parameters.n_threads = parameters.n_threads_batch = threads
        context = self.api.llama_init_from_model(self.model, parameters)
        assert context, "llama.cpp made no context"
        return context

    def _check(self, expected: torch.Tensor) -> None:
        self._run(self.contexts[len(self.prompt)], gguf_models.PROBE)
        found = self.api.llama_get_logits_ith(self.contexts[len(self.prompt)], -1)
        seen = torch.tensor(found[: len(expected)])
        self.cosine = float(torch.nn.functional.cosine_similarity(seen, expected, dim=0))
        assert self.cosine >= model_child.COSINE, f"cosine to the model's logits: {self.cosine:.4f}"
        self._forget(self.contexts[len(self.prompt)])

    def _run(self, context: Any, count: int) -> None:
        """`count` tokens of the prompt after what the context holds; logits of the last."""
        batch = self.api.llama_batch_get_one(self.prompt, count)
        assert self.api.llama_decode(context, batch) == 0
        self.api.llama_get_logits_ith(context, -1)  # waits

    def _forget(self, context: Any) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)

    def token(self) -> float:
        """Seconds of one token."""
        context = self.contexts[model_child.CACHE]
        if self.used >= model_child.CACHE - 1:
            self._forget(context)
            self.used = 0
        self.used += 1
        start = time.perf_counter()
        self._run(context, 1)
        return time.perf_counter() - start

    def decode(self) -> dict[str, Any]:
        return {"seconds": [self.token() for _ in range(model_child.STEPS)]}

    def prefill(self) -> dict[str, Any]:
        context = self.contexts[len(self.prompt)]
        self._forget(context)
        start = time.perf_counter()
        self._run(context, len(self.prompt))
        return {"seconds": [time.perf_counter() - start]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--shape")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int)
    options = parser.parse_args()
    with model_child.answers() as answer:
        start = time.perf_counter()
        kind = WAYS[options.way]
        runner = Runner(options.folder, options.shape, kind, options.prompt, options.threads)
        facts = {"built": time.perf_counter() - start, "bits": runner.bits}
        model_child.serve(runner, facts | {"cosine": runner.cosine}, answer)


if __name__ == "__main__":
    main()
