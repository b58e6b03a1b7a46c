"""One file a subcommand of main.py, and what both command lines, main.py and fl_evaluate.py, begin with."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def report_missing(error: ModuleNotFoundError) -> int:
    """Say how to enter the environment where a package is missing; returns the exit status.

    Raises `error` where the module is the project's own.
    """
    name = str(error.name).partition(".")[0]
    if (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file():
        raise error
    environment = Path(".venv", "bin", "python")
    print(
        f"error: {sys.executable} has no package {name}. Run {environment} {sys.argv[0]} ..., or enter the environment "
        f"with `source .venv/bin/activate`" + ("." if (ROOT / environment).exists() else "; `make install` makes it."),
        file=sys.stderr,
    )
    return 2
