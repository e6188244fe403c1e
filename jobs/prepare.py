#!/usr/bin/env python
"""Prepare the corpus: sources to token shards.

    ray job submit --working-dir . jobs/prepare.py

Takes the arguments of `raylm prepare`, such as `--set pretrain.steps=200`; see `raylm prepare --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
