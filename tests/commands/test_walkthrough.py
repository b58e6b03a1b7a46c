"""docs/training.md, "Train on event times": from a table of events to a calibrated detector, on tiny data."""

import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

import fl_evaluate
import main
from tests.helpers import ROOT, TINY_FLAGS

RATE = 8000
TRAINING = (
    f"--sample_rate {RATE} --max_epoch 8 --learning_rate 1e-2 --lr_rate 0.2,0.2,0.4 --mixup_alpha 0 "
    "--spec_augment False"
)
SMALLER = {  # for each command, what makes it tiny
    "prepare": ["--sample_rate", str(RATE)],
    "check": ["--sample_rate", str(RATE)],
    "train": [*TINY_FLAGS, *TRAINING.split()],
    "calibrate": ["--accelerator", "cpu"],
    "test": ["--accelerator", "cpu"],
    "predict": ["--accelerator", "cpu"],
}


def commands() -> list[list[str]]:
    """The lines of the section's first block, in words."""
    block = (ROOT / "docs/training.md").read_text().partition("## Train on event times")[2].split("```")[1]
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("python ")]


def write_recordings(folder: Path, count: int, rng: np.random.Generator) -> list[tuple[str, object, object, str]]:
    """Recordings of 10 s with a tone or a burst of noise, or nothing; returns the lines of their table."""
    folder.mkdir()
    lines: list[tuple[str, object, object, str]] = []
    for number in range(count):
        name, sound = f"{folder.name}_{number}.wav", 0.001 * rng.standard_normal(10 * RATE)
        for label in [["tone"], ["noise"], ["noise", "tone"], []][number % 4]:
            onset = float(rng.uniform(0.5, 6))
            offset = onset + float(rng.uniform(1.5, 3))
            time = np.arange(int(onset * RATE), int(offset * RATE))
            sound[time] += 0.2 * (np.sin(np.pi * time / 4) if label == "tone" else rng.standard_normal(len(time)))
            lines.append((name, round(onset, 3), round(offset, 3), label))
        if number % 4 == 3:
            lines.append((name, "", "", ""))
        soundfile.write(folder / name, sound, RATE)
    return lines


@pytest.mark.slow
def test_from_a_table_of_events_to_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    lines = write_recordings(Path("recordings"), 24, rng)
    truth = pd.DataFrame(lines, columns=["filename", "onset", "offset", "event_label"])
    truth.to_csv("events.tsv", sep="\t", index=False)
    write_recordings(Path("new_recordings"), 2, rng)
    walked = commands()
    assert [words[2] if words[1] == "main.py" else words[1] for words in walked] == [
        "prepare", "check", "train", "calibrate", "test", "fl_evaluate.py", "predict", "predict"
    ]  # fmt: skip
    for _, script, *words in walked:
        if script == "fl_evaluate.py":
            assert fl_evaluate.main(words) == 0
        else:
            assert main.main([*words, *SMALLER[words[0]]]) == 0, words
    run = Path("workspace/runs/detector")
    assert (run / "scores/test_report.html").stat().st_size > 10000
    found = pd.read_csv("found.tsv", sep="\t")
    assert list(found.columns) == ["filename", "onset", "offset", "event_label", "score", "threshold"]
    assert set(found["event_label"]) <= {"tone", "noise"}
    bins = pd.read_csv("bins.csv")
    assert len(bins) == 2 * 10  # ten steps of each recording of one window
