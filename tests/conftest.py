"""Fixtures that several test modules share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# the suite is the same everywhere; FISTA_TEST_GPU=1 lets the toolkit use the GPU
if not os.environ.get("FISTA_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# operators of 32 columns gain nothing from a second thread, and wait for it
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from families import checkpoint
from filelock import FileLock
from framing import framed
from llmcompressor.pipelines.cache import IntermediatesCache
from logs import logged
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fista_modifier.cli.demo.model import build_smollm2
from fista_modifier.cli.demo.texts import news_text, wikipedia_text


def pytest_xdist_auto_num_workers() -> int:
    """With ``-n auto``: each process holds a torch and a model, about 2 GB."""
    return min(os.cpu_count() or 1, 4)


LONGEST = [
    "serving/test_vllm.py",
    "zoo/test_families.py",
    "test_distributed.py",
    "test_accelerator.py",
    "pruning/test_structured.py",
    "test_examples.py",
    "test_cost.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A process has a whole file at a time, so that the longest have to come first."""
    tests = Path(__file__).parent
    turns = {tests / name: turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.path, len(turns)))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and two more: 0 pads and 1 ends a text."""
    special = ["<pad>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )


@pytest.fixture(scope="session")
def starting_tokenizer(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> PreTrainedTokenizerFast:
    """The same, with token 1 before each text, too, as OPT's has it."""
    return framed(tiny_tokenizer, "<eos> $A", bos_token="<eos>")


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is logged as a warning."""
    with logged() as messages:
        yield messages


@pytest.fixture(scope="session")
def cache() -> Path:
    """What takes long to get or to make stays here."""
    folder = Path(__file__).resolve().parents[1] / ".cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def making(cache: Path) -> FileLock:
    """Held by the one test process that fills the cache, while others wait."""
    return FileLock(cache / "making.lock")


@pytest.fixture(scope="session")
def smollm2(cache: Path, making: FileLock) -> Path:
    """The checkpoint of SmolLM2-135M-Instruct in float32, built once."""
    with making:
        return build_smollm2(cache / "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def news(cache: Path, making: FileLock) -> Path:
    """A text for evaluation."""
    with making:
        return news_text(cache)


@pytest.fixture(scope="session")
def wikipedia(cache: Path, making: FileLock) -> Path:
    """A text for calibration."""
    with making:
        return wikipedia_text(cache)


@pytest.fixture
def awq_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the toolkit's AWQ run where there is no accelerator."""
    if not torch.accelerator.is_available():
        # AWQ of llm-compressor 0.14 pins memory whether or not there is a need to
        monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *_: None)


@pytest.fixture
def model(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny LLaMA with a tokenizer beside it."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama", vocab_size=len(tiny_tokenizer)), folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return file
