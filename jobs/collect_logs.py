#!/usr/bin/env python
"""Keep the logs of the cluster's machines on storage.

    ray job submit --working-dir . jobs/collect_logs.py

Takes the arguments of `raylm cluster collect`, such as `--name monday`; see `raylm cluster collect --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["cluster", "collect", *sys.argv[1:]])
