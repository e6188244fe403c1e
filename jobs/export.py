#!/usr/bin/env python
"""Write the fine-tuned model, or with `--pretrained` the pretrained one, in Hugging Face layout.

    ray job submit --working-dir . jobs/export.py

Takes the arguments of `raylm export`, such as `--set model.name=en-de`; see `raylm export --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
