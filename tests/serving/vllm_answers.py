"""Run by vLLM's own Python: what vLLM says of a checkpoint, as JSON."""

from __future__ import annotations

import json
import sys

from vllm import LLM, SamplingParams


def main(
    output: str,
    checkpoint: str,
    dtype: str,
    prompts: list[list[int]],
    new_tokens: int,
    load_format: str,
) -> None:
    """Greedy tokens after each prompt, and the log-probability of each prompt token."""
    model = LLM(
        checkpoint,
        dtype=dtype,
        load_format=load_format,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        skip_tokenizer_init=True,
    )
    settings = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        prompt_logprobs=1,
        detokenize=False,
    )
    requests = model.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], settings
    )
    answers = {
        "tokens": [list(request.outputs[0].token_ids) for request in requests],
        "logprobs": [
            [
                position[token].logprob
                for token, position in zip(
                    request.prompt_token_ids[1:],
                    request.prompt_logprobs[1:],
                    strict=True,
                )
            ]
            for request in requests
        ],
    }
    with open(output, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(sys.argv[2], **json.loads(sys.argv[1]))
