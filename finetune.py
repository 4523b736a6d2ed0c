"""Fine-tune a GPT: ``python finetune.py [--config FILE.yaml] [--any.key value]``, the same as ``slm-jax finetune``."""

import sys

try:
    from slm_jax.cli import main
except KeyboardInterrupt:  # Ctrl-C while JAX is being imported, when there is nothing to save yet
    sys.exit(130)

if __name__ == "__main__":
    raise SystemExit(main(["finetune", *sys.argv[1:]]))
