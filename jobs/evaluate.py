#!/usr/bin/env python
"""Score the fine-tuned model on held-out pairs.

    ray job submit --working-dir . jobs/evaluate.py

Takes the arguments of `raylm evaluate`, such as `--set evaluate.beam_size=4`; see `raylm evaluate --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
