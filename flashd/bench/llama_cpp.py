"""llama.cpp, which flashd is compared with: it answers one prompt with a memory-mapped GGUF and prints JSON figures.

Run it in a process of its own: python -m flashd.bench.llama_cpp MODEL.gguf PROMPT-TOKENS-AS-JSON TOKENS THREADS
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

STARTED = time.perf_counter()


def main(path: str, prompt: list[int], tokens: int, threads: int) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params

    def without_repacking() -> Any:
        # repacked weights are a second copy in anonymous memory: with a memory cap the process would be killed
        p = parameters()
        p.use_extra_bufts = False
        return p

    llama_cpp.llama_model_default_params = llama_cpp.llama_cpp.llama_model_default_params = without_repacking
    model = llama_cpp.Llama(
        path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_batch=512, use_mmap=True, verbose=False
    )
    loaded = time.perf_counter()
    model.eval(prompt)
    token = model.sample(temp=0.0)
    first = time.perf_counter()
    for _ in range(tokens - 1):
        model.eval([token])
        token = model.sample(temp=0.0)
    seconds = time.perf_counter() - first
    print(
        json.dumps(
            {
                "load_seconds": loaded - STARTED,
                "first_token_seconds": first - loaded,
                "prompt_tokens": len(prompt),
                "prefill_tokens_per_second": len(prompt) / (first - loaded),
                "decode_tokens_per_second": (tokens - 1) / seconds,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
