"""Fine-tune a GPT: ``python finetune.py [--config RECIPE] [--any.key value]``, the same as ``slm-jax finetune``."""

import sys

from slm_jax.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "finetune")
    raise SystemExit(main())
