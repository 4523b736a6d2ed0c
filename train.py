"""Pretrain a GPT: ``python train.py [--config FILE.yaml] [--any.key value]``, the same as ``slm-jax train``."""

import sys

from slm_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
