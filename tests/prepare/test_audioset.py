"""AudioSet from a table of segments and a folder of audio to packed parts, and from those to indexes."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

import main
from data.clip_store import read_index_table, read_store_table
from prepare import audioset_index
from prepare.audioset import LABELS, Segment, find_audio, find_start, index_audio, prepare_audioset, read_segments
from prepare.compress import compress_store
from tests.helpers import ROOT

RATE = 8000
NAMES = ("{0}", "Y{0}", "{0}_30", "Y{0}_30", "{0}_30.000", "Y{0}_30.000", "{0}_30000", "Y{0}_30000")
SPEECH, MUSIC, MAN = "/m/09x0r", "/m/04rlf", "/m/05zppz"


def write_segments(path: Path, ids: list[str], start: str = "30.000", mids: str = f"{SPEECH},{MUSIC}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'{ytid}, {start}, 40.000, "{mids}"\n' for ytid in ids]
    head = '# Segments csv created "today\n# YTID, start_seconds, end_seconds, positive_labels\n'
    path.write_text(head + "".join(lines))
    return path


def write_clip(path: Path, seconds: float = 9.2, seed: int = 0, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate))
    soundfile.write(path, sound, rate)


@pytest.fixture(scope="module")
def audioset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/: ten clips and a text file, unbalanced_train.csv: those and two missing ones; packed/: 3 parts of 5, 5, 2.

    Rows 0 to 7 have every form of name; 8 is a text file, 9 missing, 10 of 0.5 s, 11 missing.
    """
    folder = tmp_path_factory.mktemp("audioset")
    ids = [f"_-{'ab'[row % 2]}_30_{row:04d}" for row in range(12)]
    for row, form in enumerate(NAMES):
        suffix = (".wav", ".flac", ".ogg", ".MP3")[row % 4]
        write_clip(folder / "raw" / str(row % 3) / (form.format(ids[row]) + suffix), seed=row)
    (folder / "raw" / f"{ids[8]}.mp3").write_text("this is no sound")
    write_clip(folder / "raw" / f"{ids[10]}.wav", seconds=0.5)
    write_segments(folder / "unbalanced_train_segments.csv", ids)
    prepare_audioset(
        folder / "raw", folder / "unbalanced_train_segments.csv", folder / "packed", RATE, 1, clips_per_part=5
    )
    return folder


@pytest.fixture
def packed(audioset: Path, tmp_path: Path) -> Path:
    """A copy of the packed dataset, to spoil."""
    return shutil.copytree(audioset / "packed", tmp_path / "packed")


def again(audioset: Path, dataset_path: Path, processes: int = 1, clips_per_part: int = 5, rate: int = RATE) -> str:
    table = audioset / "unbalanced_train_segments.csv"
    return str(prepare_audioset(audioset / "raw", table, dataset_path, rate, processes, clips_per_part))


def part(dataset_path: Path, number: int) -> Path:
    return dataset_path / "hdf5s" / "waveforms" / "unbalanced_train" / f"unbalanced_train_part{number:02d}.h5"


def test_parts_are_panns_layout(audioset: Path) -> None:
    tables = [read_store_table(part(audioset / "packed", number)) for number in range(3)]
    assert [len(table) for table in tables] == [5, 3, 1]
    assert tables[0].names[0] == b"Y_-a_30_0000.wav"
    assert (tables[0].labels, tables[0].sample_rate) == (LABELS, RATE)
    assert tables[0].attributes["dataset_type"] == "audioset"
    with h5py.File(part(audioset / "packed", 0)) as file:
        assert (file["waveform"].shape, file["waveform"].dtype) == ((5, 10 * RATE), np.int16)
        assert (file["target"].shape, file["target"].dtype) == ((5, 527), bool)
        assert np.flatnonzero(file["target"][0]).tolist() == [LABELS.index("Speech"), LABELS.index("Music")]
        assert file["real_len"][0] == int(9.2 * RATE)
        sound = np.random.default_rng(0).uniform(-0.5, 0.5, int(9.2 * RATE))
        np.testing.assert_allclose(file["waveform"][0, : len(sound)] / 32767, sound, atol=1e-4)
        assert not file["waveform"][0, len(sound) :].any()


