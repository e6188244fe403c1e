#!/usr/bin/env python
"""Answer questions.

    ray job submit --working-dir . -- jobs/batch_answer.py s3://bucket/in/ --output s3://bucket/out/

Takes the arguments of `raylm batch-answer`, such as `--context body`; see `raylm batch-answer --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["batch-answer", *sys.argv[1:]])
