"""Batch translation as an introduction to Ray Data writes it: read, map a class, write. Run in raylm's environment."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import ray
import torch


class Translate:
    def __init__(self, model: str) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSeq2SeqLM.from_pretrained(model).eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        asked = [">>de<<" + text + "</s>" for text in batch["text"]]
        tokens = self.tokenizer(asked, add_special_tokens=False, padding=True, return_tensors="pt")
        tokens.pop("token_type_ids", None)
        with torch.inference_mode():
            written = self.model.generate(**tokens, num_beams=1, do_sample=False, max_new_tokens=128, max_length=None)
        batch["translation"] = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return batch


if __name__ == "__main__":
    asked: dict[str, Any] = json.loads(sys.argv[1])
    start = time.perf_counter()
    # One more than there are: where actors hold them all, the tasks that read and write wait for ever.
    ray.init("local", num_cpus=asked["cpus"] + 1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_parquet(asked["rows"])
    dataset = dataset.map_batches(
        Translate, fn_constructor_args=(asked["model"],), batch_size=asked["batch_size"], num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=asked["cpus"]),
    )  # fmt: skip
    dataset.write_parquet(asked["output"])
    seconds = time.perf_counter() - start
    sys.stdout.write("\n" + json.dumps({"seconds": seconds}) + "\n")
