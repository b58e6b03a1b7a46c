"""python main.py predict: what it prints and writes, what it does with bad files, and how it resumes."""

import csv
import io
import json
import os
import re
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import main
from commands import predict as predict_module
from evaluation.postprocess import PostProcessing
from inference import Tagger, pictures
from inference.outputs import FORMATS, Journal, Outputs
from inference.parquet import INSTALL
from settings import UserError
from tests.levels import FramelessTagger, save_nano

LABELS = ["dog, large", "cat", "Flügel"]
NAMES = ["sounds/a.wav", "sounds/deep/b.flac", "sounds/deep/c.ogg", "sounds/deep/d.WAV"]
OUTPUTS = {
    "jsonl": "tags.jsonl", "csv": "scores.csv", "events": "events.tsv", "scores": "scores.h5",
    "embeddings": "embeddings.npz", "audacity": "labels", "raven": "raven",
}  # fmt: skip
Predict = Callable[..., int]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nano(tmp_path_factory.mktemp("predict") / "nano.ckpt", LABELS, (0.2, 0.99, 0.3))


@pytest.fixture
def predict(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """The command, in a folder with four recordings of different kinds in sounds/, beside other files."""
    rng = np.random.default_rng(0)
    (tmp_path / "sounds" / "deep").mkdir(parents=True)
    for name, seconds in zip(NAMES, (2.0, 0.2, 1.1, 3.3), strict=True):
        soundfile.write(tmp_path / name, 0.1 * rng.standard_normal((int(seconds * 8000), 2)), 8000)
    for name in ("notes.txt", "._a.wav"):
        (tmp_path / "sounds" / name).write_text("no sound")
    monkeypatch.chdir(tmp_path)

    def run(*words: str, file: str | Path = checkpoint) -> int:
        return main.main(["predict", *words, "--resume_checkpoint", str(file), "--accelerator", "cpu"])

    return run


@pytest.fixture
def tagger(checkpoint: Path) -> Tagger:
    return Tagger.from_checkpoint(checkpoint, device="cpu")


def flags(folder: str) -> list[str]:
    return [word for name, path in OUTPUTS.items() for word in (f"--{name}", f"{folder}/{path}")]


def read_lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_rows(path: str, delimiter: str = ",") -> list[list[str]]:
    with Path(path).open(newline="") as file:
        return list(csv.reader(file, delimiter=delimiter))


def numbers(rows: list[list[str]]) -> list[list[float]]:
    return [[float(cell) for cell in row[3:]] for row in rows]


def read_all(folder: str) -> dict[str, Any]:
    """The content of what a run wrote, by name; of HDF5, which has the time of writing, its data."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        if path.suffix == ".h5":
            with h5py.File(path) as store:
                found[path.name] = {key: store[key][:].tolist() for key in store} | {"about": str(dict(store.attrs))}
        elif path.suffix == ".npz":
            with np.load(path) as store:
                found[path.name] = {key: store[key].tolist() for key in store}
        else:
            found[path.name] = path.read_bytes()
    return found


def test_tags_on_the_terminal(predict: Predict, tagger: Tagger, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict("sounds", "sounds/a.wav", "--top_k", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        f"{name} ({seconds} s)" for name, seconds in zip(NAMES, ("2.00", "0.20", "1.10", "3.30"), strict=True)
    ]
    assert len(lines) == 12
    assert [f"  {score:.3f}  {label}" for label, score in tagger.tag_file("sounds/a.wav").top(2)] == lines[1:3]


def test_every_output(predict: Predict, tagger: Tagger) -> None:
    assert predict("sounds", *flags("out"), "--embeddings_of", "frames") == 0
    expected = [tagger.tag_file(name, frame_embeddings=True) for name in NAMES]

    lines = read_lines("out/tags.jsonl")
    assert [(line["file"], line["duration"]) for line in lines] == [
        (name, pytest.approx(tagged.duration)) for name, tagged in zip(NAMES, expected, strict=True)
    ]
    for line, tagged in zip(lines, expected, strict=True):
        assert [(tag["label"], tag["score"]) for tag in line["tags"]] == [
            (label, pytest.approx(score, abs=1e-5)) for label, score in tagged.top(5)
        ]
    header, *rows = read_rows("out/scores.csv")
    assert header == ["file", "start", "end", *LABELS]
    assert rows[0][:3] == ["sounds/a.wav", "0.0000", "2.0000"]
    np.testing.assert_allclose(numbers(rows), [t.clipwise for t in expected], atol=1e-5)

    header, *events = read_rows("out/events.tsv", "\t")
    assert header == ["filename", "onset", "offset", "event_label", "score", "threshold"]
    assert {(event[3], float(event[5])) for event in events} == {("dog, large", 0.2), ("Flügel", 0.3)}
    found = pd.concat([tagged.events(tagger.postprocessing).sort_values("onset", kind="stable") for tagged in expected])
    np.testing.assert_allclose([float(event[4]) for event in events], found.score, atol=5e-5)
    assert max(len(event[4]) for event in events) <= len("0.12345")
    assert [[event["score"], event["threshold"]] for line in lines for event in line["events"]] == [
        [float(cell) for cell in event[4:]] for event in events
    ]
    assert {event[3] for event in events} == {"dog, large", "Flügel"}  # as calibrated: cat needs 0.99
    assert [len(line["events"]) for line in lines] == [sum(event[0] == name for event in events) for name in NAMES]
    first = [event[1:] for event in events if event[0] == NAMES[0]]
    labels = [[*row[:2], row[2].rpartition(" > ")[2]] for row in read_rows("out/labels/a.wav.txt", "\t")]
    assert [[float(cell) for cell in row] for row in labels] == [[float(e[0]), float(e[1]), float(e[4])] for e in first]
    assert all(
        row[2].startswith(f"{e[2]} 0.") for row, e in zip(read_rows("out/labels/a.wav.txt", "\t"), first, strict=True)
    )
    raven, *boxes = read_rows("out/raven/a.wav.selections.txt", "\t")
    of = [raven.index(name) for name in ("Begin Time (s)", "End Time (s)", "Label", "Score", "Threshold")]
    assert [[box[k] for k in of] for box in boxes] == first
    assert {(box[raven.index("High Freq (Hz)")], box[raven.index("Begin Path")]) for box in boxes} == {
        ("4000", NAMES[0])
    }
    assert sorted(p.name for p in Path("out/labels/deep").iterdir()) == ["b.flac.txt", "c.ogg.txt", "d.WAV.txt"]

    with h5py.File("out/scores.h5") as store:
        assert [name.decode() for name in store["audio_name"][:]] == NAMES
        assert store["first_frame"][:].tolist() == [0, *np.cumsum([len(tagged.framewise) for tagged in expected])]
        np.testing.assert_allclose(store["framewise"][:], np.concatenate([t.framewise for t in expected]), atol=1e-5)
        np.testing.assert_allclose(store["clipwise"][:], np.stack([t.clipwise for t in expected]), atol=1e-5)
        assert list(store.attrs["labels"]) == LABELS
        assert store.attrs["seconds_per_frame"] == expected[0].seconds_per_frame
        assert store.attrs["sample_rate"] == 8000
    with np.load("out/embeddings.npz") as store:
        np.testing.assert_allclose(store["embedding"], np.stack([t.embedding for t in expected]), atol=1e-4)
        every = np.concatenate([t.frame_embeddings for t in expected if t.frame_embeddings is not None])
        np.testing.assert_allclose(store["frame_embedding"], every, atol=1e-4)
        assert store["duration"].tolist() == [t.duration for t in expected]
    assert {path.name for path in Path("out").iterdir()} == set(OUTPUTS.values())


def test_all_formats_at_once(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    """Those with a path of their own lie there; classes and scores that are not wanted stand nowhere."""
    chosen = ["--classes", '["Flügel", "dog, large"]', "--min_score", "0.5", "--csv", "here.csv"]
    assert predict("sounds", "--output", "out", *chosen) == 0
    written = {name for name, kind in FORMATS.items() if Path("out", kind.name).exists()}
    assert written == {name for name, kind in FORMATS.items() if not kind.optional} - {"csv"}
    assert read_rows("here.csv")[0] == ["file", "start", "end", "Flügel", "dog, large"]
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    lines = read_lines("out/tags.jsonl")
    tags = [tag for line in lines for tag in line["tags"]]
    assert len(printed) == len(tags)
    scores = [event["score"] for line in lines for event in [*line["tags"], *line["events"]]]
    assert min(scores) >= 0.5
    assert {tag["label"] for tag in tags} <= {"Flügel", "dog, large"}
    with h5py.File("out/scores.h5") as store:
        assert list(store.attrs["labels"]) == ["Flügel", "dog, large"]
        assert store["framewise"].shape[1] == 2


def test_a_parquet_table(predict: Predict, tagger: Tagger) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert predict("sounds", "--parquet", "a.parquet", "--classes", "cat,Flügel") == 0
    table = parquet.read_table("a.parquet")
    assert json.loads(table.schema.metadata[b"labels"]) == ["cat", "Flügel"]
    rows = table.to_pylist()
    assert [row["file"] for row in rows] == NAMES
    for row in rows:
        tagged = tagger.tag_file(row["file"]).select_classes(["cat", "Flügel"])
        assert (row["duration"], row["seconds_per_frame"]) == (tagged.duration, tagged.seconds_per_frame)
        for name in ("clipwise", "framewise", "embedding"):
            np.testing.assert_allclose(row[name], getattr(tagged, name), atol=1e-4)


def test_a_parquet_table_without_pyarrow(
    predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("inference.parquet.find_spec", lambda name: None)
    assert predict("sounds", "--parquet", "a.parquet") == 2
    assert INSTALL in capsys.readouterr().err


def test_shares_of_the_files(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    """Each tags every third file, and writes files of its own; together they have what one run has."""
    assert predict("sounds", *flags("whole")) == 0
    for number in (1, 2, 3):
        assert predict("sounds", *flags("out"), "--shard", f"{number}/3") == 0
        lines = read_lines(f"out/tags.shard{number}of3.jsonl")
        assert [line["file"] for line in lines] == NAMES[number - 1 :: 3]
    of_files = [Path(path).name for name, path in OUTPUTS.items() if not FORMATS[name].folder]
    expected = {f"{Path(name).stem}.shard{k}of3{Path(name).suffix}" for name in of_files for k in (1, 2, 3)}
    assert {path.name for path in Path("out").iterdir()} == expected | {"labels", "raven"}
    labels = {path.name: path.read_bytes() for path in Path("out/labels").rglob("*.txt")}
    assert labels.keys() == {path.name for path in Path("whole/labels").rglob("*.txt")}
    assert (Path("out/labels/shard1of3/a.wav.txt")).is_file()
    assert "4" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["1", "0/2", "3/2", "1/5", "a/b", "1/2/3", "1.0/2"])
def test_shares_that_are_refused(share: str, predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict("sounds", "--shard", share, "--csv", "a.csv") == 2
    assert f"--shard {share}" in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == {"sounds"}


def test_bins(predict: Predict, tagger: Tagger) -> None:
    assert predict("sounds/a.wav", "--csv", "a.csv", "--bins", "1", "--bins_by", "max") == 0
    rows = read_rows("a.csv")[1:]
    assert [float(row[1]) for row in rows] == [0, 0.63, 1.26]
    assert [float(row[2]) for row in rows] == [0.63, 1.26, 2]
    binned = tagger.tag_file("sounds/a.wav").in_bins(0.63, "max").framewise
    np.testing.assert_allclose(numbers(rows), binned, atol=1e-5)


def test_without_a_time_axis(
    predict: Predict, tagger: Tagger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frameless = FramelessTagger(tagger.network, tagger.settings, tagger.labels)
    monkeypatch.setattr(predict_module, "load_tagger", lambda given, command, runtime: frameless)
    assert predict("sounds", "--output", "out") == 0
    assert {path.name for path in Path("out").iterdir()} == {
        k.name for k in FORMATS.values() if not (k.timed or k.optional)
    }
    assert [(line["file"], "events" in line) for line in read_lines("out/tags.jsonl")] == [(n, False) for n in NAMES]
    with h5py.File("out/scores.h5") as store:
        assert (store["clipwise"].shape, store["framewise"].shape) == ((4, 3), (0, 3))
    assert len(list(Path("out/pictures").rglob("*.png"))) == 4
    capsys.readouterr()
    refused = ["--events a", "--audacity a", "--bins 2", "--embeddings_of frames"]
    for flag in refused:
        assert predict("sounds", *flag.split()) == 2
        said = capsys.readouterr().err
        assert flag.replace(" a", "").replace(" 2", "") in said
        assert "time axis" in said


def test_a_reader_that_has_enough_ends_it_quietly(
    predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `predict ... | head -1`: nobody reads standard output. The same command resumes."""
    words = ["sounds", "--jsonl", "tags.jsonl", "--batch_size", "1"]
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, os.fdopen(writing, "w") as closed:
        patch.setattr(sys, "stdout", closed)
        assert predict(*words) == 141
    assert "Error" not in capsys.readouterr().err
    assert not Path("tags.jsonl").exists()
    assert predict(*words) == 0
    assert [line["file"] for line in read_lines("tags.jsonl")] == NAMES


def test_bad_files_are_reported_and_the_others_tagged(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    """One has finite samples, but so large that their power is not: it shares a batch with the others."""
    Path("sounds/bad.wav").write_text("no sound")
    soundfile.write("sounds/nan.wav", np.array([0.1] * 9000 + [np.nan]), 8000, subtype="FLOAT")
    soundfile.write("sounds/b.wav", np.full(20_000, 1e30, np.float32), 8000, subtype="FLOAT")
    assert predict("missing.wav", "sounds", "--jsonl", "tags.jsonl") == 1
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    for name, error in zip(("missing", "sounds/b", "sounds/bad", "sounds/nan"), errors, strict=True):
        assert f"{name}.wav" in error
    assert "1e+30" in errors[1]
    assert "4 of 8 files" in printed.err
    assert [line["file"] for line in read_lines("tags.jsonl")] == NAMES
    assert "(3.30 s)" in printed.out


def test_standard_input(predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(Path(NAMES[1]).read_bytes())))
    assert predict("-", "--jsonl", "tags.jsonl", "--plot", "pictures") == 0
    assert capsys.readouterr().out.startswith("- (0.20 s)")
    assert read_lines("tags.jsonl")[0]["file"] == "-"
    assert [path.name for path in Path("pictures").iterdir()] == ["standard_input.png"]
    assert Path("pictures/standard_input.png").read_bytes().startswith(b"\x89PNG")
    sys.stdin.buffer = io.BytesIO(b"no sound")  # type: ignore[misc]
    assert predict("-") == 1
    assert "error: - " in capsys.readouterr().err


def test_a_pipe_is_read_and_odd_sounds_are_named(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write("sounds/quiet.wav", np.zeros(8000), 8000)
    os.mkfifo("pipe")
    content = Path(NAMES[1]).read_bytes()
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(content))
    writer.start()
    assert predict("pipe", "sounds", "--jsonl", "tags.jsonl", "--plot", "pictures") == 0
    writer.join()
    printed = capsys.readouterr()
    lines = {line["file"]: line.get("warnings", []) for line in read_lines("tags.jsonl")}
    assert set(lines) == {*NAMES, "sounds/quiet.wav", "pipe"}
    assert [name for name, warnings in lines.items() if warnings] == ["sounds/quiet.wav"]
    assert "sounds/quiet.wav (1.00 s)\n  silent\n" in printed.out
    assert "warning: sounds/quiet.wav" in printed.err
    assert all(word in printed.err for word in ("6", "1 silent", ".txt 1", "hidden 1"))


def test_progress_without_a_terminal(
    predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data.progress.EVERY_SECONDS", 0.0)
    assert predict("sounds", "--batch_size", "1") == 0
    assert "4 of 4 files, 0:00:06 of sound" in capsys.readouterr().err


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once so many recordings are in the journal."""
    add = Journal.add

    def stop(journal: Journal, entry: dict[str, Any], parts: Any) -> None:
        if len(journal.entries) == count:
            raise KeyboardInterrupt
        add(journal, entry, parts)

    monkeypatch.setattr(Journal, "add", stop)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999, 1])
def test_an_interrupted_run_resumes(
    share: float, predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped when this share of the journal is on the disk: the outputs are the unbroken run's."""
    words = ["sounds", "--batch_size", "1"]
    assert predict(*words, *flags("whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert predict(*words, *flags("broken")) == 130
    journal = Path("broken/tags.jsonl.journal")
    assert {path.name for path in Path("broken").iterdir()} == {journal.name, "labels", "raven"}
    os.truncate(journal, int(share * journal.stat().st_size))
    capsys.readouterr()
    assert predict(*words, *flags("broken")) == 0
    tagged = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("s)")]
    assert tagged == NAMES[int(share * 4) if share > 0.1 else 0 :]
    assert read_all("broken") == read_all("whole")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_recording_is_tagged_once(
    count: int, predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sounds", "--csv", "a.csv", "--batch_size", "1"]
    with monkeypatch.context() as patch:
        stop_after(count, patch)
        assert predict(*words) == 130
    capsys.readouterr()
    assert predict(*words, "--top_k", "1") == 2  # another run
    assert "a.csv.journal" in capsys.readouterr().err
    assert predict(*words) == 0
    tagged = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("s)")]
    assert tagged == NAMES[count:]
    assert [row[0] for row in read_rows("a.csv")[1:]] == NAMES
    for _ in range(2):  # a finished run starts anew
        assert predict(*words) == 0
        assert len(read_rows("a.csv")) == 5


def test_an_interruption_ends_the_threads(predict: Predict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while files are read ahead: when the command has ended, no thread reads."""
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert predict("sounds", "--csv", "a.csv", "--batch_size", "1") == 130
    assert not [thread for thread in threading.enumerate() if thread.name == "reader"]


def test_no_room(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    """Files may have 500 bytes, which is an error like that of a full disk. With room the same command resumes."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, allowed[1]))
    try:
        assert predict("sounds", "--csv", "a.csv", "--batch_size", "1") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert "a.csv.journal cannot be written" in capsys.readouterr().err
    assert predict("sounds", "--csv", "a.csv", "--batch_size", "1") == 0
    assert [row[0] for row in read_rows("a.csv")[1:]] == NAMES


def test_a_long_name_is_shortened(predict: Predict) -> None:
    name = "n" * 240 + ".wav"
    Path("sounds/a.wav").rename(Path("sounds", name))
    assert predict("sounds", "--audacity", "labels", "--jsonl", "tags.jsonl") == 0
    (label,) = Path("labels").glob("n*.txt")
    assert label.name.startswith("n" * 200)
    files = [json.loads(line)["file"] for line in Path("tags.jsonl").read_text().splitlines()]
    assert len(files) == 4
    assert f"sounds/{name}" in files


def test_labels_that_cannot_be_written(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    """The recording is named, all else is written."""
    Path("labels/deep/b.flac.txt").mkdir(parents=True)
    assert predict("sounds", "--audacity", "labels", "--jsonl", "tags.jsonl") == 1
    assert "b.flac" in capsys.readouterr().err
    assert [json.loads(line)["file"] for line in Path("tags.jsonl").read_text().splitlines()] == NAMES
    assert Path("labels/deep/c.ogg.txt").is_file()
    assert not list(Path().glob("*.journal*"))


def test_an_output_that_cannot_be_written_at_the_end(
    predict: Predict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are written; the same command writes it, and tags nothing again."""
    words = ("sounds", "--csv", "a.csv", "--scores", "s.h5", "--jsonl", "tags.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "_write_arrays", lambda *_: (_ for _ in ()).throw(UserError("s.h5 cannot be written")))
        assert predict(*words) == 2
    assert "a.csv" in capsys.readouterr().err.splitlines()[-1]
    assert Path("a.csv").is_file()
    monkeypatch.setattr(Tagger, "_windows", lambda *_: pytest.fail("tagged again"))
    assert predict(*words) == 0
    assert Path("s.h5").is_file()
    assert not list(Path().glob("*.journal*"))


def test_a_file_that_is_no_journal_stays(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.csv.journal").write_text("mine")
    assert predict("sounds", "--csv", "a.csv") == 2
    assert "a.csv.journal" in capsys.readouterr().err
    assert Path("a.csv.journal").read_text() == "mine"


def test_a_name_that_is_no_utf8(predict: Predict) -> None:
    Path("sounds/a.wav").rename(os.fsdecode(b"sounds/caf\xe9.wav"))
    assert predict("sounds", "--jsonl", "tags.jsonl", "--scores", "a.h5", "--audacity", "labels") == 0
    assert "sounds/caf?.wav" in Path("tags.jsonl").read_text()


def test_control_characters_reach_no_terminal_and_no_label_file(
    predict: Predict, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file's name and of a checkpoint's labels; formulas reach no table."""
    Path("sounds/a.wav").rename("sounds/a\x1b[31m.wav")
    Path("sounds/bad\x1b[31m.wav").write_text("no sound")
    content = torch.load(checkpoint, weights_only=True)
    content["labels"] = content["postprocessing"]["labels"] = ["\x1b[31mdog", "cat", "=1+2"]
    torch.save(content, "odd.ckpt")
    assert predict("sounds", "--output", "out", file="odd.ckpt") == 1
    printed = capsys.readouterr()
    assert "\\x1b[31mdog" in printed.out
    assert "\x1b" not in printed.out + printed.err
    for path in (path for path in Path("out").rglob("*") if path.suffix in (".txt", ".tsv", ".csv")):
        text = path.read_text()
        assert "\x1b" not in text, path
        assert not re.search(r"(^|[\t,])=", text, re.MULTILINE) or "audacity" in path.parts, path


def test_names_that_look_the_same_are_two_files(predict: Predict, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run has written one of them: the other is not taken for it."""
    for name, byte in ((NAMES[0], b"\xe8"), (NAMES[3], b"\xe9")):
        Path(name).rename(os.fsdecode(b"sounds/caf" + byte + b".wav"))
    words = ["sounds", "--jsonl", "tags.jsonl", "--batch_size", "1"]
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert predict(*words) == 130
    assert predict(*words) == 0
    assert [(line["file"], round(line["duration"], 1)) for line in read_lines("tags.jsonl")] == [
        ("sounds/caf?.wav", 2.0), ("sounds/caf?.wav", 3.3), (NAMES[1], 0.2), (NAMES[2], 1.1),
    ]  # fmt: skip


def test_a_tab_in_a_name_stays_in_its_column(predict: Predict) -> None:
    Path("sounds/a.wav").rename("sounds/a\tb.wav")
    assert predict("sounds/a\tb.wav", "--events", "a.tsv") == 0
    rows = read_rows("a.tsv", "\t")[1:]
    assert {(row[0], row[3]) for row in rows} == {("sounds/a\tb.wav", label) for label in ("dog, large", "Flügel")}


def test_pictures_promise_no_truth(predict: Predict, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "save_png", lambda figure, path: drawn.append(figure))
    assert predict("sounds/a.wav", "--plot", "pictures") == 0
    assert drawn[0].get_suptitle() == "a.wav, 2.0 s"
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["detected", "score", "threshold"]


def test_thresholds_for_other_classes_do_not_count(predict: Predict, checkpoint: Path) -> None:
    """As calibrated on DESED, through the class mapping, with a network of AudioSet's classes."""
    content = torch.load(checkpoint, weights_only=True)
    content["postprocessing"] = PostProcessing(("Speech", "Dog"), thresholds=(0.2, 0.2), source="calibrated").as_dict()
    torch.save(content, "other.ckpt")
    written = set()
    for words in ([], ["--fl_threshold", "0.5"], ["--fl_median_filter", "1"]):
        with pytest.warns(UserWarning, match="Speech, Dog"):
            assert predict("sounds/a.wav", "--events", "a.tsv", *words, file="other.ckpt") == 0
        written.add(Path("a.tsv").read_text())
    assert len(written) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("empty", "empty"),
        ("sounds --scores a.txt", ".hdf5"),
        ("sounds --embeddings a.csv", ".npz"),
        ("sounds --bins 0", "--bins 0"),
        ("sounds --csv empty", "--csv empty"),
        ("sounds --plot sounds/a.wav", "--plot sounds/a.wav"),
        ("sounds --jsonl sounds/a.wav/tags", "--jsonl sounds/a.wav/tags"),
        ("sounds --top_k 0", "--top_k 0"),
        ("sounds --min_score 2", "--min_score 2"),
        ("sounds --classes cta", "cat"),
        ("sounds --csv a --jsonl ./a", "same name"),
        ("sounds other --audacity labels", "sounds/a.wav and other/a.wav"),
        ("sounds --fl_threshold 0.1,0.2 --jsonl a", "thresholds"),
        ("sounds --fl_interpolation 0 --jsonl a", "interpolation"),
        ("sounds --window_overlap 1", "window_overlap"),
    ],
)
def test_mistakes(words: str, said: str, predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("other").mkdir()
    soundfile.write("other/a.wav", np.zeros(800), 8000)
    assert predict(*words.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("threshold", "events"), [("0.999", 0), ("0.0001", 3)])
def test_settings_stand_in_for_the_calibrated_thresholds(threshold: str, events: int, predict: Predict) -> None:
    assert predict("sounds/a.wav", "--events", "a.tsv", "--fl_threshold", threshold) == 0
    assert len(read_rows("a.tsv", "\t")) == 1 + events


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", None), ("mp3", None), ("ogg", None)]
)
def test_damaged_files_are_errors_of_theirs_alone(
    suffix: str, subtype: str | None, predict: Predict, tmp_path: Path
) -> None:
    """Cut off anywhere, or with random bytes changed: a result or an error of that file, never a crash."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "damaged"
    folder.mkdir()
    whole = folder / f"whole.{suffix}"
    soundfile.write(whole, 0.3 * rng.standard_normal(6000), 8000, subtype=subtype)
    content = whole.read_bytes()
    cuts = {int(size) for size in np.linspace(0, min(len(content) - 1, 200), 60)} | set(range(0, len(content), 500))
    damaged = [content[:size] for size in sorted(cuts)]
    for number in range(250):
        changed = bytearray(content)
        reach = len(changed) if number % 2 else min(len(changed), 128)  # half of them in the header
        for place in rng.integers(0, reach, rng.integers(1, 9)):
            changed[place] = rng.integers(0, 256)
        damaged.append(bytes(changed))
    for number, data in enumerate(damaged):
        (folder / f"{number:04d}.{suffix}").write_bytes(data)
    assert predict(str(folder), "--jsonl", "tags.jsonl", "--top_k", "1") == 1
    lines = read_lines("tags.jsonl")
    assert lines[-1]["file"] == str(whole)
    assert len(lines) <= len(damaged)
    assert all(np.isfinite(line["tags"][0]["score"]) for line in lines)
