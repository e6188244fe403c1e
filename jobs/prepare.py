#!/usr/bin/env python
"""Prepare the corpus: sources to token shards.

    ray job submit --working-dir . jobs/prepare.py

Takes the arguments of `raylm prepare`, such as `--set corpus.sequence_length=1024`; see `raylm prepare --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
