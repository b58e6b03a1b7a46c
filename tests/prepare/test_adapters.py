"""Adapters of Speech Commands V2, DESED and a user's own folder, and the stratified split."""

from pathlib import Path
from typing import Optional

import h5py
import numpy as np
import pytest
import soundfile

from data.clip_store import read_events, read_store_table
from prepare.desed import LABELS as DESED_LABELS
from prepare.desed import prepare_desed
from prepare.folder import prepare_folder
from prepare.scv2 import PUBLISHED_LABELS, prepare_scv2
from prepare.stratify import stratified_split

RATE = 8000
EVENT_HEADER = "filename\tonset\toffset\tevent_label\n"


def write_sound(path: Path, seconds: float = 0.2, rate: int = RATE, channels: int = 1) -> None:
    """A file of quiet noise; the format goes by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (round(seconds * rate), channels))
    soundfile.write(path, noise, rate)


def write_broken(folder: Path) -> list[str]:
    """Three files that are no sound: no samples, text, NaN. Returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "empty.wav", np.zeros(0), RATE)
    (folder / "text.mp3").write_text("this is no sound")
    soundfile.write(folder / "nan.wav", np.full(800, np.nan), RATE, subtype="FLOAT")
    return ["empty.wav", "text.mp3", "nan.wav"]


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def lengths(store: Path) -> list[int]:
    with h5py.File(store) as file:
        return file["real_len"][:].tolist()


def names(store: Path) -> list[str]:
    return [name.decode() for name in read_store_table(store).names]


# --- Speech Commands V2 ---------------------------------------------------------------------------------------------


def make_scv2(raw: Path, words: tuple[str, ...] = ("wow", "bed", "backward")) -> Path:
    """Three clips of each word: b.wav for validation, c.wav for test, and folders that are no words."""
    for word in words:
        for name in "abc":
            write_sound(raw / word / f"{name}.wav")
    for noise in ("_background_noise_", ".cache"):
        write_sound(raw / noise / "a.wav")
    write_text(raw / "validation_list.txt", "".join(f"{word}/b.wav\n" for word in words))
    write_text(raw / "testing_list.txt", "".join(f"{word}/c.wav\n" for word in words))
    return raw


def test_scv2_splits_follow_the_lists(tmp_path: Path) -> None:
    raw, store = make_scv2(tmp_path / "raw"), tmp_path / "scv2.h5"
    write_text(raw / "wow" / "notes.txt", "no audio")
    report = prepare_scv2(raw, store, 16000)
    table = read_store_table(store)
    assert (report.clips, report.skipped) == (9, [])
    assert table.labels == ["backward", "bed", "wow"]
    assert names(store) == [f"{word}/{name}.wav" for word in table.labels for name in "abc"]
    assert table.split.tolist() == [b"train", b"validation", b"test"] * 3
    assert np.array_equal(table.targets, np.repeat(np.eye(3, dtype=bool), 3, axis=0))
    assert (table.sample_rate, table.attributes["dataset_type"]) == (16000, "scv2")


def test_scv2_clips_are_one_second_at_most(tmp_path: Path) -> None:
    raw, store = make_scv2(tmp_path / "raw", ("one",)), tmp_path / "scv2.h5"
    write_sound(raw / "one" / "a.wav", seconds=1.5, rate=44100)
    write_sound(raw / "one" / "b.wav", seconds=0.5, rate=48000)
    prepare_scv2(raw, store, 16000)
    assert lengths(store) == [16000, 8000, 3200]
    with h5py.File(store) as file:
        assert file["waveform"].shape == (3, 16000)
        assert not file["waveform"][1, 8000:].any()


def test_scv2_published_order(tmp_path: Path) -> None:
    raw, store = make_scv2(tmp_path / "raw"), tmp_path / "scv2.h5"
    prepare_scv2(raw, store, RATE, label_order="published")
    table = read_store_table(store)
    assert table.labels == PUBLISHED_LABELS
    assert len(set(PUBLISHED_LABELS)) == 35
    for word, number in {"bed": 0, "wow": 1, "five": 2, "zero": 10, "four": 15, "stop": 25, "backward": 34}.items():
        assert PUBLISHED_LABELS[number] == word
    assert table.targets.argmax(axis=1).tolist() == [34] * 3 + [0] * 3 + [1] * 3
    make_scv2(raw, ("hello",))
    with pytest.raises(ValueError, match="folders hello are none of the published checkpoint's 35 words"):
        prepare_scv2(raw, store, RATE, label_order="published")
    with pytest.raises(ValueError, match="'listing' is not allowed: it must be sorted or published"):
        prepare_scv2(raw, store, RATE, label_order="listing")


