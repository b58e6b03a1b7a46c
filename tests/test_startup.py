"""What a command does not import before it has to: packages that take a second or more."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

HEAVY = {"pandas", "matplotlib", "librosa", "scipy", "sklearn", "pytorch_lightning", "torchmetrics", "torch._dynamo"}


def imported(code: str) -> set[str]:
    """Which modules a new process has after running code."""
    words = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"]
    return set(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stderr.split())


@pytest.mark.parametrize("words", [["--help"], ["predict", "--help"], ["train", "--help-all"]])
def test_help_waits_for_no_package_but_pydantic(words: list[str]) -> None:
    code = f"import main\ntry: main.main({words})\nexcept SystemExit: pass"
    assert not imported(code) & {*HEAVY, "torch", "numpy", "h5py", "rich"}


@pytest.mark.slow
def test_predict_imports_what_tags_need() -> None:
    found = imported("import commands.predict, commands.listen")
    assert "torch" in found
    assert not found & {*HEAVY, "h5py", "onnxruntime", "onnx"}


@pytest.mark.slow
def test_a_network_of_the_published_size_is_built_without_torchs_compiler() -> None:
    found = imported("from model import build_model; from settings import resolve; build_model(resolve())")
    assert not found & HEAVY
