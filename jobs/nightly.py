#!/usr/bin/env python
"""Do the batch jobs of the date that has ended, and those of earlier dates that have not been done.

    ray job submit --working-dir . jobs/nightly.py

Takes the arguments of `raylm nightly`; see `raylm nightly --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["nightly", *sys.argv[1:]])
