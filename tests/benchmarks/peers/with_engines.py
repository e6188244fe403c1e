"""The same model and rows by several ways of decoding, on one thread; prints source tokens and rows a CPU second.

Ways: `raylm` (what a batch job's worker does with its chunks), `iterable` (CTranslate2 as its documentation has it),
`generate` (transformers, batches of 8 sorted by length, or one by one). Run in raylm's environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
import torch

from raylm.inference.answers import answer_rows
from raylm.inference.convert import converted_model
from raylm.inference.engines import load_engine
from raylm.inference.engines.cache import RememberingEngine
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import prompt_for
from raylm.settings import DecodeSettings
from raylm.tasks import TRANSLATE

CHUNK_ROWS = 1_024
MOST_TOKENS = 128


def by_raylm(model: ModelInfo, texts: list[str], beam_size: int) -> Iterator[int]:
    settings = DecodeSettings(beam_size=beam_size, max_output_tokens=MOST_TOKENS)
    engine = RememberingEngine(load_engine(model, settings))
    prompt = prompt_for(model, TRANSLATE, "de")
    yield 0  # loaded
    for start in range(0, len(texts), CHUNK_ROWS):
        rows = [(text,) for text in texts[start : start + CHUNK_ROWS]]
        yield sum(output.output_tokens for output in answer_rows(engine, rows, prompt))


def by_iterable(model: ModelInfo, texts: list[str], beam_size: int) -> Iterator[int]:
    import ctranslate2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    translator = ctranslate2.Translator(str(converted_model(model, "int8")), compute_type="int8", intra_threads=1)
    yield 0
    tokens = 0
    sources = (tokenizer.convert_ids_to_tokens(tokenizer(f">>de<<{text}</s>", add_special_tokens=False).input_ids)
               for text in texts)  # fmt: skip
    for result in translator.translate_iterable(
        sources, max_batch_size=4_096, batch_type="tokens", beam_size=beam_size, max_decoding_length=MOST_TOKENS
    ):
        tokenizer.decode(tokenizer.convert_tokens_to_ids(result.hypotheses[0]), skip_special_tokens=True)
        tokens += len(result.hypotheses[0])
    yield tokens


def by_generate(model: ModelInfo, texts: list[str], beam_size: int, batch_size: int) -> Iterator[int]:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(model.directory).eval()
    yield 0
    ordered = sorted(texts, key=len, reverse=True) if batch_size > 1 else texts
    for start in range(0, len(ordered), batch_size):
        asked = [f">>de<<{text}</s>" for text in ordered[start : start + batch_size]]
        batch = tokenizer(asked, add_special_tokens=False, padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        with torch.inference_mode():
            written = loaded.generate(**batch, num_beams=beam_size, do_sample=False, max_new_tokens=MOST_TOKENS,
                                      max_length=None)  # fmt: skip
        tokenizer.batch_decode(written, skip_special_tokens=True)
        special = torch.tensor([loaded.config.pad_token_id, loaded.config.eos_token_id])
        yield int((~torch.isin(written, special)).sum())


def source_tokens(model: ModelInfo, texts: list[str]) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    return sum(map(len, tokenizer(texts, add_special_tokens=False).input_ids))


if __name__ == "__main__":
    asked: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    model = ModelInfo.load(asked["model"])
    texts = pq.read_table(asked["rows"])["text"].to_pylist()
    ways = {"raylm": by_raylm, "iterable": by_iterable}
    if asked["way"] == "generate":
        steps = by_generate(model, texts, asked["beam_size"], asked["batch_size"])
    else:
        steps = ways[asked["way"]](model, texts, asked["beam_size"])
    tokens = source_tokens(model, texts)
    next(steps)
    start = time.process_time()
    written = sum(steps)
    seconds = time.process_time() - start
    rates = {"tokens_per_s": tokens / seconds, "rows_per_s": len(texts) / seconds, "written_per_s": written / seconds}
    sys.stdout.write("\n" + json.dumps(rates) + "\n")
