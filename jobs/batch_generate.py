#!/usr/bin/env python
"""Write on from rows.

    ray job submit --working-dir . -- jobs/batch_generate.py s3://bucket/in/ --output s3://bucket/out/

Takes the arguments of `raylm batch-generate`, such as `--column body`; see `raylm batch-generate --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["batch-generate", *sys.argv[1:]])
