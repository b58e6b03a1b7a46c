"""What main.py prints after Ctrl-C: what of the work is kept, which differs from command to command."""

import importlib
import types
from pathlib import Path
from typing import Any

import pytest

import main
from commands import report_missing
from commands.command_line import COMMANDS
from tests.helpers import run_python

NEEDED = {"predict": ["a.wav"], "import_legacy": ["--legacy", "a.npy"]}


def test_without_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    """A missing package is one line; a missing module of the project is a bug."""
    assert report_missing(ModuleNotFoundError("No module named 'torch'", name="torch._C")) == 2
    said = capsys.readouterr().err
    assert "torch" in said
    assert ".venv/bin/python" in said
    assert said.count("\n") == 1
    for own in ("data.nothing", "settings"):
        with pytest.raises(ModuleNotFoundError):
            report_missing(ModuleNotFoundError(name=own))


@pytest.mark.parametrize("command", list(COMMANDS))
def test_what_an_interruption_leaves(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(run=run))
    assert main.main([command, *NEEDED.get(command, [])]) == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ("--resume auto" in said) == (command == "train")
    assert ("resumes: recordings" in said) == (command == "predict")
    assert ("starts anew" in said) == (command not in ("train", "cross_validate", "predict", "compress"))


def test_every_command_that_is_resumed_exists() -> None:
    assert main.RESUMED.keys() <= COMMANDS.keys()


@pytest.mark.usefixtures("trained")
def test_an_interrupted_test(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning ends with SystemExit where it is interrupted; main prints its line all the same."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sed_model.Evaluation.test_step", interrupt)
    best = "workspace/runs/htsat_demo/checkpoints/best.ckpt"
    assert main.main(["test", "--resume_checkpoint", best, "--accelerator", "cpu"]) == 130
    assert "starts anew" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_commands_end_as_unbroken_ones(tmp_path: Path) -> None:
    """SIGKILL at random moments; see benchmarks/kill.py, which tries more of them and the other commands."""
    run_python("benchmarks/kill.py", "--commands", "prepare,train,predict", "--times", "2", cwd=tmp_path)
