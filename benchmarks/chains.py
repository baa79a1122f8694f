"""
Perplexity of a pruned model that is quantised by three quantisers, and its agreement
with the dense one.

The model is pruned to 2:4 once, with the default preset. Each quantiser then starts
from the same pruned checkpoint and calibrates on the same tokens. Every checkpoint is
loaded as users load it. "zeros lost" counts pruned entries that quantisation revived.

    python benchmarks/chains.py --model DIR --calibration FILE.txt --text FILE.txt \\
        --samples 32 --seq-len 512 --work FOLDER --out benchmarks/results/chains.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import inputs
import torch
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

from fista_modifier import MaskedGPTQModifier, pipeline
from fista_modifier.evaluation.agreement import DIVERGENCE, SHARE, block_agreement
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import recipe
from fista_modifier.evaluation.perplexity import Perplexity, block_losses, token_blocks
from fista_modifier.evaluation.results import Row
from fista_modifier.models.targets import IGNORE
from fista_modifier.solver import NofM

# 576 columns are no multiple of W4A16's groups of 128
GROUPS_OF_64 = {
    "targets": ["Linear"],
    "weights": {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 64,
    },
}
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8": {"scheme": "W8A8", "targets": ["Linear"]},
    "W4A16, groups of 64": {"config_groups": {"group_0": GROUPS_OF_64}},
}
QUANTISERS: dict[str, type[Modifier]] = {
    "round to nearest": QuantizationModifier,
    "GPTQModifier": GPTQModifier,
    "MaskedGPTQModifier": MaskedGPTQModifier,
}


def revived(folder: str | Path, zeros: dict[str, torch.Tensor]) -> float:
    """Return the share of these zeros that a decompressed checkpoint has lost."""
    decompressed = CompressedTensorsConfig(run_compressed=False)
    quantised = hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=decompressed if quantised else None
    )
    lost = sum(
        int((model.get_submodule(name).weight[zero] != 0).sum())
        for name, zero in zeros.items()
    )
    return lost / sum(int(zero.sum()) for zero in zeros.values())


def main() -> None:
    parser = inputs.arguments(__doc__, 32)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--eval-tokens", type=int, default=32768)
    parser.add_argument("--work", type=Path, required=True, help="for checkpoints")
    args = parser.parse_args()

    tokenizer = pipeline.load_tokenizer(args.model)
    data = inputs.calibration(args)
    dense = pipeline.load_model(args.model)
    blocks = {
        text.stem: token_blocks(
            tokenizer, text.read_text(encoding="utf-8"), args.seq_len, args.eval_tokens
        )
        for text in args.text
    }
    header = ["scheme", "quantised by", *inputs.measures_header(blocks), "zeros lost"]
    rows: list[list[str]] = []

    def checkpoint(folder: Path, start: str | Path, modifier: Modifier) -> Path:
        if not folder.exists():
            model = pipeline.load_model(str(start), "float32")
            run = pipeline.prune(model, tokenizer, data, modifier)
            pipeline.save(run.model, tokenizer, folder)
        return folder

    def add(scheme: str, quantiser: str, folder: str | Path) -> None:
        lost = 100 * revived(folder, zeros) if zeros else 0.0
        model = pipeline.load_model(str(folder))
        row: Row = {"perplexity": {}, SHARE: {}, DIVERGENCE: {}}
        for name, tokens in blocks.items():
            losses = block_losses(model, tokens)
            found = Perplexity.of_blocks(losses, args.seq_len)
            same = block_agreement(model, dense, tokens)
            row["perplexity"][name] = found.value
            row[SHARE][name], row[DIVERGENCE][name] = same.share, same.divergence
        rows.append(
            [scheme, quantiser, *inputs.measures([row], blocks), f"{lost:.2f} %"]
        )
        inputs.show(args.out, markdown_table(header, rows) + "\n")

    zeros: dict[str, torch.Tensor] = {}
    add("dense", "", args.model)
    pruner = recipe("fista", NofM(2, 4))
    pruned = checkpoint(args.work / "pruned", args.model, pruner)
    zeros = {
        name: module.weight == 0
        for name, module in pipeline.load_model(str(pruned)).named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    }
    add("2:4", "", pruned)
    for scheme, fields in SCHEMES.items():
        for name, quantiser in QUANTISERS.items():
            folder = args.work / f"{scheme.split(',')[0]}-{quantiser.__name__}"
            made = checkpoint(folder, pruned, quantiser(**fields, ignore=IGNORE))
            add(scheme, name, made)


if __name__ == "__main__":
    main()
