"""An engine with texts that it does not survive, put into every worker of a Ray of its own; run as a program."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from typing import Any


def poison_engines() -> None:
    """To be run in each worker process."""
    from raylm.inference.engines import ctranslate

    translate = ctranslate.CTranslateEngine._translate

    def poisoned(engine: Any, code: str | None, batch: list[Any]) -> Any:
        texts = [text for source in batch for text in source.key]
        if any("KILLS" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        if any("HANGS" in text for text in texts):
            re.match("(a+)+$", "a" * 60 + "b")  # holds the interpreter for ever
        if any("RAISES" in text for text in texts):
            raise RuntimeError("this text is poison")
        return translate(engine, code, batch)

    ctranslate.CTranslateEngine._translate = poisoned  # type: ignore[method-assign]


def main(source: str, model: str, directory: str, asked: str) -> None:
    import ray

    from raylm.errors import RaylmError
    from raylm.inference.batch import run_batch
    from raylm.settings import Settings
    from raylm.tasks import TRANSLATE

    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=directory,
        object_store_memory=1 << 27, runtime_env={"worker_process_setup_hook": poison_engines},
    )  # fmt: skip
    try:
        run_batch(Settings.model_validate(json.loads(asked)), TRANSLATE, source, model=model)
    except RaylmError as error:
        sys.exit(f"raylm: error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
