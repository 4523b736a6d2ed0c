"""``slm-jax doctor``: one line for each check, valid JSON, and an exit status that shows problems."""

import json
import os
import subprocess
import sys

import pytest

from slm_jax import cli


@pytest.fixture(autouse=True)
def _well(monkeypatch):
    """A machine without problems."""
    monkeypatch.delenv("SLM_JAX_DATA", raising=False)


def test_it_prints_a_line_a_check(classifier, capsys):
    assert cli.main(["doctor", "--run", str(classifier)]) == 0
    *lines, empty, summary = capsys.readouterr().out.splitlines()
    assert empty == ""
    assert summary.startswith("problems: 0, notes: ")
    levels, names = zip(*(line.split()[:2] for line in lines), strict=True)
    assert set(levels) <= {"ok", "note"}
    assert list(dict.fromkeys(names))[:3] == ["packages", "devices", "computation"]
    assert names[-1] == "next"
    assert f"slm-jax classify --run {classifier}" in lines[-1]
    assert any("frozen.safetensors, the frozen parameters: intact" in line for line in lines)


def test_json_has_the_same_findings_and_a_problem_shows_in_the_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLM_JAX_DATA", str(tmp_path / "none"))
    assert cli.main(["doctor", "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert all(finding.keys() == {"level", "name", "text"} for finding in found)
    (problem,) = (finding["text"] for finding in found if finding["level"] == "problem")
    assert problem.startswith("SLM_JAX_DATA is ")


def test_a_device_that_cannot_be_started_is_one_problem(tmp_path, classifier):
    environ = {**os.environ, "JAX_PLATFORMS": "abacus"}
    command = [sys.executable, "-m", "slm_jax", "doctor", "--run", str(classifier)]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (problem,) = (line for line in done.stdout.splitlines() if line.startswith("problem "))
    assert "JAX cannot start its devices" in problem
    assert "JAX_PLATFORMS is abacus: unset it" in problem
    assert "frozen.safetensors, the frozen parameters: intact" in done.stdout
