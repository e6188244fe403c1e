"""Readers: models that mark the answer to a question in a context, such as BERT fine-tuned on SQuAD.

A context that is longer than the model reads is gone through in windows that overlap; the best span of all of them is
the answer (Devlin et al. 2019, section 4.3). transformers 5 has no pipeline for this any more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from raylm.errors import ArtifactError
from raylm.inference import watchdog
from raylm.inference.answers import Output
from raylm.inference.engines.batching import Turn
from raylm.inference.engines.pytorch import load_for_inference
from raylm.inference.engines.text import Device, Listen
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Fields, Prompt
from raylm.settings import DecodeSettings

if TYPE_CHECKING:
    import torch

_MOST_WINDOW_TOKENS = 384
_OVERLAP_TOKENS = 128
_MOST_ANSWER_TOKENS = 30
"""As in the evaluation of BERT on SQuAD."""


class ReaderEngine:
    """A loaded reader.

    :raises ArtifactError: it cannot be loaded, or its tokenizer does not say where its tokens stand.
    """

    def __init__(self, model: ModelInfo, settings: DecodeSettings, device: Device = "cpu", threads: int = 1) -> None:
        import tokenizers

        from raylm.models import load_tokenizer

        self.model = model
        self._turn: Turn = nullcontext
        self._tokenizer = load_tokenizer(str(model.directory))
        if not self._tokenizer.is_fast:
            raise ArtifactError(f"model {model.where}: its tokenizer has no tokenizer.json, which a reader needs")
        # Whoever counts does so beside the thread that computes, whose calls set how the other one cuts and pads.
        self._counter = tokenizers.Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        self._counter.no_truncation()
        self._counter.no_padding()
        self._model = load_for_inference(model, settings, device, threads)
        self._decode_by(settings)

    def decode(self, rows: Sequence[Fields], prompt: Prompt) -> list[Output]:
        """The answer to each (question, context) with its probability; empty where the model finds none."""
        answers: dict[Fields, Output] = {}
        for row in dict.fromkeys(rows):
            with self._turn():
                answers[row] = self._answer(row)
            watchdog.beat()
        return [answers[row] for row in rows]

    def view(
        self, settings: DecodeSettings | None = None, turn: Turn | None = None, listen: Listen | None = None
    ) -> ReaderEngine:
        """As `TextEngine.view`; an answer that is marked does not grow, so that nothing is heard of it."""
        view = copy.copy(self)
        if settings is not None:
            view._decode_by(settings)
        view._turn = turn or self._turn
        return view

    def _decode_by(self, settings: DecodeSettings) -> None:
        self.settings = settings
        self._window = min(self.model.limits(settings)[0], _MOST_WINDOW_TOKENS)
        self._most_answer = min(settings.max_output_tokens, _MOST_ANSWER_TOKENS)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without those around it."""
        return len(self._counter.encode(text, add_special_tokens=False).ids)

    def room(self, prompt: Prompt) -> int:
        """The tokens of a window; a longer context has several."""
        return self._window

    def _answer(self, row: Fields) -> Output:
        import torch

        question, context = row
        half = self._window // 2
        asked = self._tokenizer(question, add_special_tokens=False, truncation=True, max_length=half)
        was_cut = self.count_tokens(question) > half
        question = self._tokenizer.decode(asked.input_ids) if was_cut else question
        windows = self._tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self._window,
            stride=min(_OVERLAP_TOKENS, half // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )
        count = len(windows["input_ids"])
        in_context = torch.tensor([[part == 1 for part in windows.sequence_ids(n)] for n in range(count)])  # (W, T)
        offsets = windows["offset_mapping"]  # (W, T, 2)
        names = [name for name in self._tokenizer.model_input_names if name in windows]
        starts, ends = self._logits({name: windows[name] for name in names})  # (W, T)
        real = windows["attention_mask"].bool()
        # Spans of all windows compete; each begins and ends in the same one.
        start_p = starts.masked_fill(~real, -torch.inf).flatten().softmax(0).view_as(starts)
        end_p = ends.masked_fill(~real, -torch.inf).flatten().softmax(0).view_as(ends)
        none_p = float((start_p[:, 0] * end_p[:, 0]).max())  # both at [CLS]
        score, window, start, end = self._best_span(
            start_p.masked_fill(~in_context, 0.0), end_p.masked_fill(~in_context, 0.0)
        )
        text = "" if none_p > score else context[int(offsets[window, start, 0]) : int(offsets[window, end, 1])]
        return Output(
            text=text,
            truncated=was_cut,
            source_tokens=int(real.sum()),
            output_tokens=self.count_tokens(text),
            score=max(score, none_p),
        )

    def _best_span(self, starts: torch.Tensor, ends: torch.Tensor) -> tuple[float, int, int, int]:
        """The likeliest span from its ends' probabilities, (W, T) each: its own, its window, first and last token."""
        best = (-1.0, 0, 0, 0)
        width = starts.shape[1]
        for length in range(min(self._most_answer, width)):
            spans = starts[:, : width - length] * ends[:, length:]  # (W, T - length)
            place = int(spans.argmax())
            score = float(spans.flatten()[place])
            if score > best[0]:
                window, start = divmod(place, width - length)
                best = (score, window, start, start + length)
        return best

    def _logits(self, windows: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        rows = max(self.settings.batch_tokens_on(self._model.device.type) // self._window, 1)
        starts, ends = [], []
        with torch.inference_mode():
            for first in range(0, len(windows["input_ids"]), rows):
                part = {name: values[first : first + rows].to(self._model.device) for name, values in windows.items()}
                found = self._model(**part)
                starts.append(found.start_logits.float().cpu())
                ends.append(found.end_logits.float().cpu())
        return torch.cat(starts), torch.cat(ends)
