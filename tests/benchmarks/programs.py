"""The programs under benchmarks/, run as a person does or imported."""

import importlib.util
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(program, *words, **more):
    command = [sys.executable, FOLDER / f"{program}.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **more)


def load(name):
    sys.path.insert(0, str(FOLDER))  # its neighbours are its imports
    try:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(FOLDER))
