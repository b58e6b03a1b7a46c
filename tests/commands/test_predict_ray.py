"""python main.py predict --ray: the results of one process, also where a worker dies."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile
from torch import Tensor

import main
from inference import Tagger, ray_tagging
from inference.loading import load_tagger
from tests.helpers import ROOT
from tests.levels import save_nano

FILES, AT_ONCE = 60, 8


class Mortal:
    """A network that ends its process in the third batch, in one process alone: the first that makes the marker."""

    def __init__(self, network: Any, marker: str) -> None:
        self.network, self.marker, self.frames, self.batches = network, marker, network.frames, 0

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.batches += 1
        if self.batches == 3:
            try:
                os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.network.probabilities(waveform)


def load_mortal(marker: str, given: dict[str, Any], command: str, runtime: str) -> Tagger:
    tagger = load_tagger(given, command, runtime)
    tagger.network = Mortal(tagger.network, marker)
    return tagger


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command, in a folder with FILES files in `sounds` of which one is none."""
    monkeypatch.chdir(tmp_path)
    save_nano(tmp_path / "nano.ckpt", ["dog", "cat", "bird"], (0.2, 0.99, 0.3))
    (tmp_path / "sounds").mkdir()
    rng = np.random.default_rng(0)
    for number in range(FILES - 1):
        sound = 0.1 * rng.standard_normal(4000 + 700 * (number % 5))
        soundfile.write(f"sounds/{number:02d}.wav", sound, 8000)
    Path("sounds/bad.wav").write_text("no sound")
    return ["predict", "sounds", "--resume_checkpoint", "nano.ckpt", "--accelerator", "cpu"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_a_worker_dies(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two: the other one and a new one go on, and each file is written once, in order, with its scores."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of main.py, Ray's workers have the folder
    monkeypatch.setattr(ray_tagging, "load_tagger", partial(load_mortal, str(Path("marker").resolve())))
    monkeypatch.setattr(ray_tagging, "FILES_AT_ONCE", AT_ONCE)
    before = signal.getsignal(signal.SIGTERM)
    assert main.main([*words, "--scores", "ray.h5", "--csv", "ray.csv", "--ray", "local", "--devices", "2"]) == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert Path("marker").exists()
    of_ray = capsys.readouterr()
    assert main.main([*words, "--scores", "one.h5", "--csv", "one.csv"]) == 1
    alone = capsys.readouterr()
    assert of_ray.out.splitlines() == alone.out.splitlines()
    errors = [[line for line in each.err.splitlines() if line.startswith("error: ")] for each in (of_ray, alone)]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 1
    with h5py.File("ray.h5") as found, h5py.File("one.h5") as expected:
        assert found.keys() == expected.keys()
        assert len(found["audio_name"]) == FILES - 1
        for name in ("audio_name", "first_frame", "duration"):
            np.testing.assert_array_equal(found[name][:], expected[name][:])
        for name in ("clipwise", "framewise"):
            np.testing.assert_allclose(found[name][:], expected[name][:], atol=1e-5)


def test_without_ray(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main.main([*words, "--ray", "local"]) == 2
    assert ray_tagging.INSTALL in capsys.readouterr().err


def test_no_cluster_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    assert main.main([*words, "--ray", "127.0.0.1:1"]) == 2
    assert "127.0.0.1:1" in capsys.readouterr().err
