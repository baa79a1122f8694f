"""A real vLLM loads what was pruned, and says what transformers says."""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from families import FAMILIES, VOCABULARY, tiny_model
from runs import calibration, run
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fista_modifier import FASPPruningModifier, FISTAPruningModifier, pipeline
from fista_modifier.checkpoint.storage import StorageFormat, convert
from fista_modifier.data import calibration_dataset

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = Path(__file__).with_name("vllm_answers.py")
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
PROMPTS = ["The capital of France is", "Water boils at a temperature of"]
NEW_TOKENS = 8
# a server does not see how weights were found
HASTE: dict[str, Any] = {
    "ignore": ["re:.*lm_head"],
    "preset": "fast",
    "warm_start": "wanda",
    "refit": False,
}

CPU = Path("/proc/cpuinfo")
FOUR_BITS = pytest.mark.skipif(
    not CPU.exists() or "avx512f" not in CPU.read_text(),
    reason="vLLM's 4-bit products need AVX-512 on a CPU",
)

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def smollm2_pruned(
    smollm2: Path, wikipedia: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """SmolLM2-135M pruned to 2:4, all of it, in haste."""
    tokenizer = pipeline.load_tokenizer(str(smollm2))
    model = pipeline.load_model(str(smollm2))
    data = calibration_dataset(str(wikipedia), tokenizer, samples=2, seq_len=128)
    modifier = FISTAPruningModifier(mask_structure="2:4", **HASTE)
    run = pipeline.prune(model, tokenizer, data, modifier)
    checkpoint = tmp_path_factory.mktemp("smollm2") / "pruned"
    pipeline.save(run.model, tokenizer, checkpoint)
    return checkpoint


@pytest.fixture
def tiny(
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    awq_on_cpu: None,
) -> Callable[..., Path]:
    """A tiny model to which a recipe was applied, by its file or as an object."""
    tokens = torch.randint(
        2, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1)
    )

    def make(recipe: Any, **settings: Any) -> Path:
        run(
            tiny_model("llama", **WIDE | settings),
            str(ROOT / "recipes" / recipe) if isinstance(recipe, str) else recipe,
            dataset=calibration(tokens),
            output_dir=tmp_path / "tiny",
            processor=tiny_tokenizer,
        )
        return tmp_path / "tiny"

    return make


