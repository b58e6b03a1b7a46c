"""What main.py prints after Ctrl-C: what of the work is kept, which differs from command to command."""

import importlib
import multiprocessing
import os
import resource
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import main
import sed_model
from commands import report_missing
from commands.command_line import COMMANDS
from data.workers import raise_at_sigterm
from tests.helpers import LEAN_FLAGS, last_checkpoint, run_python

NEEDED = {"predict": ["a.wav"], "compare": ["--encoders", "ast"], "import_legacy": ["--legacy", "a.npy"]}


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
    assert ("starts anew" in said) == (command not in ("train", "cross_validate", "compare", "predict", "compress"))


@pytest.fixture
def at_sigterm() -> Iterator[None]:
    """SIGTERM as in a process of main.py."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)}
    raise_at_sigterm()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("trained", "at_sigterm")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_training_that_is_told_to_end(
    workers: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM to the process, or with all its workers: the run stays as its last checkpoint has it, and is resumed."""
    words = ["train", *LEAN_FLAGS, "--max_epoch", "4", "--resume", "auto", "--num_workers", workers]
    whole = sed_model.SEDWrapper.training_step

    def end(self: sed_model.SEDWrapper, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 3:
            for worker in multiprocessing.active_children():
                worker.terminate()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("SIGTERM did nothing")
        return whole(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr("sed_model.SEDWrapper.training_step", end)
        assert main.main(words) == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert "SIGTERM" in said
    assert "--resume auto" in said
    assert last_checkpoint("htsat_demo")["complete_epochs"] == 3
    folder = Path("workspace/runs")
    assert not [*folder.rglob("*.partial"), *folder.rglob("*.lock")]
    assert main.main(words) == 0
    assert last_checkpoint("htsat_demo")["complete_epochs"] == 4


@pytest.mark.usefixtures("trained")
def test_a_training_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Files may not grow beyond 5,000 bytes after the third epoch, which is an error like that of a full disk.

    The message says what was saved; with room the same command resumes.
    """
    words = ["train", *LEAN_FLAGS, "--max_epoch", "4", "--resume", "auto"]
    whole, allowed = sed_model.SEDWrapper.training_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self: sed_model.SEDWrapper, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, allowed[1]))
        return whole(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr("sed_model.SEDWrapper.training_step", fill)
        try:
            assert main.main(words) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    said = capsys.readouterr().err.splitlines()[-1]
    assert all(part in said for part in ("last.ckpt", "after epoch 3", "--resume auto"))
    assert last_checkpoint("htsat_demo")["complete_epochs"] == 3
    assert not list(Path("workspace").rglob("*.partial"))
    assert main.main(words) == 0
    assert last_checkpoint("htsat_demo")["complete_epochs"] == 4


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
