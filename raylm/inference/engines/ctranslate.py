"""Models run by CTranslate2: encoder-decoders and decoders, quantised on CPUs, in half precision on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from raylm.errors import ArtifactError
from raylm.inference.answers import Output
from raylm.inference.convert import converted_model
from raylm.inference.engines.batching import Source, in_batches
from raylm.inference.engines.text import Device, TextEngine
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Fields, Prompt
from raylm.settings import DecodeSettings


def compute_type_for(settings: DecodeSettings, device: Device) -> str:
    """What a device computes in: what is set, or int8 on CPUs and float16 on GPUs.

    :raises ArtifactError: the device cannot.
    """
    import ctranslate2

    compute_type = settings.compute_type
    if compute_type == "auto":
        compute_type = "float16" if device == "cuda" else "int8"
    supported = ctranslate2.get_supported_compute_types(device)
    if compute_type not in supported:
        known = ", ".join(sorted(supported))
        raise ArtifactError(f"decode.compute_type: this {device} cannot compute in '{compute_type}', but in {known}")
    return compute_type


class CTranslateEngine(TextEngine):
    """A loaded encoder-decoder or decoder.

    :param device: where it computes.
    :param threads: CPU threads of one engine batch.
    :raises ArtifactError: the model cannot be converted, or the device cannot compute in the wanted type.
    """

    def __init__(self, model: ModelInfo, settings: DecodeSettings, device: Device = "cpu", threads: int = 1) -> None:
        import ctranslate2

        super().__init__(model, settings, device)
        compute_type = compute_type_for(settings, device)
        if settings.temperature:
            ctranslate2.set_random_seed(settings.seed)
        loaded = ctranslate2.Generator if model.kind == "decoder" else ctranslate2.Translator
        self._model = loaded(
            str(converted_model(model, compute_type)),
            device=device,
            compute_type=compute_type,
            inter_threads=1,
            intra_threads=threads,
        )

    def decode(self, rows: Sequence[Fields], prompt: Prompt) -> list[Output]:
        """The output of each row, in the order of the rows; equal rows are decoded once, unless answers are drawn.

        Batches hold rows of like length, up to `batch_tokens` padded source tokens. A batch that fails is
        halved until only the failing row has an error. Several threads may call: their batches interleave.

        :raises ArtifactError: the model's vocabulary lacks a token of the prompt.
        """
        run = self._write_on if self.model.kind == "decoder" else partial(self._translate, prompt.target_code)
        return in_batches(rows, self._encoder(prompt), run, self._batch_tokens, self._is_distinct, self._turn)

    def _translate(self, target_code: str | None, batch: list[Source]) -> list[Output]:
        results = self._model.translate_batch(
            [self._tokenizer.to_tokens(source.ids) for source in batch],
            target_prefix=None if target_code is None else [[target_code]] * len(batch),
            max_input_length=0,
            max_decoding_length=self._max_target + (target_code is not None),
            min_decoding_length=self.settings.min_output_tokens,
            **self._options(batch),
        )
        prefix = 0 if target_code is None else 1
        return self._outputs(batch, [(result.hypotheses[0][prefix:], result.scores) for result in results])

    def _write_on(self, batch: list[Source]) -> list[Output]:
        results = self._model.generate_batch(
            [self._tokenizer.to_tokens(source.ids) for source in batch],
            max_length=self._max_target,
            min_length=self.settings.min_output_tokens,
            end_token=self._tokenizer.to_tokens(self._tokenizer.ends),
            include_prompt_in_result=False,
            **self._options(batch),
        )
        return self._outputs(batch, [(result.sequences[0], result.scores) for result in results])

    def _options(self, batch: list[Source]) -> dict[str, Any]:
        """What both kinds of model are told."""
        options: dict[str, Any] = {
            "beam_size": self.settings.beam_size,
            "length_penalty": self.settings.length_penalty,
            "repetition_penalty": self.settings.repetition_penalty,
            "no_repeat_ngram_size": self.settings.no_repeat_ngram_size,
            "return_end_token": True,
            "return_scores": self.settings.scores,
        }
        if self.settings.temperature:
            options |= {
                "sampling_temperature": self.settings.temperature,
                "sampling_topk": self.settings.top_k,
                "sampling_topp": self.settings.top_p,
            }
        if growing := self._growing(batch):
            options["callback"] = lambda step: growing.add(step.batch_id, step.token_id)
        return options

    def _outputs(self, batch: list[Source], answers: list[tuple[list[str], list[float]]]) -> list[Output]:
        ids = [self._tokenizer.to_ids(tokens) for tokens, _ in answers]
        texts = self._tokenizer.decode(ids)
        outputs = []
        for source, text, (tokens, scores), answer in zip(batch, texts, answers, ids, strict=True):
            has_end = bool(answer) and answer[-1] in self._tokenizer.ends
            outputs.append(
                Output(
                    text=text,
                    truncated=source.cut or not has_end,
                    source_tokens=len(source.ids),
                    output_tokens=len(tokens) - has_end,
                    score=scores[0] if scores else None,
                )
            )
        return outputs
