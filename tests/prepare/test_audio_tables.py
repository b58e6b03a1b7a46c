"""Audio in HDF5 files of mp3 and in data sets of Hugging Face; parts, several at once and after an interruption."""

import io
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile

import prepare.audioset_strong as adapter
from data.clip_store import ClipStoreWriter
from prepare import packing
from prepare.audio_tables import index_rows
from prepare.audioset_strong import COLUMNS, parts_folder
from tests.prepare.raw_data import BARK, RATE, SPEECH, events, names, prepare, refused, write_sound, write_text

IDS = [f"-_{n:09d}" for n in range(7)]


def encoded(number: int) -> bytes:
    """An mp3 of 10 s of one tone, of a height of its own."""
    tone = 0.3 * np.sin(2 * np.pi * (200 + 100 * number) * np.arange(10 * RATE) / RATE)
    file = io.BytesIO()
    soundfile.write(file, tone, RATE, format="MP3")
    return file.getvalue()


def write_hdf5(path: Path, ids: list[str]) -> None:
    with h5py.File(path, "w") as file:
        file["audio_name"] = np.array([f"Y{ytid}.mp3".encode() for ytid in ids])
        file.create_dataset("mp3", (len(ids),), h5py.vlen_dtype(np.uint8))
        file["mp3"][:] = [np.frombuffer(encoded(IDS.index(ytid)), np.uint8) for ytid in ids]
        file["target"] = np.zeros((len(ids), 66), np.uint8)


def write_tables(folder: Path) -> dict[str, Any]:
    head = "\t".join(COLUMNS) + "\n"
    lines = [f"{ytid}_30000\t{n}\t{n + 1}\t{(SPEECH, BARK)[n % 2]}\n" for n, ytid in enumerate(IDS)]
    strong = write_text(folder / "train.tsv", head + "".join(lines[:5]))
    return {"strong": str(strong), "table": write_text(folder / "eval.tsv", head + "".join(lines[5:]))}


