"""Models run by PyTorch and transformers: classifiers, and those writing models that CTranslate2 does not know."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.errors import ArtifactError, first_line
from raylm.inference.answers import Output
from raylm.inference.engines.batching import Source, in_batches
from raylm.inference.engines.text import Device, GrowingAnswers, TextEngine
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Fields, Prompt
from raylm.settings import DecodeSettings
from raylm.storage import fingerprint

if TYPE_CHECKING:
    import torch

_DTYPES = ("float32", "float16", "bfloat16")


def load_for_inference(model: ModelInfo, settings: DecodeSettings, device: Device, threads: int) -> Any:
    """A model of transformers on its device, in the type that the settings say: by default float32 on CPUs, on GPUs
    bfloat16, or float16 where they lack it.

    :param threads: CPU threads of this process.
    :raises ArtifactError: transformers cannot load it, or PyTorch does not compute in the type.
    """
    import torch
    import transformers

    compute_type: str = settings.compute_type
    if compute_type == "auto":
        on_gpu = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float16"
        compute_type = on_gpu if device == "cuda" else "float32"
    if compute_type not in _DTYPES:
        raise ArtifactError(
            f"decode.compute_type: a {model.kind} that runs in PyTorch computes in {', '.join(_DTYPES)}, auto;"
            f" found '{compute_type}'"
        )
    if device == "cpu":
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    loader = {
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
        "decoder": transformers.AutoModelForCausalLM,
        "classifier": transformers.AutoModelForSequenceClassification,
        "reader": transformers.AutoModelForQuestionAnswering,
    }[model.kind]
    try:
        loaded = loader.from_pretrained(model.directory, dtype=getattr(torch, compute_type))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ArtifactError(f"model {model.where}: transformers cannot load it: {first_line(error)}") from error
    return loaded.eval().to(device)


class ClassifierEngine(TextEngine):
    """A loaded model that gives a text one of its labels. What is learned to give several gives the likeliest."""

    def __init__(self, model: ModelInfo, settings: DecodeSettings, device: Device = "cpu", threads: int = 1) -> None:
        super().__init__(model, settings, device)
        self._model = load_for_inference(model, settings, device, threads)
        self._labels = [str(self._model.config.id2label[number]) for number in range(self._model.config.num_labels)]

    def decode(self, rows: Sequence[Fields], prompt: Prompt) -> list[Output]:
        """The likeliest label of each row with its probability, in the order of the rows; see `in_batches`."""
        return in_batches(rows, self._encoder(prompt), self._label, self._batch_tokens, turn=self._turn)

    def _label(self, batch: list[Source]) -> list[Output]:
        import torch

        config = self._model.config
        input_ids, mask = _padded(batch, config.pad_token_id, self._model.device)
        with torch.inference_mode():
            logits = self._model(input_ids=input_ids, attention_mask=mask).logits.float()  # (B, labels)
        is_multiple = config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if is_multiple else logits.softmax(dim=-1)
        best = probabilities.max(dim=-1)
        return [
            Output(self._labels[number], truncated=source.cut, source_tokens=len(source.ids), score=score)
            for source, number, score in zip(batch, best.indices.tolist(), best.values.tolist(), strict=True)
        ]


class GenerationEngine(TextEngine):
    """A loaded encoder-decoder or decoder, decoded by `generate` of transformers."""

    def __init__(self, model: ModelInfo, settings: DecodeSettings, device: Device = "cpu", threads: int = 1) -> None:
        super().__init__(model, settings, device)
        self._model = load_for_inference(model, settings, device, threads)
        self._is_decoder = model.kind == "decoder"
        self._pad = self._model.config.pad_token_id
        if self._pad is None:
            self._pad = self._tokenizer.ends[0]

    def decode(self, rows: Sequence[Fields], prompt: Prompt) -> list[Output]:
        """As `CTranslateEngine.decode`. What is drawn depends on the seed and on the rows of a batch alone."""
        run = partial(self._generate, prompt.target_code)
        return in_batches(rows, self._encoder(prompt), run, self._batch_tokens, self._is_distinct, self._turn)

    def _generate(self, target_code: str | None, batch: list[Source]) -> list[Output]:
        import torch

        input_ids, mask = _padded(batch, self._pad, self._model.device, at_left=self._is_decoder)
        seed = int(fingerprint([self.settings.seed, [source.ids for source in batch]])[:15], 16)
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed)
            options = self._options(target_code)
            if growing := self._growing(batch):
                options["stopping_criteria"] = _listening(growing)
            generated = self._model.generate(input_ids=input_ids, attention_mask=mask, **options)
        prompt_length = input_ids.shape[1] if self._is_decoder else 1
        rows = generated.sequences[:, prompt_length:].tolist()
        scores = self._scores(generated) if self.settings.scores else [None] * len(batch)
        prefix = target_code is not None
        return [
            self._output(source, row[prefix:], score) for source, row, score in zip(batch, rows, scores, strict=True)
        ]

    def _options(self, target_code: str | None) -> dict[str, Any]:
        settings, pad = self.settings, self._pad
        options: dict[str, Any] = {
            "max_new_tokens": self._max_target + (target_code is not None),
            "max_length": None,
            "min_length": 0,  # whatever the model's own config says
            "min_new_tokens": settings.min_output_tokens or None,
            "num_beams": settings.beam_size,
            "length_penalty": settings.length_penalty,
            "repetition_penalty": settings.repetition_penalty,
            "no_repeat_ngram_size": settings.no_repeat_ngram_size,
            "do_sample": settings.temperature > 0,
            "eos_token_id": self._tokenizer.ends,
            "pad_token_id": pad,
            "bad_words_ids": None if pad in self._tokenizer.ends else [[pad]],
            "return_dict_in_generate": True,
            "output_scores": settings.scores,
        }
        if settings.temperature:
            options |= {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        if target_code is not None:
            options["forced_bos_token_id"] = self._tokenizer.id_of(target_code)
        return options

    def _output(self, source: Source, row: list[int], score: float | None) -> Output:
        end = next((place for place, token in enumerate(row) if token in self._tokenizer.ends), None)
        answer = row[:end]
        while answer and answer[-1] == self._pad:  # it was told to be enough, and others of its batch went on
            answer.pop()
        [text] = self._tokenizer.decode([answer])
        return Output(
            text=text,
            truncated=source.cut or end is None,
            source_tokens=len(source.ids),
            output_tokens=len(answer),
            score=score,
        )

    def _scores(self, generated: Any) -> list[float]:
        """The mean log probability of each answer's tokens, its end included."""
        import torch

        tokens = self._model.compute_transition_scores(
            generated.sequences, generated.scores, getattr(generated, "beam_indices", None), normalize_logits=True
        )  # (B, T)
        is_end = torch.isin(
            generated.sequences[:, -tokens.shape[1] :], torch.tensor(self._tokenizer.ends).to(tokens.device)
        )
        written = is_end.cumsum(dim=1) - is_end.long() == 0  # up to the first end
        sums = tokens.masked_fill(~written | tokens.isinf(), 0.0).sum(dim=-1)
        means: list[float] = (sums / written.sum(dim=-1).clamp(min=1)).tolist()
        return means


def _listening(growing: GrowingAnswers) -> Any:
    """What `generate` asks after each token whether rows have enough."""
    import torch
    from transformers import StoppingCriteriaList

    done: set[int] = set()

    def ask(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # (B, T) -> (B,)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if row not in done and growing.add(row, token):
                done.add(row)
        return torch.tensor([row in done for row in range(len(input_ids))], device=input_ids.device)

    return StoppingCriteriaList([ask])


def _padded(
    batch: list[Source], pad: int | None, device: torch.device, at_left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and (B, T) attention mask.

    :param at_left: a decoder writes on behind the last position, which has to be a token of each row.
    """
    import torch

    width = max(len(source.ids) for source in batch)
    input_ids = np.full((len(batch), width), pad or 0, np.int64)
    mask = np.zeros((len(batch), width), np.int64)
    for row, source in enumerate(batch):
        place = slice(width - len(source.ids), None) if at_left else slice(len(source.ids))
        input_ids[row, place], mask[row, place] = source.ids, 1
    return torch.from_numpy(input_ids).to(device), torch.from_numpy(mask).to(device)
