#!/usr/bin/env python
"""Pretrain a model on the prepared corpus; the corpus is prepared first where it is not.

    ray job submit --working-dir . jobs/pretrain.py

Takes the arguments of `raylm pretrain`, such as `--set pretrain.steps=200`; see `raylm pretrain --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
