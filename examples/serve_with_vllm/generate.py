"""Generate text with vLLM from a pruned checkpoint, offline; see README.md."""

from __future__ import annotations

import argparse

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("prompts", nargs="*", default=["The capital of France is"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="do not compile the model: it starts sooner and generates more slowly",
    )
    args = parser.parse_args()

    model = LLM(
        args.checkpoint,
        dtype=args.dtype,
        max_model_len=512,
        enforce_eager=args.enforce_eager,
    )
    settings = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    for request in model.generate(args.prompts, settings):
        print(f"{request.prompt}{request.outputs[0].text}")


if __name__ == "__main__":
    main()
