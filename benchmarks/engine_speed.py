"""
Speed and memory of one engine with one checkpoint, as JSON. serving_speed.py runs this
script by the Python that has the engine.

    python engine_speed.py transformers|vllm CHECKPOINT '{"prompt": 512, ...}'
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], object]


def transformers_engine(checkpoint: str, sizes: dict[str, Any]) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(sizes["threads"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=sizes["dtype"])

    def generate(prompts: list[list[int]], new: int) -> object:
        ids = torch.tensor(prompts)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )

    return generate


def vllm_engine(checkpoint: str, sizes: dict[str, Any]) -> Generate:
    from vllm import LLM, SamplingParams

    model = LLM(
        checkpoint,
        dtype=sizes["dtype"],
        max_model_len=sizes["prompt"] + sizes["new"],
        max_num_seqs=sizes["sequences"],
        max_num_batched_tokens=sizes["prompt"] * sizes["sequences"],
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )

    def generate(prompts: list[list[int]], new: int) -> object:
        settings = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return model.generate(given, settings, use_tqdm=False)

    return generate


def seconds(generate: Generate, prompts: list[list[int]], new: int) -> float:
    """Return the least time of three runs, after one that warms up."""
    generate(prompts, new)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        generate(prompts, new)
        taken.append(time.perf_counter() - started)
    return min(taken)


def main(engine: str, checkpoint: str, given: str) -> None:
    sizes = json.loads(given)
    start = {"transformers": transformers_engine, "vllm": vllm_engine}[engine]
    generate = start(checkpoint, sizes)
    count, prompt, new = sizes["sequences"], sizes["prompt"], sizes["new"]

    def prompts(length: int) -> list[list[int]]:
        return [
            [(7 * i + 13 * j) % 4000 + 10 for j in range(length)] for i in range(count)
        ]

    prefill = seconds(generate, prompts(prompt), 1)
    decode = seconds(generate, prompts(1), new) - seconds(generate, prompts(1), 1)
    found = {
        "prefill": count * prompt / prefill,
        "decode": count * (new - 1) / decode,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
