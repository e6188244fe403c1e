#!/usr/bin/env python
"""Summarise files.

    ray job submit --working-dir . -- jobs/batch_summarize.py s3://bucket/in/ --output s3://bucket/out/

Takes the arguments of `raylm batch-summarize`, such as `--column body`; see `raylm batch-summarize --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["batch-summarize", *sys.argv[1:]])