def test_scv2_reports_broken_and_absent_files(tmp_path: Path) -> None:
    raw, store = make_scv2(tmp_path / "raw", ("one",)), tmp_path / "scv2.h5"
    broken = write_broken(raw / "one")
    write_text(raw / "testing_list.txt", "one/c.wav\n\none/gone.wav\n_background_noise_/a.wav\n")
    report = prepare_scv2(raw, store, RATE)
    assert report.clips == 3
    assert {name for name, _ in report.skipped} == {
        "one/gone.wav", "_background_noise_/a.wav", *(f"one/{name}" for name in broken),
    }  # fmt: skip
    assert "one/gone.wav: testing_list.txt names it" in str(report)


def test_scv2_refuses_a_wrong_folder(tmp_path: Path) -> None:
    store = tmp_path / "scv2.h5"
    with pytest.raises(ValueError, match="There is no folder"):
        prepare_scv2(tmp_path / "nothing", store, RATE)
    raw = make_scv2(tmp_path / "raw", ("one",))
    write_text(raw / "testing_list.txt", "one/a.wav\none/b.wav\n")
    with pytest.raises(ValueError, match=r"testing_list.txt, line 2: one/b.wav is in validation_list.txt as well"):
        prepare_scv2(raw, store, RATE)
    write_text(raw / "testing_list.txt", "one\n")
    with pytest.raises(ValueError, match="line 1: 'one' is not of the form"):
        prepare_scv2(raw, store, RATE)
    (raw / "testing_list.txt").unlink()
    with pytest.raises(ValueError, match=r"There is no .*testing_list.txt"):
        prepare_scv2(raw, store, RATE)
    write_sound(tmp_path / "flat" / "a.wav")
    with pytest.raises(ValueError, match="one folder a word"):
        prepare_scv2(tmp_path / "flat", store, RATE)
    mute = tmp_path / "mute"
    write_broken(mute / "one")
    for name in ("validation_list.txt", "testing_list.txt"):
        write_text(mute / name, "")
    with pytest.raises(ValueError, match="None of the 3 audio files"):
        prepare_scv2(mute, store, RATE)
    assert not list(tmp_path.glob("scv2.h5*"))


# --- DESED ----------------------------------------------------------------------------------------------------------


def test_desed(tmp_path: Path) -> None:
    """Events, empty clips, clips over 10 s whole, files in folders further down, broken and missing files."""
    raw, store = tmp_path / "raw", tmp_path / "desed.h5"
    write_sound(raw / "a.wav", seconds=1.0, rate=44100, channels=2)
    write_sound(raw / "long.wav", seconds=11.0, rate=4000)
    write_sound(raw / "eval" / "public" / "quiet.wav", seconds=0.5)
    broken = write_broken(raw)
    table = write_text(
        tmp_path / "strong.tsv",
        EVENT_HEADER + "a.wav\t0.1\t0.4\tDog\na.wav\t0.2\t1.3\tSpeech\nlong.wav\t10.5\t11.0\tVacuum_cleaner\n"
        "a.wav\t0.5\t0.6\tDog\nquiet.wav\t\t\t\ngone.wav\t0\t1\tCat\n" + "".join(f"{name}\t\t\t\n" for name in broken),
    )
    report = prepare_desed(raw, store, RATE, table)
    assert DESED_LABELS[0] == "Speech"
    assert (DESED_LABELS.index("Dog"), DESED_LABELS.index("Vacuum_cleaner")) == (8, 9)
    assert sorted(name for name, _ in report.skipped) == sorted(["gone.wav", *broken])
    assert (report.clips, names(store)) == (3, ["a.wav", "long.wav", "quiet.wav"])
    stored = read_store_table(store)
    assert (stored.labels, stored.split.tolist()) == (DESED_LABELS, [b"test"] * 3)
    assert [np.flatnonzero(target).tolist() for target in stored.targets] == [[0, 8], [9], []]
    assert lengths(store) == [RATE, 11 * RATE, RATE // 2]
    events = [[(e.label, e.onset, e.offset) for e in clip] for clip in read_events(store)]
    assert events == [[(8, 0.1, 0.4), (0, 0.2, 1.0), (8, 0.5, 0.6)], [(9, 10.5, 11.0)], []]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.wav\t0\t0.5\tdog", "line 3: 'dog' is none of DESED's classes: Speech, .*, Vacuum_cleaner"),
        ("a.wav\t0.5\t0.5\tDog", "line 3: an event must have 0 <= onset < offset, not 0.5 and 0.5 s"),
        ("a.wav\t-0.5\t0.5\tDog", "line 3: an event must have 0 <= onset"),
        ("a.wav\t0\t1.6\tDog", "line 3: the event from 0.0 to 1.6 s does not fit into a.wav, which is 1.00 s long"),
        ("a.wav\t1.1\t1.2\tDog", "line 3: the event from 1.1 to 1.2 s does not fit"),
        ("a.wav\t0\tend\tDog", "line 3: 'end' is not a time"),
        ("a.wav\t0\tinf\tDog", "line 3: 'inf' is not a time"),
        ("a.wav\t0\t\tDog", "line 3: '' is not a time"),
        ("a.wav\t0\t0.5\t", "line 3: the event from 0 to 0.5 s has no event_label"),
        ("\t0\t0.5\tDog", "line 3: the filename is empty"),
        ("a.wav\t0\t0.5\tDog\tCat", "line 3 has more cells than the 4 columns"),
    ],
)
def test_desed_refuses_wrong_events(tmp_path: Path, line: str, message: str) -> None:
    write_sound(tmp_path / "raw" / "a.wav", seconds=1.0)
    table = write_text(tmp_path / "strong.tsv", f"{EVENT_HEADER}a.wav\t0\t0.5\tCat\n{line}\n")
    with pytest.raises(ValueError, match=message):
        prepare_desed(tmp_path / "raw", tmp_path / "desed.h5", RATE, table)
    assert not list(tmp_path.glob("desed.h5*"))


