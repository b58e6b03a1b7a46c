"""python main.py predict: what it prints and writes, what it does with bad files, and how it goes on."""

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile
import torch

import main
from evaluation.postprocess import PostProcessing
from inference import Tagged, Tagger, pictures
from inference import outputs as outputs_module
from model import build_model
from settings import resolve

# A network for less than a second of 8 kHz, 2 steps of 0.315 s.
NANO: dict[str, Any] = {
    "sample_rate": 8000, "clip_samples": 5040, "htsat_spec_size": 64, "htsat_dim": 16, "htsat_depth": [1, 1, 1, 1],
    "htsat_num_head": [1, 2, 4, 8], "classes_num": 3,
}  # fmt: skip
LABELS = ["dog, large", "cat", "Flügel"]
OUTPUTS = {
    "jsonl": "out/tags.jsonl",
    "csv": "out/scores.csv",
    "events": "out/events.tsv",
    "scores": "out/scores.h5",
    "embeddings": "out/embeddings.npz",
    "audacity": "out/labels",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    settings = resolve(NANO)
    path = tmp_path_factory.mktemp("predict") / "nano.ckpt"
    weights = {f"sed_model.{key}": value for key, value in build_model(settings).state_dict().items()}
    calibrated = PostProcessing(tuple(LABELS), thresholds=(0.2, 0.99, 0.3), source="calibrated").as_dict()
    content = {"state_dict": weights, "settings": settings.model_dump(), "labels": LABELS}
    torch.save({**content, "postprocessing": calibrated}, path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four recordings in sounds/, of different kinds, beside other files."""
    rng = np.random.default_rng(0)
    for name, seconds in {"a.wav": 2.0, "deep/b.flac": 0.2, "deep/c.ogg": 1.1, "deep/d.WAV": 3.3}.items():
        path = tmp_path / "sounds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal((int(seconds * 8000), 2)), 8000)
    (tmp_path / "sounds" / "notes.txt").write_text("no sound")
    (tmp_path / "sounds" / "._a.wav").write_text("no sound")
    monkeypatch.chdir(tmp_path)
    return tmp_path


NAMES = ["sounds/a.wav", "sounds/deep/b.flac", "sounds/deep/c.ogg", "sounds/deep/d.WAV"]


def predict(checkpoint: Path, *words: str) -> int:
    return main.main(["predict", *words, "--resume_checkpoint", str(checkpoint), "--accelerator", "cpu"])


def flags(prefix: str = "") -> list[str]:
    return [word for name, path in OUTPUTS.items() for word in (f"--{name}", prefix + path)]


def test_tags_on_the_terminal(checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(checkpoint, "sounds", "sounds/a.wav", "--top_k", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        f"{name} ({seconds} s)" for name, seconds in zip(NAMES, ("2.00", "0.20", "1.10", "3.30"), strict=True)
    ]
    assert len(lines) == 12
    tagged = Tagger.from_checkpoint(checkpoint, device="cpu").tag_file("sounds/a.wav")
    assert [f"  {score:.3f}  {label}" for label, score in tagged.top(2)] == lines[1:3]


def test_every_output(checkpoint: Path, folder: Path) -> None:
    assert predict(checkpoint, "sounds", *flags(), "--embeddings_of", "frames") == 0
    tagger = Tagger.from_checkpoint(checkpoint, device="cpu")
    expected = [tagger.tag_file(name, frame_embeddings=True) for name in NAMES]
    frames = [len(tagged.framewise) for tagged in expected]

    lines = [json.loads(line) for line in Path("out/tags.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == NAMES
    assert [line["duration"] for line in lines] == [pytest.approx(tagged.duration) for tagged in expected]
    for line, tagged in zip(lines, expected, strict=True):
        assert [(tag["label"], tag["score"]) for tag in line["tags"]] == [
            (label, pytest.approx(score, abs=1e-5)) for label, score in tagged.top(5)
        ]
    rows = list(csv.reader(io.StringIO(Path("out/scores.csv").read_text())))
    assert rows[0] == ["file", "start", "end", *LABELS]
    assert rows[1][:3] == ["sounds/a.wav", "0.0000", "2.0000"]
    np.testing.assert_allclose(
        [[float(x) for x in row[3:]] for row in rows[1:]], [t.clipwise for t in expected], atol=1e-5
    )

    table = list(csv.DictReader(io.StringIO(Path("out/events.tsv").read_text()), delimiter="\t"))
    assert {event["event_label"] for event in table} == {"dog, large", "Flügel"}  # as calibrated: cat needs 0.99
    assert [len(line["events"]) for line in lines] == [sum(e["filename"] == name for e in table) for name in NAMES]
    first = [event for event in table if event["filename"] == NAMES[0]]
    labels = Path("out/labels/a.wav.txt").read_text().splitlines()
    assert [line.split("\t")[2] for line in labels] == [event["event_label"] for event in first]
    assert [float(line.split("\t")[1]) for line in labels] == [float(event["offset"]) for event in first]
    assert sorted(p.name for p in Path("out/labels/deep").iterdir()) == ["b.flac.txt", "c.ogg.txt", "d.WAV.txt"]

    with h5py.File("out/scores.h5") as store:
        assert [name.decode() for name in store["audio_name"][:]] == NAMES
        assert store["first_frame"][:].tolist() == [0, *np.cumsum(frames).tolist()]
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
    assert not [path for path in Path("out").rglob("*") if path.suffix in (".partial", ".spool", ".journal")]


def test_bins(checkpoint: Path, folder: Path) -> None:
    assert predict(checkpoint, "sounds/a.wav", "--csv", "a.csv", "--bins", "1", "--bins_by", "max") == 0
    rows = list(csv.reader(io.StringIO(Path("a.csv").read_text())))
    tagged = Tagger.from_checkpoint(checkpoint, device="cpu").tag_file("sounds/a.wav")
    assert [row[1:3] for row in rows[1:]] == [
        ["0.0000", "0.6300"], ["0.6300", "1.2600"], ["1.2600", "1.8900"], ["1.8900", "2.0000"],
    ]  # fmt: skip
    binned = tagged.in_bins(0.63, "max").framewise
    np.testing.assert_allclose([[float(x) for x in row[3:]] for row in rows[1:]], binned, atol=1e-5)


def test_a_reader_that_has_enough_ends_it_quietly(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `predict ... | head -1`: standard output is a pipe that nobody reads. The same command goes on."""
    words = ["sounds", "--jsonl", "tags.jsonl", "--batch_size", "1"]
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, os.fdopen(writing, "w") as closed:
        patch.setattr(sys, "stdout", closed)
        assert predict(checkpoint, *words) == 141
    assert "Error" not in capsys.readouterr().err
    assert not Path("tags.jsonl").exists()
    assert predict(checkpoint, *words) == 0
    assert [json.loads(line)["file"] for line in Path("tags.jsonl").read_text().splitlines()] == NAMES


def test_a_bad_file_is_reported_and_the_others_go_on(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sounds/bad.wav").write_text("no sound")
    soundfile.write("sounds/nan.wav", np.array([0.1] * 9000 + [np.nan]), 8000, subtype="FLOAT")
    assert predict(checkpoint, "missing.wav", "sounds", "--jsonl", "tags.jsonl") == 1
    said = capsys.readouterr()
    assert "There is no file missing.wav" in said.err
    assert "bad.wav cannot be read as audio" in said.err
    assert "nan.wav holds NaN or infinite samples" in said.err
    assert "3 of 7 files could not be read" in said.err
    assert [json.loads(line)["file"] for line in Path("tags.jsonl").read_text().splitlines()] == NAMES
    assert "(3.30 s)" in said.out


def test_standard_input(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Input:
        buffer = io.BytesIO(Path("sounds/deep/b.flac").read_bytes())

    monkeypatch.setattr(sys, "stdin", Input())
    assert predict(checkpoint, "-", "--jsonl", "tags.jsonl", "--plot", "pictures") == 0
    assert capsys.readouterr().out.startswith("- (0.20 s)")
    assert json.loads(Path("tags.jsonl").read_text())["file"] == "-"
    assert Path("pictures/standard_input.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(Path("pictures").iterdir())) == 1
    Input.buffer = io.BytesIO(b"no sound")
    assert predict(checkpoint, "-") == 1
    assert "error: - cannot be read as audio" in capsys.readouterr().err


def read_all(prefix: str) -> dict[str, Any]:
    """What a run wrote, by name."""
    found: dict[str, Any] = {}
    for path in sorted(Path(prefix).rglob("*")):
        name = str(path.relative_to(prefix))
        if path.suffix == ".h5":
            with h5py.File(path) as store:
                found[name] = {key: store[key][:].tolist() for key in store} | {"labels": list(store.attrs["labels"])}
        elif path.suffix == ".npz":
            with np.load(path) as store:
                found[name] = {key: store[key].tolist() for key in store}
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("files", [0, 1, 3])
def test_an_interrupted_run_goes_on(
    files: int, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped after some files, in the middle of writing one: the end is the unbroken run's, no file is read twice."""
    words = ["sounds", "--batch_size", "1"]
    assert predict(checkpoint, *words, *flags("whole/")) == 0
    note = outputs_module.Outputs._note

    def stop(outputs: outputs_module.Outputs, entry: dict[str, Any]) -> None:
        if len(outputs.entries) == files + 1:
            for file in outputs.files.values():
                file.flush()
            raise KeyboardInterrupt
        note(outputs, entry)

    monkeypatch.setattr(outputs_module.Outputs, "_note", stop)
    assert predict(checkpoint, *words, *flags("broken/")) == 130
    assert "The same command goes on: recordings that are written in full" in capsys.readouterr().err
    assert not [name for name in OUTPUTS if name != "audacity" and Path("broken", OUTPUTS[name]).exists()]
    assert Path("broken/out/tags.jsonl.partial").read_bytes().count(b"\n") == files + 1
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    capsys.readouterr()

    assert predict(checkpoint, *words, *flags("broken/"), "--top_k", "1") == 2
    assert "belongs to an interrupted run with another checkpoint, settings or outputs" in capsys.readouterr().err
    with Path("broken/out/tags.jsonl.journal").open("ab") as journal:
        journal.write(b'{"name": "cut o')
    assert predict(checkpoint, *words, *flags("broken/")) == 0
    printed = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("s)")]
    assert printed == NAMES[files:]
    assert read_all("broken") == read_all("whole")


def test_a_name_that_is_no_utf8(checkpoint: Path, folder: Path) -> None:
    name = os.fsdecode(b"sounds/caf\xe9.wav")
    Path("sounds/a.wav").rename(name)
    assert predict(checkpoint, "sounds", "--jsonl", "tags.jsonl", "--scores", "a.h5", "--audacity", "labels") == 0
    assert "sounds/caf?.wav" in Path("tags.jsonl").read_text()


def test_names_that_look_the_same_are_two_files(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run has written one of them: the other is not taken for it."""
    for name, byte in (("sounds/a.wav", b"\xe8"), ("sounds/deep/d.WAV", b"\xe9")):
        Path(name).rename(os.fsdecode(b"sounds/caf" + byte + b".wav"))
    add = outputs_module.Outputs.add
    seen: list[outputs_module.Source] = []

    def stop(outputs: outputs_module.Outputs, source: outputs_module.Source, tagged: Tagged) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(source)
        add(outputs, source, tagged)

    with monkeypatch.context() as patch:
        patch.setattr(outputs_module.Outputs, "add", stop)
        assert predict(checkpoint, "sounds", "--jsonl", "tags.jsonl", "--batch_size", "1") == 130
    assert predict(checkpoint, "sounds", "--jsonl", "tags.jsonl", "--batch_size", "1") == 0
    lines = [json.loads(line) for line in Path("tags.jsonl").read_text().splitlines()]
    assert [(line["file"], round(line["duration"], 1)) for line in lines] == [
        ("sounds/caf?.wav", 2.0), ("sounds/caf?.wav", 3.3), ("sounds/deep/b.flac", 0.2), ("sounds/deep/c.ogg", 1.1),
    ]  # fmt: skip


def test_a_tab_in_a_name_stays_in_its_column(checkpoint: Path, folder: Path) -> None:
    Path("sounds/a.wav").rename("sounds/a\tb.wav")
    assert predict(checkpoint, "sounds/a\tb.wav", "--events", "a.tsv") == 0
    with Path("a.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert {row["filename"] for row in rows} == {"sounds/a\tb.wav"}
    assert {row["event_label"] for row in rows} == {"dog, large", "Flügel"}


def test_a_sound_without_finite_scores_is_an_error_of_its_own(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite samples, but so large that their power is none: they share a batch with the others."""
    soundfile.write("sounds/b.wav", np.full(20_000, 1e30, np.float32), 8000, subtype="FLOAT")
    assert predict(checkpoint, "sounds", "--jsonl", "tags.jsonl") == 1
    said = capsys.readouterr().err
    assert "error: sounds/b.wav: The network's scores are not finite" in said
    assert "up to 1e+30 (full scale is 1): they are too loud to be sound" in said
    assert [json.loads(line)["file"] for line in Path("tags.jsonl").read_text().splitlines()] == NAMES


def test_pictures_promise_no_truth(checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "save_png", lambda figure, path: drawn.append(figure))
    assert predict(checkpoint, "sounds/a.wav", "--plot", "pictures") == 0
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["detected", "score", "threshold"]


def test_thresholds_for_other_classes_do_not_count(checkpoint: Path, folder: Path) -> None:
    """As calibrated on DESED, through the class mapping, with a network of AudioSet's classes."""
    content = torch.load(checkpoint, weights_only=True)
    content["postprocessing"] = PostProcessing(("Speech", "Dog"), thresholds=(0.2, 0.2), source="calibrated").as_dict()
    torch.save(content, "other.ckpt")
    with pytest.warns(UserWarning, match=r"\(calibrated\) is for other classes than the network's, Speech, Dog"):
        assert predict(Path("other.ckpt"), "sounds/a.wav", "--events", "a.tsv") == 0
    for words in (["--events", "b.tsv", "--fl_threshold", "0.5"], ["--events", "c.tsv", "--fl_median_filter", "1"]):
        with pytest.warns(UserWarning, match="for other classes"):
            assert predict(Path("other.ckpt"), "sounds/a.wav", *words) == 0
    assert Path("a.tsv").read_text() == Path("b.tsv").read_text() == Path("c.tsv").read_text()


def test_a_finished_run_starts_anew(checkpoint: Path, folder: Path) -> None:
    for _ in range(2):
        assert predict(checkpoint, "sounds", "--jsonl", "tags.jsonl") == 0
        assert Path("tags.jsonl").read_text().count("\n") == 4


def test_a_run_whose_files_are_gone_says_so(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(outputs: Any, source: Any, tagged: Tagged) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outputs_module.Outputs, "add", stop)
        assert predict(checkpoint, "sounds", "--csv", "a.csv") == 130
    Path("a.csv.partial").unlink()
    assert predict(checkpoint, "sounds", "--csv", "a.csv") == 2
    assert "Remove the journal" in capsys.readouterr().err
    Path("a.csv.journal").write_text("{}\n")
    assert predict(checkpoint, "sounds", "--csv", "a.csv") == 2
    assert "a.csv.journal is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["empty"], "The folder empty holds no audio files"),
        (["sounds", "--scores", "a.txt"], "must end with .h5 or .hdf5"),
        (["sounds", "--embeddings", "a.csv"], "must end with .h5 or .hdf5 or .npz"),
        (["sounds", "--bins", "0"], "--bins 0 is not allowed"),
        (["sounds", "--csv", "empty"], "--csv empty is a folder: give the name of a file"),
        (["sounds", "--plot", "sounds/a.wav"], "--plot sounds/a.wav cannot be written"),
        (["sounds", "--jsonl", "sounds/a.wav/tags"], "--jsonl sounds/a.wav/tags cannot be written"),
        (["sounds", "--top_k", "0"], "--top_k 0 is not allowed"),
        (["sounds", "--csv", "a", "--jsonl", "./a"], "Two outputs have the same name"),
        (["sounds", "other", "--audacity", "labels"], "sounds/a.wav and other/a.wav would both write a.wav"),
        (["sounds", "--fl_threshold", "0.1,0.2", "--jsonl", "a"], "thresholds has 2 values"),
        (["sounds", "--fl_interpolation", "0", "--jsonl", "a"], "interpolation = 0 is not allowed"),
        (["sounds", "--window_overlap", "1"], "window_overlap = '1' is not allowed"),
    ],
)
def test_mistakes(
    words: list[str], said: str, checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("other").mkdir()
    soundfile.write("other/a.wav", np.zeros(800), 8000)
    assert predict(checkpoint, *words) == 2
    assert said in capsys.readouterr().err


def test_settings_stand_in_for_the_calibrated_thresholds(checkpoint: Path, folder: Path) -> None:
    assert predict(checkpoint, "sounds/a.wav", "--events", "a.tsv", "--fl_threshold", "0.999") == 0
    assert Path("a.tsv").read_text() == "filename\tonset\toffset\tevent_label\n"
    assert predict(checkpoint, "sounds/a.wav", "--events", "a.tsv", "--fl_threshold", "0.0001") == 0
    assert Path("a.tsv").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", None), ("mp3", None), ("ogg", None)]
)
def test_damaged_files_are_errors_of_theirs_alone(
    suffix: str, subtype: str | None, checkpoint: Path, tmp_path: Path
) -> None:
    """Cut off anywhere, or with random bytes changed: a result or a ValueError for that file, never a crash."""
    rng = np.random.default_rng(0)
    whole = tmp_path / f"whole.{suffix}"
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
        (tmp_path / f"{number:04d}.{suffix}").write_bytes(data)
    assert predict(checkpoint, str(tmp_path), "--jsonl", str(tmp_path / "tags.jsonl"), "--top_k", "1") == 1
    lines = [json.loads(line) for line in (tmp_path / "tags.jsonl").read_text().splitlines()]
    assert lines[-1]["file"] == str(whole)
    assert len(lines) <= len(damaged)
    assert all(np.isfinite(line["tags"][0]["score"]) for line in lines)
