#!/usr/bin/env python
"""Answer translation and summarisation requests until the job is stopped.

    ray job submit --working-dir . jobs/serve.py

Takes the arguments of `raylm serve`, such as `--port 8000`; see `raylm serve --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