def test_desed_refuses_wrong_tables_and_folders(tmp_path: Path) -> None:
    raw, store, table = tmp_path / "raw", tmp_path / "desed.h5", tmp_path / "strong.tsv"
    with pytest.raises(ValueError, match="There is no folder"):
        prepare_desed(raw, store, RATE, table)
    write_sound(raw / "x" / "a.wav")
    with pytest.raises(ValueError, match="There is no table"):
        prepare_desed(raw, store, RATE, table)
    write_text(table, "filename\tonset\tevent_label\na.wav\t0\tDog\n")
    with pytest.raises(ValueError, match="lacks the columns offset; it has filename, onset, event_label"):
        prepare_desed(raw, store, RATE, table)
    write_text(table, f"{EVENT_HEADER}b.wav\t0\t1\tDog\n")
    with pytest.raises(
        ValueError, match=r"None of the 1 audio files could be read.\n.*\n.*\n  b.wav: There is no file"
    ):
        prepare_desed(raw, store, RATE, table)
    write_sound(raw / "y" / "a.wav")
    write_text(table, f"{EVENT_HEADER}a.wav\t\t\t\nx/a.wav\t\t\t\n")
    report = prepare_desed(tmp_path, store, RATE, table)  # one folder higher: x/a.wav is the end of one path only
    assert [name for name, _ in report.skipped] == ["a.wav"]
    assert "Several files have this name" in str(report)
    assert names(store) == ["x/a.wav"]


# --- a user's own folder --------------------------------------------------------------------------------------------


def make_folder(raw: Path, clips: int = 4) -> Path:
    for number in range(clips):
        write_sound(raw / f"{number}.wav", seconds=0.1 + 0.1 * number, rate=(8000, 16000, 22050, 48000)[number % 4])
    return raw


def folder_error(tmp_path: Path, text: Optional[str]) -> str:
    """The message of preparing the four clips of make_folder with this table."""
    raw = tmp_path / "raw"
    table = None if text is None else write_text(tmp_path / "table.csv", text)
    with pytest.raises(ValueError, match=r"\.") as caught:
        prepare_folder(raw, tmp_path / "folder.h5", RATE, table, seed=0)
    assert not list(tmp_path.glob("folder.h5*"))
    return str(caught.value)


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_folder_with_a_table_of_clips(tmp_path: Path, delimiter: str) -> None:
    """Several classes a clip, given splits, an Excel file's byte order mark; the longest clip is the store's width."""
    raw, store = make_folder(tmp_path / "raw"), tmp_path / "folder.h5"
    lines = [
        ("filename", "label", "split"), ("2.wav", "owl", "test"), ("0.wav", "bee", "train"), ("2.wav", "bee", "test"),
        ("3.wav", "ant", "validation"), ("gone.wav", "owl", "train"),
    ]  # fmt: skip
    text = "\ufeff" + "".join(delimiter.join(line) + "\r\n" for line in lines)
    report = prepare_folder(raw, store, RATE, write_text(tmp_path / "table.txt", text), seed=0)
    assert [name for name, _ in report.skipped] == ["gone.wav"]
    table = read_store_table(store)
    assert (table.labels, names(store)) == (["ant", "bee", "owl"], ["2.wav", "0.wav", "3.wav"])
    assert table.split.tolist() == [b"test", b"train", b"validation"]
    assert table.targets.tolist() == [[False, True, True], [False, True, False], [True, False, False]]
    assert lengths(store) == [2400, 800, 3200]
    with h5py.File(store) as file:
        assert file["waveform"].shape == (3, 3200)
        assert file.attrs["dataset_type"] == "folder"


