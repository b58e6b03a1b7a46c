"""What main.py says after Ctrl-C: what of the work is kept, which is not the same for every command."""

import importlib
import types
from pathlib import Path
from typing import Any

import pytest

import main
from commands.command_line import COMMANDS
from tests.helpers import TINY_FLAGS

NEEDED = {"predict": ["a.wav"], "import_legacy": ["--legacy", "a.npy"]}


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
    assert ("goes on: recordings" in said) == (command == "predict")
    assert ("starts anew" in said) == (command not in ("train", "cross_validate", "predict", "compress"))


def test_every_command_that_goes_on_exists() -> None:
    assert main.GOES_ON.keys() <= COMMANDS.keys()


def test_an_interrupted_test_says_so(
    demo_workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning ends with SystemExit where it is interrupted; main's line is said all the same."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(demo_workspace)
    assert main.main(["train", *TINY_FLAGS, "--max_epoch", "1", "--debug", "True", "--exp_name", "interrupted"]) == 0
    monkeypatch.setattr("sed_model.Evaluation.test_step", interrupt)
    best = "workspace/runs/interrupted/checkpoints/best.ckpt"
    assert main.main(["test", "--resume_checkpoint", best, "--accelerator", "cpu"]) == 130
    assert "starts anew" in capsys.readouterr().err
