"""``python -m slm_jax COMMAND``."""

from slm_jax.cli import main

raise SystemExit(main())