def test_folder_with_folds(tmp_path: Path) -> None:
    raw, store = make_folder(tmp_path / "raw"), tmp_path / "folder.h5"
    text = "label,fold,filename\n" + "".join(f'"one, two",{number + 1},{number}.wav\n' for number in range(4))
    prepare_folder(raw, store, RATE, write_text(tmp_path / "table.csv", text), seed=0)
    table = read_store_table(store)
    assert (table.fold.tolist(), table.labels) == ([1, 2, 3, 4], ["one, two"])
    assert not (table.split != b"").any()


def test_folder_with_a_table_of_events(tmp_path: Path) -> None:
    raw, store = make_folder(tmp_path / "raw"), tmp_path / "folder.h5"
    text = "filename,onset,offset,event_label\n3.wav,0.1,0.2,owl\n3.wav,0.1,0.3,bee\n2.wav,,,\n1.wav,0,0.6,bee\n"
    prepare_folder(raw, store, RATE, write_text(tmp_path / "table.csv", text), seed=0)
    table = read_store_table(store)
    assert (table.labels, names(store)) == (["bee", "owl"], ["3.wav", "2.wav", "1.wav"])
    assert table.targets.tolist() == [[True, True], [False, False], [True, False]]
    events = [[(e.label, e.onset, e.offset) for e in clip] for clip in read_events(store)]
    assert events == [[(1, 0.1, 0.2), (0, 0.1, 0.3)], [], [(0, 0.0, 0.2)]]


def test_folder_of_classes(tmp_path: Path) -> None:
    """A folder's name is the class, whatever lies between; the split is made, and the same again."""
    raw, store = tmp_path / "raw", tmp_path / "folder.h5"
    for number in range(5):
        write_sound(raw / "owl" / "night" / f"{number}.flac")
        write_sound(raw / "bee" / f"{number}.WAV")
    write_sound(raw / "bee" / "._0.wav")
    write_sound(raw / "stray.wav")
    (raw / "notes").mkdir()
    write_broken(raw / "owl")
    report = prepare_folder(raw, store, RATE, None, seed=1)
    skipped = {name for name, _ in report.skipped}
    assert skipped == {"stray.wav", "owl/empty.wav", "owl/text.mp3", "owl/nan.wav"}
    table = read_store_table(store)
    assert (table.labels, names(store)[0], names(store)[-1]) == (["bee", "owl"], "bee/0.WAV", "owl/night/4.flac")
    for label in range(2):
        assert set(table.split[table.targets[:, label]]) == {b"train", b"validation", b"test"}
    again = tmp_path / "again.h5"
    prepare_folder(raw, again, RATE, None, seed=1)
    assert np.array_equal(read_store_table(again).split, table.split)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,class\n0.wav,a\n", "lacks the columns label; it has filename, class"),
        ("label\na\n", "lacks the columns filename"),
        ("", "is empty"),
        ("filename,label\n", "is empty"),
        ("filename,label\n0.wav,\n", "line 2: the label is empty"),
        ("filename,label\n0.wav,a,b\n", "line 2 has more cells"),
        ('filename,label\n"0.wav,a\n', "cannot be read as a CSV or TSV"),
        ("filename,label,split\n0.wav,a,train\n1.wav,a,dev\n", "line 3: split 'dev' is not allowed: it must be train,"),
        ("filename,label,split\n0.wav,a,train\n1.wav,a,\n", "line 3: split '' is not allowed"),
        ("filename,label,split\n0.wav,a,train\n0.wav,b,test\n", "line 3: 0.wav has another split or fold"),
        ("filename,label,fold\n0.wav,a,0\n", "line 2: fold '0' is not a whole number"),
        ("filename,label,fold,split\n0.wav,a,1,train\n", "both columns split and fold"),
        ("filename,label,event_label,onset,offset\n0.wav,a,a,0,1\n", "both columns label and event_label"),
        ("filename,onset,offset,label\n0.wav,0,1,a\n", "has times but no column event_label"),
        ("filename,onset,offset,event_label\n0.wav,0,1,a\n", "line 2: the event from 0.0 to 1.0 s does not fit"),
        ("filename,onset,offset,event_label\n0.wav,,,\n", "names no class"),
        ("filename,label\ngone.wav,a\n", "None of the 1 audio files could be read"),
        (None, "No audio was found in folders"),
    ],
)
def test_folder_refuses(tmp_path: Path, text: Optional[str], message: str) -> None:
    make_folder(tmp_path / "raw")
    assert message in folder_error(tmp_path, text)


