"""What must hold of a run that was killed: once more, it ends as one that was never broken."""

import pytest
from programs import run


@pytest.mark.slow
def test_a_killed_run_ends_bitwise_equal():
    """Parameters, optimizer state, data state, every logged loss."""
    done = run("faults", "kills", "--trials", 1, "--seed", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("kills 1/1\n")
