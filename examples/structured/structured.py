"""Take channels out of a model by a recipe; see README.md."""

import argparse

import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

import fista_modifier  # noqa: F401  makes its modifiers known to recipes
from fista_modifier.data import calibration_dataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("text")
parser.add_argument("output")
parser.add_argument("--recipe", default="recipes/fasp.yaml")
parser.add_argument("--samples", type=int, default=128)
parser.add_argument("--seq-len", type=int, default=512)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
dense = AutoModelForCausalLM.from_pretrained(args.model)
before = sum(p.numel() for n, p in dense.named_parameters() if ".layers." in n)
oneshot(
    model=dense,
    tokenizer=tokenizer,
    dataset=calibration_dataset(
        args.text, tokenizer, samples=args.samples, seq_len=args.seq_len
    ),
    recipe=args.recipe,
    num_calibration_samples=args.samples,
    shuffle_calibration_samples=False,
    output_dir=args.output,
)

# transformers builds the smaller model from config.json
model = AutoModelForCausalLM.from_pretrained(args.output)
after = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
print(f"left the decoder layers: {1 - after / before:.2%}")
layers = [m for n, m in model.named_modules() if n.endswith(("_proj", "fc1", "fc2"))]
zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
print(f"zeros: {zeros / sum(layer.weight.numel() for layer in layers):.2%}")

prompt = tokenizer("The capital of France is", return_tensors="pt")
with torch.no_grad():
    reply = model.generate(**prompt, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(reply[0], skip_special_tokens=True))
