"""Decoders run by vLLM on GPUs: continuous batching, a paged cache of keys and values."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from raylm.errors import ArtifactError, first_line
from raylm.inference import watchdog
from raylm.inference.answers import Output
from raylm.inference.engines.text import Listen, TextEngine
from raylm.inference.engines.tokenizer import INVALID_UNICODE
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Fields, Prompt
from raylm.settings import DecodeSettings
from raylm.storage import fingerprint

_ROWS_AT_ONCE = 256
_DTYPES = ("auto", "float32", "float16", "bfloat16")


class VllmEngine(TextEngine):
    """A loaded decoder.

    :param gpus: over which its layers' matrices are split.
    :raises ArtifactError: vLLM is not installed, cannot load the model, or does not compute in the wanted type.
    """

    def __init__(self, model: ModelInfo, settings: DecodeSettings, gpus: int = 1) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ArtifactError("decode.engine: vllm is not installed: pip install 'raylm[vllm]'") from error
        super().__init__(model, settings, "cuda")
        try:
            self._model = vllm.LLM(**load_arguments(model, settings, gpus))
        except (OSError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"model {model.where}: vLLM cannot load it: {first_line(error)}") from error
        self._sampling_params = vllm.SamplingParams
        self._sampling({})  # refuses now what cannot be
        self._lock = threading.Lock()
        """vLLM gives whoever asks what has been finished, whoever asked for it."""

    def decode(self, rows: Sequence[Fields], prompt: Prompt) -> list[Output]:
        """As `CTranslateEngine.decode`; vLLM batches by itself.

        What is drawn depends on the seed, the row and its place among those asked about together.
        """
        self._tokenizer.frame(prompt)
        encoded = [self._tokenizer.encode(prompt, row, self._max_source) for row in rows]
        asked = [row[0] for row in encoded if row is not None]
        finished: list[Any] = []
        for start in range(0, len(asked), _ROWS_AT_ONCE):
            part = asked[start : start + _ROWS_AT_ONCE]
            seeds = [row_seed(self.settings, ids, start + number) for number, ids in enumerate(part)]
            sampling = [self._sampling({"seed": seed}) for seed in seeds]
            with self._turn(), self._lock:
                if self._listen is None:
                    requests = [{"prompt_token_ids": ids} for ids in part]
                    finished += self._model.generate(requests, sampling, use_tqdm=False)
                else:
                    numbers = [number for number, row in enumerate(encoded) if row is not None]
                    finished += self._heard(part, sampling, numbers[start:], self._listen)
            watchdog.beat()
        answers = iter(finished)
        return [Output(None, INVALID_UNICODE) if row is None else self._output(row, next(answers)) for row in encoded]

    def _sampling(self, more: dict[str, Any]) -> Any:
        return self._sampling_params(
            **sampling_arguments(self.settings, self._max_target, self._tokenizer.ends), **more
        )

    def _heard(self, part: list[list[int]], sampling: list[Any], numbers: list[int], listen: Listen) -> list[Any]:
        """What `generate` gives, step by step.

        :param numbers: of the rows, as the listener knows them.
        """
        engine = self._model.llm_engine
        for name, (ids, params) in enumerate(zip(part, sampling, strict=True)):
            engine.add_request(str(name), {"prompt_token_ids": ids}, params)
        found: dict[int, Any] = {}
        while engine.has_unfinished_requests():
            for request in engine.step():
                name = int(request.request_id)
                found[name] = request
                written = [token for token in request.outputs[0].token_ids if token not in self._tokenizer.ends]
                [text] = self._tokenizer.decode([written])
                if not text.endswith("\ufffd") and listen(numbers[name], text) and not request.finished:
                    engine.abort_request([request.request_id])
        return [found[name] for name in range(len(part))]

    def _output(self, row: tuple[list[int], bool], request: Any) -> Output:
        ids, was_cut = row
        answer = request.outputs[0]
        written = [token for token in answer.token_ids if token not in self._tokenizer.ends]
        return Output(
            text=self._tokenizer.decode([written])[0],
            truncated=was_cut or answer.finish_reason == "length",
            source_tokens=len(ids),
            output_tokens=len(written),
            score=answer.cumulative_logprob / max(len(answer.token_ids), 1) if self.settings.scores else None,
        )


def load_arguments(model: ModelInfo, settings: DecodeSettings, gpus: int) -> dict[str, Any]:
    """What `vllm.LLM` is told.

    :raises ArtifactError: vLLM does not compute in the wanted type.
    """
    if settings.compute_type not in _DTYPES:
        raise ArtifactError(
            f"decode.compute_type: vLLM computes in {', '.join(_DTYPES)}; found '{settings.compute_type}'"
        )
    return {
        "model": str(model.directory),
        "dtype": settings.compute_type,
        "tensor_parallel_size": gpus,
        "max_model_len": sum(model.limits(settings)),  # the cache of keys and values has to hold one such row
        "seed": settings.seed,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }


def sampling_arguments(settings: DecodeSettings, max_tokens: int, ends: Sequence[int]) -> dict[str, Any]:
    """What `vllm.SamplingParams` is told.

    :raises ArtifactError: vLLM cannot do what is wanted: search by beams, or forbid n-grams.
    """
    if settings.beam_size > 1 or settings.no_repeat_ngram_size:
        raise ArtifactError(
            "decode: vLLM has neither beam_size > 1 nor no_repeat_ngram_size; leave them out, or set"
            " decode.engine=transformers"
        )
    return {
        "max_tokens": max_tokens,
        "min_tokens": settings.min_output_tokens,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "repetition_penalty": settings.repetition_penalty,
        "stop_token_ids": list(ends),
        "logprobs": 0 if settings.scores else None,
        "detokenize": False,
    }


def row_seed(settings: DecodeSettings, ids: Sequence[int], number: int) -> int | None:
    """The seed of a row's draws; None where nothing is drawn. Equal rows have answers of their own.

    :param number: of the row among those that are asked about together.
    """
    if not settings.temperature:
        return None
    return int(fingerprint([settings.seed, list(ids), number])[:8], 16)
