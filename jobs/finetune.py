#!/usr/bin/env python
"""Fine-tune the pretrained model on the labelled pairs.

    ray job submit --working-dir . jobs/finetune.py

Takes the arguments of `raylm finetune`, such as `--set finetune.steps=200`; see `raylm finetune --help`.
"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