def test_report_names_missing_corrupt_and_short_clips(audioset: Path, packed: Path) -> None:
    shutil.rmtree(packed / "hdf5s")
    table = audioset / "unbalanced_train_segments.csv"
    report = prepare_audioset(audioset / "raw", table, packed, RATE, 1, clips_per_part=5)
    assert (report.clips, report.kept) == (9, 0)
    assert report.missing == ["Y_-b_30_0009.wav", "Y_-b_30_0011.wav"]
    assert [Path(name).name for name, _ in report.skipped] == ["_-a_30_0008.mp3"]
    assert report.short == [("Y_-a_30_0010.wav", 0.5)]
    text = str(report)
    assert "9 clips of 12 segments" in text
    assert "found 10, missing 2, corrupt 1, short (under 9 s, packed) 1" in text
    with (packed / "hdf5s" / "reports" / "unbalanced_train.csv").open(newline="") as file:
        states = [row["state"] for row in csv.DictReader(file)]
    assert states == ["missing", "missing", "corrupt", "short"]


def test_whole_parts_are_kept_and_counted(audioset: Path, packed: Path) -> None:
    whole = [part(packed, 0), part(packed, 2)]
    for path in whole:
        os.utime(path, ns=(10**18, 10**18))
    part(packed, 1).rename(f"{part(packed, 1)}.partial")  # what a crash leaves
    with h5py.File(f"{part(packed, 1)}.partial", "r+") as file:
        del file["target"]
    text = again(audioset, packed)
    assert "9 clips of 12 segments" in text
    assert (
        "found 10, missing 2, corrupt 1, short (under 9 s, packed) 1, cut from a longer file 0; 2 whole files" in text
    )
    assert [path.stat().st_mtime_ns for path in whole] == [10**18, 10**18]
    assert part(packed, 1).read_bytes() == part(audioset / "packed", 1).read_bytes()
    assert not list(packed.rglob("*.partial"))


