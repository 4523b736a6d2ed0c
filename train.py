"""Pretrain a GPT: ``python train.py [--config RECIPE] [--any.key value]``, the same as ``slm-jax train``."""

import sys

from slm_jax.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    raise SystemExit(main())