@pytest.fixture
def ask(vllm_python: Path, vllm_environment: dict[str, str], tmp_path: Path) -> Ask:
    """vLLM's answers, from a process of its own."""

    def answers(
        checkpoint: Path,
        prompts: list[list[int]],
        dtype: str = "float32",
        load_format: str = "auto",
        **environment: str,
    ) -> dict[str, Any]:
        job = {
            "checkpoint": str(checkpoint),
            "dtype": dtype,
            "prompts": prompts,
            "new_tokens": NEW_TOKENS,
            "load_format": load_format,
        }
        output = tmp_path / "answers.json"
        process = subprocess.run(
            [vllm_python, ANSWERS, json.dumps(job), output],
            env=vllm_environment | environment,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        return json.loads(output.read_text())

    return answers


def expected(checkpoint: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """The same of transformers."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens, logprobs = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].float().log_softmax(-1)
            reply = model.generate(
                ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
            )
        tokens.append(reply[0, len(prompt) :].tolist())
        logprobs.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return {"tokens": tokens, "logprobs": logprobs}


def assert_same(answers: dict[str, Any], other: dict[str, Any]) -> None:
    assert answers["tokens"] == other["tokens"]
    for one, two in zip(answers["logprobs"], other["logprobs"], strict=True):
        assert one == pytest.approx(two, abs=1e-3)


def test_vllm_agrees_with_transformers_on_a_pruned_smollm2(
    smollm2_pruned: Path, ask: Ask
) -> None:
    checkpoint = smollm2_pruned
    tokenizer = pipeline.load_tokenizer(str(checkpoint))
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert_same(ask(checkpoint, prompts), expected(checkpoint, prompts))


def test_vllm_agrees_with_transformers_on_a_smaller_smollm2(
    smollm2: Path, wikipedia: Path, ask: Ask, tmp_path: Path
) -> None:
    """Of which channels have left, and which is then pruned to 2:4."""
    tokenizer = pipeline.load_tokenizer(str(smollm2))
    model = pipeline.load_model(str(smollm2))
    dense = model.num_parameters()
    data = calibration_dataset(str(wikipedia), tokenizer, samples=2, seq_len=128)
    recipe = [
        FASPPruningModifier(sparsity=0.3, ignore=HASTE["ignore"], preset="paper"),
        FISTAPruningModifier(mask_structure="2:4", **HASTE),
    ]
    run = pipeline.prune(model, tokenizer, data, recipe)
    pipeline.save(run.model, tokenizer, tmp_path / "smaller")
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert config["intermediate_size"] % 64 == 0
    assert run.model.num_parameters() < 0.8 * dense
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    checkpoint = tmp_path / "smaller"
    assert_same(ask(checkpoint, prompts), expected(checkpoint, prompts))


def test_vllm_agrees_with_transformers_on_a_model_with_fewer_heads(
    tiny: Callable[..., Path], ask: Ask
) -> None:
    fields: dict[str, Any] = {"sparsity": 0.5, "structures": ["mlp", "heads"]}
    modifier = FASPPruningModifier(**fields, ignore=HASTE["ignore"], preset="paper")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    checkpoint = tiny(modifier, **heads)
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert (config["intermediate_size"], config["head_dim"]) == (128, 32)
    prompts = [[5, 9, 33, 2, 17, 60], [7, 7, 12]]
    assert_same(ask(checkpoint, prompts), expected(checkpoint, prompts))


@pytest.mark.parametrize("recipe", ["fista-unstructured-50", "fista-2of4-fp8"])
def test_vllm_agrees_with_transformers_on_a_tiny_model(
    recipe: str, tiny: Callable[[str], Path], ask: Ask
) -> None:
    checkpoint = tiny(f"{recipe}.yaml")
    prompts = [[5, 9, 33, 2, 17, 60], [7, 7, 12]]
    assert_same(ask(checkpoint, prompts), expected(checkpoint, prompts))


@pytest.mark.parametrize(
    "recipe",
    [
        "fista-2of4-w8a8",
        "fista-2of4-gptq-w8a8",
        "fista-2of4-smoothquant-w8a8",
        "fasp-2of4-w8a8",
        pytest.param("fista-2of4-gptq-w4a16", marks=FOUR_BITS),
        pytest.param("fista-2of4-gptq-w4a16-asym", marks=FOUR_BITS),
        pytest.param("fista-2of4-awq-w4a16", marks=FOUR_BITS),
    ],
)
def test_vllm_generates_from_pruned_weights_in_integers(
    recipe: str, tiny: Callable[[str], Path], ask: Ask
) -> None:
    """
    In bfloat16, the only dtype that its integer kernels take, and 8-bit products
    saturate on CPUs without VNNI: no parity is asked for.
    """
    checkpoint = tiny(f"{recipe}.yaml")
    answers = ask(checkpoint, [[5, 9, 33, 2, 17, 60]], dtype="bfloat16")
    assert [len(tokens) for tokens in answers["tokens"]] == [NEW_TOKENS]
    assert all(math.isfinite(one) for one in answers["logprobs"][0])


@pytest.fixture(scope="session")
def plugin(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This package, installed for vLLM: without the toolkit, which excludes vLLM."""
    folder = tmp_path_factory.mktemp("plugin")
    install = [vllm_python, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--target", folder, ROOT], check=True)
    return folder


@pytest.mark.parametrize("storage_format", ["sparse-24-bitmask", "sparse-bitmask"])
def test_vllm_with_the_plugin_reads_packed_checkpoints(
    storage_format: StorageFormat,
    tiny: Callable[[str], Path],
    ask: Ask,
    plugin: Path,
    tmp_path: Path,
) -> None:
    checkpoint = tiny("fista-2of4.yaml")
    packed = Path(shutil.copytree(checkpoint, tmp_path / "packed"))
    convert(packed, FAMILIES["llama"].operators, storage_format)
    prompts = [[5, 9, 33, 2, 17, 60], [7, 7, 12]]
    answers = ask(packed, prompts, load_format="sparse-bitmask", PYTHONPATH=str(plugin))
    assert_same(answers, expected(checkpoint, prompts))


@contextmanager
def served(
    checkpoint: Path, python: Path, environment: dict[str, str], log: Path
) -> Iterator[str]:
    """The address of a server, on the loopback address, while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", checkpoint, "--served-model-name", "pruned"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            end = time.monotonic() + 300
            while True:
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end, log.read_text()[-3000:]
                try:
                    if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(1)
            yield address
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def test_a_server_completes_a_prompt(
    smollm2_pruned: Path,
    vllm_python: Path,
    vllm_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    checkpoint, log = smollm2_pruned, tmp_path / "server.log"
    with served(checkpoint, vllm_python, vllm_environment, log) as address:
        reply = httpx.post(
            f"{address}/v1/completions",
            json={
                "model": "pruned",
                "prompt": PROMPTS[0],
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
            },
            timeout=120,
        )
    assert reply.status_code == 200, reply.text
    [choice] = reply.json()["choices"]
    assert choice["text"]
    assert reply.json()["usage"]["completion_tokens"] == NEW_TOKENS


def test_the_example_generates_offline(
    smollm2_pruned: Path,
    vllm_python: Path,
    vllm_environment: dict[str, str],
) -> None:
    example = ROOT / "examples" / "serve_with_vllm" / "generate.py"
    process = subprocess.run(
        [vllm_python, example, smollm2_pruned, PROMPTS[0], "--enforce-eager"],
        env=vllm_environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert PROMPTS[0] in process.stdout
