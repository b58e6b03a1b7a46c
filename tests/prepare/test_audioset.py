"""AudioSet from a table of segments and a folder of audio to packed parts, and from those to indexes."""

import csv
import os
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

from data.clip_store import read_index_table, read_store_table
from prepare import audioset, audioset_index
from prepare.audioset import read_segments
from prepare.compress import compress_store
from prepare.segments import LABELS, AudiosetReport, Segment, find_audio, find_start, index_audio
from settings import UserError, resolve
from tests.helpers import ROOT, call, refused
from tests.prepare.raw_data import RATE, SPEECH, write_sound, write_text

NAMES = ("{0}", "Y{0}", "{0}_30", "Y{0}_30", "{0}_30.000", "Y{0}_30.000", "{0}_30000", "Y{0}_30000")
MUSIC, MAN = "/m/04rlf", "/m/05zppz"
Capture = pytest.CaptureFixture[str]


def write_segments(path: Path, ids: list[str], start: str = "30.000", mids: str = f"{SPEECH},{MUSIC}") -> Path:
    head = '# Segments csv created "today\n# YTID, start_seconds, end_seconds, positive_labels\n'
    return write_text(path, head + "".join(f'{ytid}, {start}, 40.000, "{mids}"\n' for ytid in ids))


def pack(folder: Path, raw: Path, segments: Path, rate: int = RATE, processes: int = 1) -> AudiosetReport:
    settings = resolve({"dataset_type": "audioset", "dataset_path": str(folder), "sample_rate": rate})
    return audioset.prepare(settings, raw, segments, processes)