def test_folder_refuses_what_is_no_text_or_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no folder"):
        prepare_folder(tmp_path / "raw", tmp_path / "folder.h5", RATE, None, seed=0)
    raw = make_folder(tmp_path / "raw", clips=1)
    with pytest.raises(ValueError, match="in UTF-8"):
        prepare_folder(raw, tmp_path / "folder.h5", RATE, raw / "0.wav", seed=0)


def test_folder_refuses_very_long_clips(tmp_path: Path) -> None:
    (tmp_path / "raw" / "a").mkdir(parents=True)
    soundfile.write(tmp_path / "raw" / "a" / "day.wav", np.zeros(100 * 601, dtype=np.int16), 100)
    assert "10 minutes long at most; longer are a/day.wav (601 s). Cut them" in folder_error(tmp_path, None)


def test_a_file_shorter_than_its_header_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, store = tmp_path / "raw", tmp_path / "folder.h5"
    write_sound(raw / "a" / "cut.wav", seconds=1.0)
    write_sound(raw / "a" / "whole.wav", seconds=1.0)
    seconds = {"cut.wav": 2.0, "whole.wav": 1.0}
    monkeypatch.setattr("prepare.folder.audio_seconds", lambda path: seconds[path.name])
    report = prepare_folder(raw, store, RATE, None, seed=0)
    assert report.skipped == [("a/cut.wav", "It ends after 1.00 s of 2.00 s.")]


# --- stratified split -----------------------------------------------------------------------------------------------


def share(split: np.ndarray, wanted: np.ndarray) -> list[int]:
    """Clips in train, validation and test among those that `wanted` picks."""
    return [int((split[wanted] == name).sum()) for name in ("train", "validation", "test")]


def test_stratified_split_of_single_classes() -> None:
    sizes = [1, 2, 3, 4, 10, 40, 100]
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(len(sizes)), sizes))
    targets = np.eye(len(sizes), dtype=bool)[labels]
    split = stratified_split(targets, seed=3)
    assert [share(split, targets[:, label]) for label in range(len(sizes))] == [
        [1, 0, 0], [2, 0, 0], [1, 1, 1], [2, 1, 1], [7, 1, 2], [28, 6, 6], [70, 15, 15],
    ]  # fmt: skip
    assert np.array_equal(split, stratified_split(targets, seed=3))
    assert not np.array_equal(split, stratified_split(targets, seed=4))


@pytest.mark.parametrize("seed", range(5))
def test_stratified_split_of_several_classes(seed: int) -> None:
    """Random targets with common and rare classes, and clips without any: all three splits, near 70/15/15."""
    rng = np.random.default_rng(seed)
    targets = rng.random((600, 12)) < np.geomspace(0.006, 0.5, 12)
    split = stratified_split(targets, seed)
    for label in np.flatnonzero(targets.sum(axis=0) >= 3):
        assert min(share(split, targets[:, label])) > 0
    for clips in (np.arange(600), np.flatnonzero(~targets.any(axis=1)), np.flatnonzero(targets[:, -1])):
        assert [count / len(clips) for count in share(split, clips)] == pytest.approx([0.7, 0.15, 0.15], abs=0.05)


def test_stratified_split_covers_a_class_whose_clips_all_have_rarer_ones() -> None:
    """Class 0 has three clips, each with a class of its own that would put it in train."""
    targets = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]], dtype=bool)
    assert sorted(stratified_split(targets, seed=0)) == ["test", "train", "validation"]


def test_stratified_split_ends_where_not_every_class_can_be_covered() -> None:
    """Four classes, each of three of four clips: two clips must share a split, and two classes miss one."""
    targets = ~np.eye(4, dtype=bool)
    assert set(stratified_split(targets, seed=0)) == {"train", "validation", "test"}
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        stratified_split(targets[0], seed=0)
