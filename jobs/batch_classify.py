#!/usr/bin/env python
"""Label files.

    ray job submit --working-dir . -- jobs/batch_classify.py s3://bucket/in/ --output s3://bucket/out/

Takes the arguments of `raylm batch-classify`, such as `--max-errors 1%`; see `raylm batch-classify --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["batch-classify", *sys.argv[1:]])