def contents(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return {key: file[key][:].tolist() for key in file}


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two HDF5 files with seven clips, one of them damaged, to pack in four parts."""
    monkeypatch.setattr(adapter, "CLIPS_PER_PART", 2)
    (tmp_path / "raw").mkdir()
    write_hdf5(tmp_path / "raw" / "balanced_train_segments_mp3.hdf", IDS[:3])
    write_hdf5(tmp_path / "raw" / "unbalanced_train_segments_mp3.hdf", IDS[3:])
    with h5py.File(tmp_path / "raw" / "unbalanced_train_segments_mp3.hdf", "r+") as file:
        file["mp3"][1] = np.zeros(1000, np.uint8)
    return {"raw": tmp_path / "raw", **write_tables(tmp_path)}


def test_mp3_in_hdf5_is_packed_as_files_are(tmp_path: Path, flags: dict[str, Any]) -> None:
    """As the same mp3 in files, whether in one process or in two."""
    report, table = prepare("audioset-strong", tmp_path, **flags)
    assert sorted(names(table)) == sorted(f"Y{ytid}.wav" for ytid in IDS if ytid != IDS[4])
    assert [name.rpartition("::")[2] for name, _ in report.skipped] == [f"Y{IDS[4]}"]
    assert not parts_folder(report.path).exists()
    for n, ytid in enumerate(IDS):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"Y{ytid}.mp3").write_bytes(encoded(n) if n != 4 else b"\0" * 1000)
    changes: list[dict[str, Any]] = [{"raw": tmp_path / "files"}, {"processes": 2}]
    for number, changed in enumerate(changes):
        other, _ = prepare("audioset-strong", tmp_path / str(number), **{**flags, **changed})
        assert contents(other.path) == contents(report.path)
        assert (other.clips, other.per_split, other.events) == (report.clips, report.per_split, report.events)


def test_an_interrupted_run_goes_on(tmp_path: Path, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = prepare("audioset-strong", tmp_path / "whole", **flags)
    calls: list[Path] = []
    pack = packing.pack_part

    def counted(part: Any, advance: Any = lambda clips: None) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(part.path)
        return pack(part, advance)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack_part", counted)
        with pytest.raises(KeyboardInterrupt):
            prepare("audioset-strong", tmp_path, **flags)
    store = tmp_path / "data" / "audioset-strong.h5"
    assert not store.exists()
    assert sorted(parts_folder(store).glob("*.h5")) == sorted(calls)
    calls[1].write_bytes(calls[1].read_bytes()[:1000])  # cut off: packed anew
    with monkeypatch.context() as patch:  # ended while the store is written
        patch.setattr(ClipStoreWriter, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare("audioset-strong", tmp_path, **flags)
    report, _ = prepare("audioset-strong", tmp_path, **flags)
    assert report.kept >= 1
    assert contents(report.path) == contents(whole.path)
    assert not parts_folder(store).exists()


def test_parts_of_other_sounds_do_not_count(tmp_path: Path, flags: dict[str, Any]) -> None:
    """What an interrupted run has left is of these files: another rate, and a file that was written anew, count."""
    segments = [one.segment for one in adapter.read_strong(Path(flags["strong"]))]
    sources = [dict(index_rows(flags["raw"]))[f"Y{segment.ytid}"] for segment in segments]
    first, other = (adapter._parts(tmp_path / "s.h5", rate, segments, sources) for rate in (RATE, 2 * RATE))
    write_hdf5(flags["raw"] / "balanced_train_segments_mp3.hdf", IDS[:3])
    again = adapter._parts(tmp_path / "s.h5", RATE, segments, sources)
    changed = [a.path != b.path for a, b in zip(first, again, strict=True)]
    assert changed == [True, True, False]
    assert not {part.path for part in first} & {part.path for part in other}


@pytest.mark.parametrize("content", ["nothing", "numbers", "cut", "text"])
def test_hdf5_files_of_something_else_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "some_mp3.hdf"
    write_hdf5(path, IDS[:2])
    if content in ("cut", "text"):
        path.write_bytes(path.read_bytes()[:600] if content == "cut" else b"text")
    else:
        with h5py.File(path, "r+") as file:
            del file["mp3"]
            if content == "numbers":
                file["mp3"] = np.zeros((2, 5))
    refused("some_mp3.hdf", "audioset-strong", tmp_path, raw=path, **write_tables(tmp_path))


def test_a_data_set_of_hugging_face_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "raw" / "state.json", "{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("pip install datasets", "audioset-strong", tmp_path, raw=tmp_path / "raw", **write_tables(tmp_path))


@pytest.mark.parametrize("named_by", ["path", "filename"])
def test_a_data_set_of_hugging_face(tmp_path: Path, named_by: str, flags: dict[str, Any]) -> None:
    """With the official tables, and with events of its own; as the same sounds in HDF5."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    expected, table = prepare("audioset-strong", tmp_path, **flags)
    sounds = [encoded(n) if n != 4 else b"\0" * 1000 for n in range(7)]
    paths = [f"Y{ytid}.mp3" if named_by == "path" else None for ytid in IDS]
    listed = [[{"onset": n, "offset": n + 1.0, "event_label": (SPEECH, BARK)[n % 2]}] for n in range(7)]
    rows = {
        "audio": [{"bytes": sound, "path": path} for sound, path in zip(sounds, paths, strict=True)],
        "filename": [f"{ytid}_30000.mp3" for ytid in IDS],
        "events": listed,
    }
    table_of_rows = datasets.table.InMemoryTable(pyarrow.Table.from_pydict(rows))
    made = datasets.Dataset(table_of_rows, fingerprint="rows").cast_column("audio", datasets.Audio())
    made.save_to_disk(str(tmp_path / "hf" / "train"))
    report, _ = prepare("audioset-strong", tmp_path / "a", **{**flags, "raw": tmp_path / "hf"})
    assert contents(report.path) == contents(expected.path)
    own: dict[str, Any] = {"raw": tmp_path / "hf", "strong": str(tmp_path / "hf" / "train")}
    report, found = prepare("audioset-strong", tmp_path / "b", **own)
    assert dict(zip(names(found), events(found), strict=True)) == dict(zip(names(table), events(table), strict=True))


def test_other_folders_hold_no_tables(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav")
    assert list(index_rows(tmp_path)) == []
