#!/usr/bin/env python
"""Keep the logs of the cluster's machines on storage.

    ray job submit --working-dir . jobs/collect_logs.py

Takes the arguments of `raylm collect-logs`, such as `--name monday`; see `raylm collect-logs --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["collect-logs", *sys.argv[1:]])
