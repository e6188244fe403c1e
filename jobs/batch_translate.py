#!/usr/bin/env python
"""Translate files.

    ray job submit --working-dir . -- jobs/batch_translate.py s3://bucket/in/ --output s3://bucket/out/

Takes the arguments of `raylm batch-translate`, such as `--to de`; see `raylm batch-translate --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["batch-translate", *sys.argv[1:]])