def test_a_part_cut_off_is_packed_again(audioset: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = part(packed, 1).read_bytes()
    part(packed, 1).write_bytes(content[: len(content) // 2])
    assert "2 whole files kept" in again(audioset, packed)
    said = capsys.readouterr().err  # of that part alone
    assert said.startswith("unbalanced_train_part01.h5 (3 of 3): found 4, missing 1, corrupt 1")
    assert said.count("\n") == 1
    assert part(packed, 1).read_bytes() == content


def test_two_processes_write_what_one_does(
    audioset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    assert "9 clips of 12 segments" in again(audioset, tmp_path, processes=2)
    said = capsys.readouterr().err
    assert "100%" in said
    for number in range(3):
        assert part(tmp_path, number).read_bytes() == part(audioset / "packed", number).read_bytes()
        assert f"({number + 1} of 3): found" in said


def test_where_a_segment_begins() -> None:
    def found(start: float, end: float, stem: str, seconds: float) -> float:
        return find_start(Segment("abc", start, end, (0,)), stem, seconds)

    assert found(30, 40, "abc", 11.0) == 0  # the segment by itself
    assert found(30, 40, "abc", 120.0) == 30  # the whole video
    assert found(30, 40, "Yabc", 39.5) == 30  # a whole video that ends a little early
    assert found(30, 40, "abc", 38.9) == 0  # too short for the whole video
    assert found(30, 40, "abc_30", 120.0) == found(30, 40, "Yabc_30.000", 120.0) == 0
    assert found(1, 11, "abc", 11.0) == 0  # either, but for a second the same
    assert found(30, 30.5, "abc", 29.8) == 0  # ends before the segment begins


def test_segments_are_cut_out_of_longer_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the n-th second of each file the samples are n thousandths."""
    table = write_segments(tmp_path / "eval.csv", ["whole_video", "from_start", "longer_than", "like_others"])
    table.write_text(table.read_text() + f'short_video, 2.000, 8.000, "{MUSIC}"\n')
    files = {"whole_video": 50, "Yfrom_start_30.000": 50, "longer_than": 15, "Ylike_others": 10, "short_video": 8}
    for name, length in files.items():
        (tmp_path / "raw").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "raw" / f"{name}.wav", np.repeat(np.arange(length) / 1000, RATE), RATE)
    report = prepare_audioset(tmp_path / "raw", table, tmp_path, RATE, 1)
    with h5py.File(report.path) as file:
        steps = np.rint(file["waveform"][:, RATE // 2 :: RATE] / 32.767).astype(int)
        assert file["real_len"][:].tolist() == [10 * RATE] * 4 + [6 * RATE]
    assert steps.tolist() == [list(range(30, 40)), *[list(range(10))] * 3, [2, 3, 4, 5, 6, 7, 0, 0, 0, 0]]
    expected = ["30 to 40 s of 50.00 s", "0 to 10 s of 50.00 s", "0 to 10 s of 15.00 s", "2 to 8 s of 8.00 s"]
    names = ["Ywhole_video.wav", "Yfrom_start.wav", "Ylonger_than.wav", "Yshort_video.wav"]
    assert report.cut == list(zip(names, expected, strict=True))
    assert "cut from a longer file 4; 0 whole files" in str(report)
    assert ",cut,30 to 40 s of 50.00 s\n" in (tmp_path / "hdf5s" / "reports" / "eval.csv").read_text()
    assert capsys.readouterr().err.startswith("eval.h5 (1 of 1): found 5, missing 0, corrupt 0")
    again = prepare_audioset(tmp_path / "raw", table, tmp_path, RATE, 1)
    assert (again.kept, again.cut, capsys.readouterr().err) == (1, report.cut, "")  # nothing was packed


def test_a_part_without_clips_waits_for_its_audio(tmp_path: Path) -> None:
    ids = ["aaaaaaaaaaa", "bbbbbbbbbbb"]
    table = write_segments(tmp_path / "unbalanced_train.csv", ids)
    write_clip(tmp_path / "raw" / "aaaaaaaaaaa.wav")
    report = prepare_audioset(tmp_path / "raw", table, tmp_path, RATE, 1, clips_per_part=1)
    assert (report.clips, report.missing, part(tmp_path, 1).exists()) == (1, ["Ybbbbbbbbbbb.wav"], False)
    write_clip(tmp_path / "raw" / "bbbbbbbbbbb.wav")
    report = prepare_audioset(tmp_path / "raw", table, tmp_path, RATE, 1, clips_per_part=1)
    assert (report.clips, report.missing, report.kept) == (2, [], 1)


def test_parts_are_kept_after_compress(audioset: Path, packed: Path) -> None:
    compress_store(part(packed, 0))
    content = part(packed, 0).read_bytes()
    assert "3 whole files kept" in again(audioset, packed)
    assert part(packed, 0).read_bytes() == content


def test_files_of_panns_are_kept_as_they_are(audioset: Path, packed: Path) -> None:
    with h5py.File(part(packed, 0), "r+") as file:
        for key in file.keys() - {"audio_name", "waveform", "target"}:
            del file[key]
        for key in list(file.attrs):
            del file.attrs[key]
    content = part(packed, 0).read_bytes()
    assert "3 whole files kept" in again(audioset, packed)
    assert part(packed, 0).read_bytes() == content


def test_parts_of_another_table_or_size_are_refused(audioset: Path, packed: Path) -> None:
    with pytest.raises(ValueError, match=r"part02.h5 is not one of the 2 parts that 6 clips"):
        again(audioset, packed, clips_per_part=6)
    part(packed, 2).unlink()
    with pytest.raises(ValueError, match=r"part00.h5 exists and holds 5 clips .* another clips_per_part"):
        again(audioset, packed, clips_per_part=6)
    with pytest.raises(ValueError, match=r"5 clips of 80000 samples .* at 16000 Hz"):
        again(audioset, packed, rate=16000)


def test_a_disk_that_cannot_be_written_is_no_traceback(audioset: Path, tmp_path: Path) -> None:
    (tmp_path / "hdf5s").touch()  # where the folder should be
    with pytest.raises(ValueError, match="hdf5s"):
        again(audioset, tmp_path)


def test_clips_are_found_by_their_whole_name(tmp_path: Path) -> None:
    """An id may look like another one with Y before it or a start after it; the first path counts."""
    for name in ("b/abcdefghij_.wav", "a/abcdefghij_.flac", "Yabcdefghij.wav", "k_30_bcdefg_12.5.ogg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    audio = index_audio(tmp_path)
    assert audio["abcdefghij_"] == str(tmp_path / "a" / "abcdefghij_.flac")
    assert "notes" not in audio
    table = write_segments(tmp_path / "eval.csv", ["abcdefghij_", "Yabcdefghij", "k_30_bcdefg", "abcdefghij-"], "12.5")
    found = [find_audio(segment, audio) for segment in read_segments(table)]
    assert [path and Path(path).name for path in found] == [
        "abcdefghij_.flac",
        "Yabcdefghij.wav",
        "k_30_bcdefg_12.5.ogg",
        None,
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'abc, 10.000, 10.000, "/m/09x0r"',
            "line 4: 'abc' with start '10.000', end '10.000'; an id and rising seconds",
        ),
        ('abc, 0.000, later, "/m/09x0r"', "line 4: 'abc' with start '0.000', end 'later'"),
        ('abc, 0.000, 10.000, "/m/09x0r,/m/nothing"', "line 4: class '/m/nothing' is not one of AudioSet's 527"),
        ("abc, 0.000, 10.000", "line 4: 3 columns; there must be 4"),
        ('abc, soon, 10.000, "/m/09x0r"', "line 4: 'abc' with start 'soon'"),
        ('abc, nan, 10.000, "/m/09x0r"', "line 4: 'abc' with start 'nan'"),
        ('aaaaaaaaaaa, 0.000, 10.000, "/m/09x0r"', "line 4: aaaaaaaaaaa is listed twice"),
        ('abc, 0.000, 10.000, "/m/09x0r', "line 4: unexpected end"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    table = write_segments(tmp_path / "eval.csv", ["aaaaaaaaaaa"])
    table.write_text(table.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_segments(table)


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    table = write_segments(tmp_path / "eval_segments.csv", ["aaaaaaaaaaa"])
    other = write_segments(tmp_path / "segments.csv", ["aaaaaaaaaaa"])
    with pytest.raises(ValueError, match=r"one of balanced_train\*\.csv, eval\*\.csv, unbalanced_train\*\.csv"):
        prepare_audioset(tmp_path, other, tmp_path, RATE, 1)
    with pytest.raises(ValueError, match=r"There is no .*eval_none.csv"):
        prepare_audioset(tmp_path, tmp_path / "eval_none.csv", tmp_path, RATE, 1)
    with pytest.raises(ValueError, match="There is no folder"):
        prepare_audioset(tmp_path / "none", table, tmp_path, RATE, 1)
    with pytest.raises(ValueError, match="clips_per_part = 0"):
        prepare_audioset(tmp_path, table, tmp_path, RATE, 1, clips_per_part=0)
    with pytest.raises(ValueError, match=r"None of the 1 clips .* which has 0 audio files"):
        prepare_audioset(tmp_path, table, tmp_path, RATE, 1)
    (tmp_path / "aaaaaaaaaaa.wav").write_text("this is no sound")
    with pytest.raises(ValueError, match=r"None of the clips could be read(.|\n)*corrupt"):
        prepare_audioset(tmp_path, table, tmp_path, RATE, 1)
    (tmp_path / "eval_bytes.csv").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "eval_none.csv").write_text("# nothing\n\n")
    with pytest.raises(ValueError, match="no text file"):
        read_segments(tmp_path / "eval_bytes.csv")
    with pytest.raises(ValueError, match="lists no segments"):
        read_segments(tmp_path / "eval_none.csv")


def add_split(dataset_path: Path, split: str, ytid: str, mids: str, rate: int = RATE) -> None:
    """Pack a split of one clip."""
    raw = dataset_path / "raw"
    write_clip(raw / f"{ytid}.wav", seconds=10)
    report = prepare_audioset(raw, write_segments(raw / f"{split}.csv", [ytid], mids=mids), dataset_path, rate, 1)
    assert report.path == dataset_path / "hdf5s" / "waveforms" / f"{split}.h5"


def run_script(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "create_index.sh"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})


def test_indexes_find_their_clips_after_a_move(packed: Path, tmp_path: Path) -> None:
    add_split(packed, "balanced_train", "balanced_id", MAN)
    add_split(packed, "eval", "evaluate_id", MUSIC)
    part(packed, 7).with_suffix(".h5.partial").touch()
    done = run_script(packed, "2")
    assert done.returncode == 0, done.stderr
    counts = {Path(line.split(": ")[0]).name: line.split(": ")[1] for line in done.stdout.splitlines()}
    assert counts == {
        "balanced_train.h5": "1 clips",
        "unbalanced_train.h5": "9 clips",
        "full_train.h5": "10 clips",
        "eval.h5": "1 clips",
    }
    assert "part07.h5.partial is unfinished" in done.stderr
    moved = packed.rename(tmp_path / "moved")
    assert not list((moved / "hdf5s" / "indexes").glob("*.partial"))
    table = read_index_table(moved / "hdf5s" / "indexes" / "full_train.h5", moved)
    assert table.names[0] == b"Ybalanced_id.wav"
    assert table.row.tolist() == [0, 0, 1, 2, 3, 4, 0, 1, 2, 0]
    assert np.flatnonzero(table.targets[0]).tolist() == [LABELS.index("Male speech, man speaking")]
    for name, target, number, row in zip(table.names, table.targets, table.path_number, table.row, strict=True):
        with h5py.File(table.paths[number]) as file:
            assert file["audio_name"][row] == name
            assert np.array_equal(file["target"][row], target)
    evaluation = read_index_table(moved / "hdf5s" / "indexes" / "eval.h5", moved)
    assert evaluation.names.tolist() == [b"Yevaluate_id.wav"]


def test_index_columns_are_those_of_panns(packed: Path) -> None:
    audioset_index.create_indexes(packed, processes=1)
    indexes = packed / "hdf5s" / "indexes"
    assert sorted(path.name for path in indexes.iterdir()) == ["full_train.h5", "unbalanced_train.h5"]
    with h5py.File(indexes / "full_train.h5") as file:
        assert {key: file[key].dtype.kind for key in file} == {
            "audio_name": "S",
            "target": "b",
            "hdf5_path": "S",
            "index_in_hdf5": "i",
        }
        assert file["index_in_hdf5"].dtype == np.int32
        assert file["hdf5_path"][8] == b"hdf5s/waveforms/unbalanced_train/unbalanced_train_part02.h5"
        assert file.attrs["sample_rate"] == RATE


def test_parts_are_taken_by_number(packed: Path) -> None:
    for number in (0, 1, 2):
        part(packed, number).rename(part(packed, number + 99))
    sources = audioset_index.find_sources(packed)
    assert [source.path for source in sources] == [part(packed, number) for number in (99, 100, 101)]


def test_index_errors_are_told(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of() -> str:
        assert main.main(["create_index", "--dataset_path", str(packed), "--processes", "1"]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        return told

    add_split(packed, "eval", "evaluate_id", MUSIC, rate=2 * RATE)
    capsys.readouterr()  # what the packing said
    assert "has sample_rate = 16000" in error_of()
    with h5py.File(packed / "hdf5s" / "waveforms" / "eval.h5", "r+") as file:
        del file["target"]
        file["target"] = np.zeros((1, 10), dtype=bool)
    assert "has classes = 10" in error_of()
    with h5py.File(packed / "hdf5s" / "waveforms" / "eval.h5", "r+") as file:
        del file["target"]
        file["target"] = np.zeros((3, 527), dtype=bool)
    assert "all of one length" in error_of()
    (packed / "hdf5s" / "waveforms" / "eval.h5").unlink()
    content = part(packed, 1).read_bytes()
    part(packed, 1).write_bytes(content[: len(content) // 2])
    assert "part01.h5 cannot be read as HDF5; it may be cut off" in error_of()
    shutil.rmtree(part(packed, 1).parent)
    assert "has neither balanced_train.h5 nor unbalanced_train" in error_of()
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


def test_script_says_how_it_is_used() -> None:
    done = run_script()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: ./create_index.sh DATASET_PATH [PROCESSES]" in done.stderr


def test_script_passes_on_errors(tmp_path: Path) -> None:
    done = run_script(tmp_path / "a folder with spaces")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "a folder with spaces" in done.stderr