@pytest.fixture(autouse=True)
def five_clips_per_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audioset, "CLIPS_PER_PART", 5)


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/: ten clips and a text file, unbalanced_train.csv: those and two missing ones; packed/: 3 parts of 5, 5, 2.

    Rows 0 to 7 have every form of name; 8 is a text file, 9 missing, 10 of 0.5 s, 11 missing.
    """
    folder = tmp_path_factory.mktemp("audioset")
    ids = [f"_-{'ab'[row % 2]}_30_{row:04d}" for row in range(12)]
    for row, form in enumerate(NAMES):
        suffix = (".wav", ".flac", ".ogg", ".MP3")[row % 4]
        write_sound(folder / "raw" / str(row % 3) / (form.format(ids[row]) + suffix), seconds=9.2)
    write_text(folder / "raw" / f"{ids[8]}.mp3", "this is no sound")
    write_sound(folder / "raw" / f"{ids[10]}.wav", seconds=0.5)
    write_segments(folder / "unbalanced_train_segments.csv", ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audioset, "CLIPS_PER_PART", 5)
        pack(folder / "packed", folder / "raw", folder / "unbalanced_train_segments.csv")
    return folder


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    """A copy of the packed data set, to damage."""
    return shutil.copytree(packed_once / "packed", tmp_path / "packed")


def again(folder: Path, dataset_path: Path, processes: int = 1, rate: int = RATE) -> AudiosetReport:
    return pack(dataset_path, folder / "raw", folder / "unbalanced_train_segments.csv", rate, processes)


def part(dataset_path: Path, number: int) -> Path:
    return dataset_path / "hdf5s" / "waveforms" / "unbalanced_train" / f"unbalanced_train_part{number:02d}.h5"


def test_parts_are_panns_layout(packed_once: Path) -> None:
    tables = [read_store_table(part(packed_once / "packed", number)) for number in range(3)]
    assert [len(table) for table in tables] == [5, 3, 1]
    assert tables[0].names[0] == b"Y_-a_30_0000.wav"
    with h5py.File(part(packed_once / "packed", 0)) as file:
        assert (file["waveform"].shape, file["waveform"].dtype) == ((5, 10 * RATE), np.int16)
        assert (file["target"].shape, file["target"].dtype) == ((5, 527), bool)
        assert np.flatnonzero(file["target"][0]).tolist() == [LABELS.index("Speech"), LABELS.index("Music")]
        sound = soundfile.read(packed_once / "raw" / "0" / "_-a_30_0000.wav")[0]
        assert file["real_len"][0] == len(sound) == int(9.2 * RATE)
        np.testing.assert_allclose(file["waveform"][0, : len(sound)] / 32767, sound, atol=1e-4)
        assert not file["waveform"][0, len(sound) :].any()


def test_report_names_missing_corrupt_and_short_clips(packed_once: Path, packed: Path) -> None:
    shutil.rmtree(packed / "hdf5s")
    report = again(packed_once, packed)
    assert (report.clips, report.kept) == (9, 0)
    assert report.missing == ["Y_-b_30_0009.wav", "Y_-b_30_0011.wav"]
    assert [Path(name).name for name, _ in report.skipped] == ["_-a_30_0008.mp3"]
    assert report.short == [("Y_-a_30_0010.wav", 0.5)]
    assert "9 clips of 12 segments" in str(report)
    assert "found 10, missing 2, corrupt 1, short (under 9 s, packed) 1" in str(report)
    with (packed / "hdf5s" / "reports" / "unbalanced_train.csv").open(newline="") as file:
        states = [row["state"] for row in csv.DictReader(file)]
    assert states == ["missing", "missing", "corrupt", "short"]


def test_finished_parts_are_kept(packed_once: Path, packed: Path, capsys: Capture) -> None:
    """A part that a crash left as .partial, and one that is cut off, are packed again; the others are not touched."""
    part(packed, 1).rename(f"{part(packed, 1)}.partial")
    content = part(packed, 2).read_bytes()
    part(packed, 2).write_bytes(content[: len(content) // 2])
    os.utime(part(packed, 0), ns=(10**18, 10**18))
    report = again(packed_once, packed)
    assert (report.clips, report.kept, len(report.missing), len(report.skipped)) == (9, 1, 2, 1)
    assert part(packed, 0).stat().st_mtime_ns == 10**18
    for number in (1, 2):
        assert part(packed, number).read_bytes() == part(packed_once / "packed", number).read_bytes()
    assert not list(packed.rglob("*.partial"))
    first, second = capsys.readouterr().err.splitlines()  # of these parts alone
    assert first.startswith("unbalanced_train_part01.h5 (2 of 3): found 4, missing 1, corrupt 1")
    assert second.startswith("unbalanced_train_part02.h5 (3 of 3): found 1, missing 1")


def test_two_processes_write_what_one_does(
    packed_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    assert again(packed_once, tmp_path, processes=2).clips == 9
    printed = capsys.readouterr().err
    assert "100%" in printed
    for number in range(3):
        assert part(tmp_path, number).read_bytes() == part(packed_once / "packed", number).read_bytes()
        assert f"({number + 1} of 3): found" in printed


@pytest.mark.parametrize(
    ("start", "end", "stem", "seconds", "expected"),
    [
        (30, 40, "abc", 11.0, 0),  # the segment by itself
        (30, 40, "abc", 120.0, 30),  # the whole video
        (30, 40, "Yabc", 39.5, 30),  # a whole video that ends a little early
        (30, 40, "abc", 38.9, 0),  # too short for the whole video
        (30, 40, "abc_30", 120.0, 0),
        (30, 40, "Yabc_30.000", 120.0, 0),
        (1, 11, "abc", 11.0, 0),  # either: the difference is a second
        (30, 30.5, "abc", 29.8, 0),  # ends before the segment begins
    ],
)
def test_where_a_segment_begins(start: float, end: float, stem: str, seconds: float, expected: float) -> None:
    assert find_start(Segment("abc", start, end, (0,)), stem, seconds) == expected


def test_segments_are_cut_out_of_longer_files(tmp_path: Path, capsys: Capture) -> None:
    """In the n-th second of each file the samples are n thousandths."""
    table = write_segments(tmp_path / "eval.csv", ["whole_video", "from_start", "longer_than", "like_others"])
    table.write_text(table.read_text() + f'short_video, 2.000, 8.000, "{MUSIC}"\n')
    files = {"whole_video": 50, "Yfrom_start_30.000": 50, "longer_than": 15, "Ylike_others": 10, "short_video": 8}
    for name, length in files.items():
        (tmp_path / "raw").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "raw" / f"{name}.wav", np.repeat(np.arange(length) / 1000, RATE), RATE)
    report = pack(tmp_path, tmp_path / "raw", table)
    with h5py.File(report.path) as file:
        steps = np.rint(file["waveform"][:, RATE // 2 :: RATE] / 32.767).astype(int)
        assert file["real_len"][:].tolist() == [10 * RATE] * 4 + [6 * RATE]
    assert steps.tolist() == [list(range(30, 40)), *[list(range(10))] * 3, [2, 3, 4, 5, 6, 7, 0, 0, 0, 0]]
    expected = ["30 to 40 s of 50.00 s", "0 to 10 s of 50.00 s", "0 to 10 s of 15.00 s", "2 to 8 s of 8.00 s"]
    names = ["Ywhole_video.wav", "Yfrom_start.wav", "Ylonger_than.wav", "Yshort_video.wav"]
    assert report.cut == list(zip(names, expected, strict=True))
    assert "cut from a longer file 4; 0 whole files" in str(report)
    assert ",cut,30 to 40 s of 50.00 s\n" in (tmp_path / "hdf5s" / "reports" / "eval.csv").read_text()
    capsys.readouterr()
    once_more = pack(tmp_path, tmp_path / "raw", table)
    assert (once_more.kept, once_more.cut, capsys.readouterr().err) == (1, report.cut, "")  # nothing was packed


def test_a_part_without_clips_waits_for_its_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audioset, "CLIPS_PER_PART", 1)
    ids = ["aaaaaaaaaaa", "bbbbbbbbbbb"]
    table = write_segments(tmp_path / "unbalanced_train.csv", ids)
    write_sound(tmp_path / "raw" / "aaaaaaaaaaa.wav")
    report = pack(tmp_path, tmp_path / "raw", table)
    assert (report.clips, report.missing, part(tmp_path, 1).exists()) == (1, ["Ybbbbbbbbbbb.wav"], False)
    write_sound(tmp_path / "raw" / "bbbbbbbbbbb.wav")
    report = pack(tmp_path, tmp_path / "raw", table)
    assert (report.clips, report.missing, report.kept) == (2, [], 1)


def test_compressed_parts_and_panns_are_kept(packed_once: Path, packed: Path) -> None:
    compress_store(part(packed, 0))
    with h5py.File(part(packed, 1), "r+") as file:
        for key in file.keys() - {"audio_name", "waveform", "target"}:
            del file[key]
        for key in list(file.attrs):
            del file.attrs[key]
    content = [part(packed, number).read_bytes() for number in (0, 1)]
    assert again(packed_once, packed).kept == 3
    assert [part(packed, number).read_bytes() for number in (0, 1)] == content


def test_parts_of_another_table_or_size_are_refused(
    packed_once: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"5 clips of 80000 samples .* at 16000 Hz"):
        again(packed_once, packed, rate=16000)
    monkeypatch.setattr(audioset, "CLIPS_PER_PART", 6)
    with pytest.raises(UserError, match=r"part02.h5 is not one of the 2 parts"):
        again(packed_once, packed)
    part(packed, 2).unlink()
    with pytest.raises(UserError, match=r"part00.h5 exists and holds 5 clips"):
        again(packed_once, packed)
    write_text(tmp_path / "new" / "hdf5s", "a file where the folder should be")
    with pytest.raises(UserError, match="hdf5s"):
        again(packed_once, tmp_path / "new")


def test_clips_are_found_by_their_whole_name(tmp_path: Path) -> None:
    """An id may look like another one with Y before it or a start after it; the first path counts."""
    for name in ("b/abcdefghij_.wav", "a/abcdefghij_.flac", "Yabcdefghij.wav", "k_30_bcdefg_12.5.ogg", "notes.txt"):
        write_text(tmp_path / name, "")
    audio = index_audio(tmp_path)
    assert audio["abcdefghij_"] == str(tmp_path / "a" / "abcdefghij_.flac")
    assert "notes" not in audio
    table = write_segments(tmp_path / "eval.csv", ["abcdefghij_", "Yabcdefghij", "k_30_bcdefg", "abcdefghij-"], "12.5")
    found = [find_audio(segment, audio) for segment in read_segments(table)]
    expected = ["abcdefghij_.flac", "Yabcdefghij.wav", "k_30_bcdefg_12.5.ogg", None]
    assert [path and Path(path).name for path in found] == expected


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (f'abc, 10.000, 10.000, "{SPEECH}"', "line 4: 'abc' .* '10.000', end '10.000'"),
        (f'abc, 0.000, later, "{SPEECH}"', "line 4: 'abc' .* 'later'"),
        (f'abc, 0.000, 10.000, "{SPEECH},/m/nothing"', "line 4: class '/m/nothing'"),
        ("abc, 0.000, 10.000", "line 4: 3 columns"),
        (f'abc, soon, 10.000, "{SPEECH}"', "line 4: 'abc' .* 'soon'"),
        (f'abc, nan, 10.000, "{SPEECH}"', "line 4: 'abc' .* 'nan'"),
        (f'aaaaaaaaaaa, 0.000, 10.000, "{SPEECH}"', "line 4: aaaaaaaaaaa"),
        (f'abc, 0.000, 10.000, "{SPEECH}', "line 4: unexpected end"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, match: str) -> None:
    table = write_segments(tmp_path / "eval.csv", ["aaaaaaaaaaa"])
    with pytest.raises(UserError, match=match):
        read_segments(write_text(table, f"{table.read_text()}{line}\n"))


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    table = write_segments(tmp_path / "eval_segments.csv", ["aaaaaaaaaaa"])
    (tmp_path / "eval_bytes.csv").write_bytes(b"\xff\xfe\xff")
    write_text(tmp_path / "eval_none.csv", "# nothing\n\n")
    for raw, segments, match in (
        (tmp_path, write_segments(tmp_path / "segments.csv", ["aaaaaaaaaaa"]), r"eval\*\.csv"),
        (tmp_path, tmp_path / "eval_gone.csv", r"eval_gone.csv"),
        (tmp_path, tmp_path / "eval_bytes.csv", r"eval_bytes\.csv"),
        (tmp_path, tmp_path / "eval_none.csv", "lists no segments"),
        (tmp_path / "none", table, "There is no folder"),
        (tmp_path, table, r"None of the 1 clips .* Yaaaaaaaaaaa_30.flac"),
    ):
        with pytest.raises(UserError, match=match):
            pack(tmp_path, raw, segments)
    write_text(tmp_path / "aaaaaaaaaaa.wav", "this is no sound")
    with pytest.raises(UserError, match=r"(.|\n)*corrupt"):
        pack(tmp_path, tmp_path, table)


def add_split(dataset_path: Path, split: str, ytid: str, mids: str, rate: int = RATE) -> None:
    """Pack a split of one clip."""
    raw = dataset_path / "raw"
    write_sound(raw / f"{ytid}.wav")
    report = pack(dataset_path, raw, write_segments(raw / f"{split}.csv", [ytid], mids=mids), rate)
    assert report.path == dataset_path / "hdf5s" / "waveforms" / f"{split}.h5"


def test_indexes_find_their_clips_after_a_move(packed: Path, tmp_path: Path, capsys: Capture) -> None:
    add_split(packed, "balanced_train", "balanced_id", MAN)
    add_split(packed, "eval", "evaluate_id", MUSIC)
    part(packed, 7).with_suffix(".h5.partial").touch()
    capsys.readouterr()
    call("create_index", "--dataset_path", packed, "--processes", "2")
    printed = capsys.readouterr()
    counts = dict(line.split("/")[-1].split(": ") for line in printed.out.splitlines())
    assert counts == {
        "balanced_train.h5": "1 clips", "unbalanced_train.h5": "9 clips", "full_train.h5": "10 clips",
        "eval.h5": "1 clips",
    }  # fmt: skip
    assert "part07.h5.partial" in printed.err
    moved = packed.rename(tmp_path / "moved")
    assert not list((moved / "hdf5s" / "indexes").glob("*.partial"))
    table = read_index_table(moved / "hdf5s" / "indexes" / "full_train.h5", moved)
    assert (table.names[0], table.task, table.sample_rate) == (b"Ybalanced_id.wav", "multilabel", RATE)
    assert table.row.tolist() == [0, 0, 1, 2, 3, 4, 0, 1, 2, 0]
    assert np.flatnonzero(table.targets[0]).tolist() == [LABELS.index("Male speech, man speaking")]
    for name, target, number, row in zip(table.names, table.targets, table.path_number, table.row, strict=True):
        with h5py.File(table.paths[number]) as file:
            assert file["audio_name"][row] == name
            assert np.array_equal(file["target"][row], target)
    evaluation = read_index_table(moved / "hdf5s" / "indexes" / "eval.h5", moved)
    assert evaluation.names.tolist() == [b"Yevaluate_id.wav"]


def test_index_columns_are_those_of_panns(packed: Path) -> None:
    """Parts are taken by their numbers."""
    part(packed, 0).rename(part(packed, 100))
    audioset_index.create_indexes(packed, processes=1)
    indexes = packed / "hdf5s" / "indexes"
    assert sorted(path.name for path in indexes.iterdir()) == ["full_train.h5", "unbalanced_train.h5"]
    with h5py.File(indexes / "full_train.h5") as file:
        kinds = {key: file[key].dtype.kind for key in file}
        assert kinds == {"audio_name": "S", "target": "b", "hdf5_path": "S", "index_in_hdf5": "i"}
        assert file["index_in_hdf5"].dtype == np.int32
        folder = b"hdf5s/waveforms/unbalanced_train/unbalanced_train_part"
        assert [path.removeprefix(folder) for path in file["hdf5_path"][::4]] == [b"01.h5", b"100.h5", b"100.h5"]


def test_index_errors_are_told(packed: Path, capsys: Capture) -> None:
    def error_of() -> str:
        return refused(capsys, "create_index", "--dataset_path", packed, "--processes", "1")

    def set_targets(rows: int, classes: int) -> None:
        with h5py.File(packed / "hdf5s" / "waveforms" / "eval.h5", "r+") as file:
            del file["target"]
            file["target"] = np.zeros((rows, classes), dtype=bool)

    add_split(packed, "eval", "evaluate_id", MUSIC, rate=2 * RATE)
    assert "sample_rate = 16000" in error_of()
    set_targets(1, 10)
    assert "classes = 10" in error_of()
    set_targets(3, 527)
    assert "eval.h5" in error_of()
    (packed / "hdf5s" / "waveforms" / "eval.h5").unlink()
    content = part(packed, 1).read_bytes()
    part(packed, 1).write_bytes(content[: len(content) // 2])
    assert "part01.h5" in error_of()
    shutil.rmtree(part(packed, 1).parent)
    assert "neither balanced_train.h5 nor unbalanced_train" in error_of()
    assert not (packed / "hdf5s" / "indexes").exists()


def test_an_old_index_survives_an_error(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audioset_index.create_indexes(packed, processes=1)
    index = packed / "hdf5s" / "indexes" / "full_train.h5"
    content = index.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(audioset_index, "append", fail)
    with pytest.raises(OSError, match="disk full"):
        audioset_index.create_indexes(packed, processes=1)
    assert index.read_bytes() == content
    assert not list(index.parent.glob("*.partial"))


@pytest.mark.parametrize(
    ("python", "words", "status", "printed"),
    [
        ("echo", ["a folder", "2"], 0, f"{ROOT}/main.py create_index --dataset_path=a folder --processes=2\n"),
        ("false", ["a folder"], 1, ""),  # an error of the command is one of the script
        ("echo", [], 2, ""),
    ],
)
def test_script(python: str, words: list[str], status: int, printed: str) -> None:
    command = [str(ROOT / "create_index.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": python})
    assert (done.returncode, done.stdout) == (status, printed)
