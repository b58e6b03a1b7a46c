"""Tiny raw data of every data set, as downloads lie on the disk, and the call that prepares them."""

import itertools
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile

from data.clip_store import ClipTable, read_events, read_store_table
from prepare.adapters import load_adapter
from prepare.esc50 import LABELS as ESC50_LABELS
from settings import UserError, resolve

RATE = 8000
EVENTS = "filename\tonset\toffset\tevent_label\n"
SPEECH, BARK = "/m/09x0r", "/m/05tny_"


def write_sound(path: Path, seconds: float = 0.2, rate: int = RATE, channels: int = 1, level: float = 0.0) -> Path:
    """A file of one level, or of noise that depends on its path; the format goes by the ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (round(seconds * rate), channels)
    noise = np.random.default_rng(list(str(path).encode())).uniform(-0.1, 0.1, shape)
    soundfile.write(path, np.full(shape, level) if level else noise, rate)
    return path


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_broken(folder: Path) -> list[str]:
    """Three files without sound: no samples, text, NaN. Returns their names."""
    write_text(folder / "text.mp3", "this is no sound")
    soundfile.write(folder / "empty.wav", np.zeros(0), RATE)
    soundfile.write(folder / "nan.wav", np.full(800, np.nan), RATE, subtype="FLOAT")
    return ["empty.wav", "text.mp3", "nan.wav"]


def prepare(name: str, folder: Path, *, rate: int = RATE, seed: int = 0, **flags: Any) -> tuple[Any, ClipTable]:
    """Prepare into folder/data: the report and the table of the store. flags: those of the adapter."""
    given = {"dataset_type": name, "dataset_path": str(folder / "data"), "sample_rate": rate, "random_seed": seed}
    report = load_adapter(name).prepare(resolve(given), **flags)
    return report, read_store_table(report.path)


def refused(match: str, name: str, folder: Path, **flags: Any) -> None:
    """Preparing raises a UserError that matches, and leaves no file."""
    with pytest.raises(UserError, match=match):
        prepare(name, folder, **flags)
    assert not list((folder / "data").rglob("*.h5*"))


def lengths(table: ClipTable) -> list[int]:
    """Samples of each clip, and the width of the store behind them."""
    with h5py.File(table.paths[0]) as file:
        return [*file["real_len"][:].tolist(), file["waveform"].shape[1]]


def names(table: ClipTable) -> list[str]:
    return [name.decode() for name in table.names]


def classes(table: ClipTable) -> list[list[str]]:
    return [[table.labels[k] for k in np.flatnonzero(target)] for target in table.targets]


def events(table: ClipTable) -> list[list[tuple[str, float, float]]]:
    """Class, onset and offset of the events of each clip, to a microsecond."""
    return [
        [(table.labels[e.label], round(e.onset, 6), round(e.offset, 6)) for e in clip]
        for clip in read_events(table.paths[0])
    ]


# What makes the raw data of a data set below a folder, with a file broken.* among them; returns the flags of prepare.


def make_demo(folder: Path) -> dict[str, Any]:
    return {"clips": 10}


def make_audioset(folder: Path) -> dict[str, Any]:
    for ytid in ("aaaaaaaaaaa", "bbbbbbbbbbb"):
        write_sound(folder / "raw" / f"Y{ytid}.wav")
    write_text(folder / "raw" / "broken_broke.wav", "no sound")
    lines = [f'{ytid}, 0.0, 10.0, "{SPEECH}"\n' for ytid in ("aaaaaaaaaaa", "broken_broke", "bbbbbbbbbbb")]
    return {"raw": folder / "raw", "segments": write_text(folder / "balanced_train.csv", "".join(lines))}


def make_audioset_strong(folder: Path) -> dict[str, Any]:
    make_audioset(folder)
    write_sound(folder / "raw" / "ccccccccccc.wav")
    head = "segment_id\tstart_time_seconds\tend_time_seconds\tlabel\n"
    train = [f"{ytid}_0\t0.0\t0.1\t{SPEECH}\n" for ytid in ("aaaaaaaaaaa", "broken_broke", "bbbbbbbbbbb")]
    strong = write_text(folder / "audioset_train_strong.tsv", head + "".join(train))
    table = write_text(folder / "audioset_eval_strong.tsv", f"{head}ccccccccccc_0\t0.1\t0.2\t{SPEECH}\n")
    return {"raw": folder / "raw", "strong": strong, "table": table}


def make_esc50(folder: Path) -> dict[str, Any]:
    rows = ["filename,fold,target,category\n"]
    for number, name in enumerate(("1.wav", "broken.wav", "2.flac", "3.ogg")):
        rows.append(f"{name},{number + 1},{number},{ESC50_LABELS[number]}\n")
        write_sound(folder / "raw" / "audio" / name)
    write_text(folder / "raw" / "audio" / "broken.wav", "no sound")
    write_text(folder / "raw" / "meta" / "esc50.csv", "".join(rows))
    return {"raw": folder / "raw"}


def make_scv2(folder: Path, words: tuple[str, ...] = ("wow", "bed", "backward")) -> dict[str, Any]:
    """Three clips of each word: b.wav for validation, c.wav for test, and folders that are no words."""
    for word, name in itertools.product((*words, "_background_noise_", ".cache"), "abc"):
        write_sound(folder / "raw" / word / f"{name}.wav")
    write_text(folder / "raw" / words[0] / "broken.wav", "no sound")
    for name, clip in (("validation_list.txt", "b"), ("testing_list.txt", "c")):
        write_text(folder / "raw" / name, "".join(f"{word}/{clip}.wav\n" for word in words))
    return {"raw": folder / "raw"}


def make_desed(folder: Path) -> dict[str, Any]:
    """audio/ and metadata/ as DESED has them; each clip is of a level of its own."""
    sets = {  # folder of the audio: (names, table, lines)
        "train/synthetic/soundscapes": ("1.wav 2.wav", "soundscapes.tsv", "1.wav\t0\t0.1\tDog\n2.wav\t\t\t\n"),
        "train/real": ("real.wav", "", "real.wav\t0.05\t0.2\tSpeech\nreal.wav\t0.1\t0.2\tCat\n"),
        "train/weak": ("w1.wav w2.wav", "", "w1.wav\tDog,Speech\nw2.wav\tCat\n"),
        "train/unlabelled": ("u1.wav deeper/u2.wav", None, ""),
        "validation/synthetic/soundscapes": ("1.wav", "soundscapes.tsv", "1.wav\t0\t0.2\tBlender\n"),
        "eval": ("e.wav", "", "e.wav\t0.1\t0.2\tDog\nbroken.wav\t\t\t\n"),
    }
    level = itertools.count(1)
    tables = {}
    for place, (clips, table, lines) in sets.items():
        for name in clips.split():
            write_sound(folder / "audio" / place / name, level=next(level) / 100)
        if table is not None:
            head = "filename\tevent_labels\n" if place.endswith("weak") else EVENTS
            tables[place] = write_text(folder / "metadata" / f"{place}.tsv", head + lines)
    write_text(folder / "audio" / "eval" / "broken.wav", "no sound")
    return {
        "raw": folder / "audio",
        "table": tables["eval"],
        "strong": f"{tables['train/synthetic/soundscapes']},{tables['train/real']}",
        "weak": tables["train/weak"],
        "unlabelled": Path("train/unlabelled"),
        "validation": tables["validation/synthetic/soundscapes"],
    }


def make_dcase2016(folder: Path) -> dict[str, Any]:
    """HEAR's layout: a recording of 2.5 s in each split, and one that is broken."""
    task: dict[str, Any] = {
        "train": {"a.wav": [("cough", 900, 2200), ("knock", 300, 400)]},
        "valid": {"b.wav": [("knock", 0, 1000), ("knock", 500, 1500)], "broken.wav": []},
        "test": {"c.wav": []},
    }
    for split, files in task.items():
        listed = {n: [{"label": x, "start": a, "end": b} for x, a, b in events] for n, events in files.items()}
        write_text(folder / "raw" / f"{split}.json", json.dumps(listed))
        for name in files:
            write_sound(folder / "raw" / "16000" / split / name, 2.5, rate=16000)
    write_text(folder / "raw" / "16000" / "valid" / "broken.wav", "no sound")
    write_text(folder / "raw" / "task_metadata.json", '{"embedding_type": "event"}')
    write_text(folder / "raw" / "labelvocabulary.csv", "idx,label\n0,knock\n1,cough\n")
    return {"raw": folder / "raw", "segment_seconds": 1.0}


def make_folder(folder: Path) -> dict[str, Any]:
    for label, number in itertools.product(("owl", "bee"), range(3)):
        write_sound(folder / "raw" / label / f"{number}.wav", 0.1 + 0.1 * number, rate=(8000, 22050, 48000)[number])
    write_text(folder / "raw" / "bee" / "broken.wav", "no sound")
    return {"raw": folder / "raw"}


def make_soundscapes(folder: Path) -> dict[str, Any]:
    return {**make_folder(folder), "clips": 10}


RAW_DATA = {
    "demo": make_demo,
    "audioset": make_audioset,
    "audioset-strong": make_audioset_strong,
    "esc-50": make_esc50,
    "scv2": make_scv2,
    "desed": make_desed,
    "dcase2016-task2": make_dcase2016,
    "folder": make_folder,
    "soundscapes": make_soundscapes,
}
