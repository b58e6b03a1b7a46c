"""A user's own folder, and the tables that adapters share: labels, events, splits, folds, files that are found."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import main
from data.clip_store import STRONG, WEAK, Waveforms, labelling, open_store, read_store_table
from prepare.finder import AudioFinder
from settings import UserError
from tests.prepare.raw_data import (
    EVENTS,
    RATE,
    classes,
    events,
    lengths,
    make_folder,
    names,
    prepare,
    refused,
    write_broken,
    write_sound,
    write_text,
)  # fmt: skip


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Four clips of 0.1 to 0.4 s, of several rates."""
    for number in range(4):
        write_sound(tmp_path / "raw" / f"{number}.wav", 0.1 + 0.1 * number, rate=(8000, 16000, 22050, 48000)[number])
    return tmp_path / "raw"


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_a_table_of_clips(raw: Path, tmp_path: Path, delimiter: str) -> None:
    """Several classes a clip, given splits, an Excel file's byte order mark; the longest clip is the store's width."""
    lines = [
        ("filename", "label", "split"), ("2.wav", "owl", "test"), ("0.wav", "bee", "train"), ("2.wav", "bee", "test"),
        ("3.wav", "ant", "validation"), ("gone.wav", "owl", "train"),
    ]  # fmt: skip
    text = "\ufeff" + "".join(delimiter.join(line) + "\r\n" for line in lines)
    report, table = prepare("folder", tmp_path, raw=raw, table=write_text(tmp_path / "table.txt", text))
    assert [name for name, _ in report.skipped] == ["gone.wav"]
    assert (table.labels, names(table)) == (["ant", "bee", "owl"], ["2.wav", "0.wav", "3.wav"])
    assert (table.split.tolist(), table.task) == ([b"test", b"train", b"validation"], "multilabel")
    assert classes(table) == [["bee", "owl"], ["bee"], ["ant"]]
    assert lengths(table) == [2400, 800, 3200, 3200]
    assert labelling(table).tolist() == [WEAK] * 3


def test_json_lists(raw: Path, tmp_path: Path) -> None:
    """Two lists are train and test; the table of classes gives names and order, and keeps classes without clips."""
    classes_of = {"0.wav": "/m/b,/m/a", "/home/them/1.wav": "/m/a", "gone.wav": "/m/a", str(raw / "3.wav"): "/m/b"}
    clips = [{"wav": wav, "labels": labels, "video_id": 1} for wav, labels in classes_of.items()]
    lists = [
        write_text(tmp_path / f"{name}.json", json.dumps({"data": part}))
        for name, part in (("train", clips[:3]), ("eval", clips[3:]))
    ]
    table = 'index,mid,display_name\n1,/m/a,"Bee, wild"\n0,/m/b,Owl\n2,/m/c,Ant\n'
    named: dict[str, Any] = {
        "raw": raw,
        "lists": ",".join(map(str, lists)),
        "class_table": write_text(tmp_path / "classes.csv", table),
    }
    report, store = prepare("folder", tmp_path, **named)
    assert [name for name, _ in report.skipped] == ["gone.wav"]
    assert store.labels == ["Owl", "Bee, wild", "Ant"]
    assert classes(store) == [["Owl", "Bee, wild"], ["Bee, wild"], ["Owl"]]
    assert (names(store), store.split.tolist()) == (["0.wav", "1.wav", "3.wav"], [b"train", b"train", b"test"])

    _, store = prepare("folder", tmp_path / "plain", raw=raw, lists=str(lists[0]))
    assert store.labels == ["/m/a", "/m/b"]
    for content, match in (("[]", "list"), ('{"data": []}', "data"), ('{"data": [{"wav": "0.wav"}]}', "clip 1")):
        refused(match, "folder", tmp_path / "x", raw=raw, lists=str(write_text(tmp_path / "x.json", content)))
    refused("/m/d", "folder", tmp_path / "x", **{
        **named, "lists": str(write_text(tmp_path / "x.json", '{"data": [{"wav": "0.wav", "labels": "/m/d"}]}'))
    })  # fmt: skip
    refused("--class_table", "folder", tmp_path / "x", raw=raw, class_table=named["class_table"])


def test_folds(raw: Path, tmp_path: Path) -> None:
    text = "label,fold,filename\n" + "".join(f'"one, two",{number + 1},{number}.wav\n' for number in range(4))
    _, table = prepare("folder", tmp_path, raw=raw, table=write_text(tmp_path / "table.csv", text))
    assert (table.fold.tolist(), table.labels, table.task) == ([1, 2, 3, 4], ["one, two"], "single_label")
    assert not (table.split != b"").any()


def test_a_table_of_events(raw: Path, tmp_path: Path) -> None:
    """An event that ends a little late is cut; a clip without events is strongly annotated as well."""
    text = "filename,onset,offset,event_label\n3.wav,0.1,0.2,owl\n3.wav,0.1,0.3,bee\n2.wav,,,\n1.wav,0,0.6,bee\n"
    _, table = prepare("folder", tmp_path, raw=raw, table=write_text(tmp_path / "table.csv", text))
    assert names(table) == ["3.wav", "2.wav", "1.wav"]
    assert classes(table) == [["bee", "owl"], [], ["bee"]]
    assert events(table) == [[("owl", 0.1, 0.2), ("bee", 0.1, 0.3)], [], [("bee", 0.0, 0.2)]]
    assert (labelling(table).tolist(), table.task) == ([STRONG] * 3, "multilabel")


def test_folders_of_classes(tmp_path: Path) -> None:
    """The uppermost folder is the class; hidden files are ignored; each class is in every split."""
    flags = make_folder(tmp_path)
    for hidden in ("bee/._0.wav", ".cache/a.wav"):
        write_sound(flags["raw"] / hidden)
    write_sound(flags["raw"] / "owl" / "night" / "9.FLAC")
    write_sound(flags["raw"] / "stray.wav")
    write_text(flags["raw"] / "notes" / "a.txt", "")
    broken = write_broken(flags["raw"] / "owl")
    report, table = prepare("folder", tmp_path, seed=1, **flags)
    assert {name for name, _ in report.skipped} == {"stray.wav", "bee/broken.wav", *(f"owl/{name}" for name in broken)}
    assert (table.labels, names(table)[0], names(table)[-1]) == (["bee", "owl"], "bee/0.wav", "owl/night/9.FLAC")
    for label in range(2):
        assert set(table.split[table.targets[:, label]]) == {b"train", b"validation", b"test"}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("filename,class\n0.wav,a\n", "label"),
        ("label\na\n", "filename"),
        ("", "empty"),
        ("filename,label\n", "empty"),
        ("filename,label\n0.wav,\n", "line 2: the label"),
        ("filename,label\n0.wav,a,b\n", "line 2 has more cells"),
        ('filename,label\n"0.wav,a\n', "cannot be read"),
        ("filename,label,split\n0.wav,a,train\n1.wav,a,dev\n", "line 3: split 'dev'"),
        ("filename,label,split\n0.wav,a,train\n1.wav,a,\n", "line 3: split ''"),
        ("filename,label,split\n0.wav,a,train\n0.wav,b,test\n", "line 3: 0.wav"),
        ("filename,label,fold\n0.wav,a,0\n", "line 2: fold '0'"),
        ("filename,label,fold\n0.wav,a,128\n", "line 2: fold '128'"),
        ("filename,label,fold,split\n0.wav,a,1,train\n", "split and fold"),
        ("filename,label,event_label,onset,offset\n0.wav,a,a,0,1\n", "label and event_label"),
        ("filename,onset,offset,label\n0.wav,0,1,a\n", "no column event_label"),
        ("filename,onset,event_label\n0.wav,0,a\n", "lacks the columns offset"),
        ("filename,onset,offset,event_label\n0.wav,,,\n", "names no class"),
        ("filename,onset,offset,event_label\n0.wav,0.05,0.7,a\n", "line 2: .* 0.wav"),  # 0.5 s too late is allowed
        ("filename,onset,offset,event_label\n0.wav,0.15,0.2,a\n", "line 2: .* 0.wav"),  # begins after the end
        ("filename,onset,offset,event_label\n0.wav,0.05,0.05,a\n", "line 2: .* 0.05"),
        ("filename,onset,offset,event_label\n0.wav,-0.5,0.05,a\n", "line 2: .* -0.5"),
        ("filename,onset,offset,event_label\n0.wav,0,end,a\n", "line 2: .*'end'"),
        ("filename,onset,offset,event_label\n0.wav,0,inf,a\n", "line 2: .*'inf'"),
        ("filename,onset,offset,event_label\n0.wav,0,,a\n", "line 2: .*''"),
        ("filename,onset,offset,event_label\n0.wav,0,0.05,\n", "line 2: .* event_label"),
        ("filename,onset,offset,event_label\n,0,0.05,a\n", "line 2: the filename"),
        ("filename,label\ngone.wav,a\n", "gone.wav: There is no file"),
        (None, "No audio"),
    ],
)
def test_wrong_tables(raw: Path, tmp_path: Path, text: str | None, match: str) -> None:
    table = {} if text is None else {"table": write_text(tmp_path / "table.csv", text)}
    refused(match, "folder", tmp_path, raw=raw, **table)


def test_wrong_files(raw: Path, tmp_path: Path) -> None:
    refused("nothing", "folder", tmp_path, raw=tmp_path / "nothing")
    refused(r"nothing\.csv", "folder", tmp_path, raw=raw, table=tmp_path / "nothing.csv")
    refused("UTF-8", "folder", tmp_path, raw=raw, table=raw / "0.wav")
    soundfile.write(write_sound(raw / "a" / "day.wav"), np.zeros(100 * 601, dtype=np.int16), 100)
    refused(r"a/day.wav \(601 s\)", "folder", tmp_path, raw=raw)


def test_a_file_shorter_than_its_header_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cut", "whole"):
        write_sound(tmp_path / "raw" / "a" / f"{name}.wav", seconds=1.0)
    monkeypatch.setattr("prepare.tables.audio_seconds", lambda path: {"cut.wav": 2.0, "whole.wav": 1.0}[path.name])
    report, table = prepare("folder", tmp_path, raw=tmp_path / "raw")
    assert ([name for name, _ in report.skipped], names(table)) == (["a/cut.wav"], ["a/whole.wav"])


def test_files_are_found_by_the_end_of_their_path(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_sound(tmp_path / "raw" / folder / "a.wav")
    finder = AudioFinder(tmp_path / "raw")
    assert finder.find("x/a.wav") == AudioFinder(tmp_path).find("x/a.wav") == tmp_path / "raw" / "x" / "a.wav"
    assert finder.find("a.wav", table=tmp_path / "tables" / "y.tsv") == tmp_path / "raw" / "y" / "a.wav"
    for name, match in (("a.wav", "Several"), ("b.wav", "There is no file"), ("z/a.wav", "There is no file")):
        with pytest.raises(UserError, match=match):
            finder.find(name)


NFC, NFD = "K\u00e4uzchen.wav", "Ka\u0308uzchen.wav"


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (f"sub/{NFD}", NFC), (f"sub/{NFC}", NFD), (os.fsdecode(b"sub/K\xe4uzchen.wav"), NFC), ("sub/a.WAV", "a.wav"),
        ("sub/a.wav", "sub\\a.wav"), ("sub/a.wav", ".\\a.wav"), ("a\\b.wav", "a\\b.wav"), ("sub/a.wav", "Sub/A.wav"),
        ("sub/a.wav", "./sub//a.wav"), ("sub/a.wav", "x/../sub/a.wav"), ("sub/a.wav", "{raw}/sub/a.wav"),
        ("sub/ a.wav ", "a.wav"), ("sub/a.wav", " sub / a.wav"), ("a.flac", "a.FLAC"),
    ],
)  # fmt: skip
def test_a_file_is_found_however_its_name_is_spelled(there: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "raw" / there
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert AudioFinder(tmp_path / "raw").find(named.format(raw=tmp_path / "raw")) == path


def test_exact_names_come_first_and_nothing_outside_is_named(tmp_path: Path) -> None:
    finder = AudioFinder(tmp_path / "raw")
    for name in ("raw/a.WAV", "raw/a.wav", "raw/b.WAV", "raw/x/b.wav", "raw/y/cc.wav", "raw/z/CC.wav", "outside.wav"):
        write_text(tmp_path / name, "")
    assert [finder.find(name).name for name in ("a.wav", "a.WAV", "b.wav")] == ["a.wav", "a.WAV", "b.WAV"]
    with pytest.raises(UserError, match="Several"):
        finder.find("Cc.wav")
    for name in ("../outside.wav", "x/../../outside.wav", "..\\outside.wav", str(tmp_path / "outside.wav")):
        with pytest.raises(UserError, match=r"outside\.wav does not lie below"):
            finder.find(name)


def test_spellings_of_one_file_are_one_clip(raw: Path, tmp_path: Path) -> None:
    text = "filename,label\n0.wav,owl\n./0.wav,bee\n0.WAV,ant\n1.wav,bee\n2.wav,bee\n"
    report, table = prepare("folder", tmp_path, raw=raw, table=write_text(tmp_path / "t.csv", text))
    assert (names(table), classes(table)[0]) == (["0.wav", "1.wav", "2.wav"], ["ant", "bee", "owl"])
    assert (report.unused, report.others) == (1, {})
    text = "filename,label,split\n0.wav,owl,train\n./0.wav,owl,test\n"
    refused(r"\./0\.wav", "folder", tmp_path / "other", raw=raw, table=write_text(tmp_path / "t.csv", text))


def test_nothing_of_a_folder_is_left_out_without_a_word(tmp_path: Path) -> None:
    """A class that is a link, one that leads back, a link to nothing, a pipe, odd endings, odd sounds, other files."""
    raw = make_folder(tmp_path)["raw"]
    write_sound(tmp_path / "elsewhere" / "a.wav")
    (raw / "frog").symlink_to(tmp_path / "elsewhere")
    (raw / "bee" / "up").symlink_to(raw)
    (raw / "bee" / "gone.wav").symlink_to("nowhere.wav")
    os.mkfifo(raw / "bee" / "pipe.wav")
    for name in ("noending", "old.aifc", "a.wav.bak"):
        (raw / "bee" / name).write_bytes(write_sound(tmp_path / "old.aiff").read_bytes())
    write_text(raw / "bee" / "phone.m4a", "no sound")
    write_text(raw / "bee" / "notes.txt", "")
    write_text(raw / "bee" / ".hidden", "")
    soundfile.write(raw / "bee" / "quiet.wav", np.zeros(2000), RATE)
    report, table = prepare("folder", tmp_path, raw=raw)
    assert {"frog/a.wav", "bee/noending", "bee/old.aifc", "bee/a.wav.bak", "bee/quiet.wav"} <= set(names(table))
    assert sorted(name for name, _ in report.skipped) == ["bee/broken.wav", "bee/phone.m4a"]
    assert sorted(name for name, _ in report.unopened) == ["bee/gone.wav", "bee/pipe.wav", "bee/up"]
    assert report.others == {".txt": 1, "hidden": 1}
    assert [(name, remark.kind) for name, remark in report.remarks] == [("bee/quiet.wav", "silent")]
    assert all(word in str(report) for word in ("phone.m4a", "gone.wav", "pipe.wav", "bee/up", ".txt 1", "1 silent"))


def test_long_recordings_are_cut_with_their_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    raw.mkdir()
    soundfile.write(raw / "a.wav", np.arange(20000) / 32768, RATE, subtype="PCM_16")  # 2.5 s; samples are places
    table = write_text(tmp_path / "t.tsv", f"{EVENTS}a.wav\t0.5\t1.25\towl\na.wav\t2.1\t2.4\tbee\n")
    words = ["prepare", "--dataset_type", "folder", "--raw", str(raw), "--table", str(table)]
    words += ["--sample_rate", str(RATE), "--dataset_path", str(data), "--clip_samples", str(RATE)]
    assert main.main(words) == 0
    assert "1 clips are longer than 1 s, up to 2.5 s" in capsys.readouterr().out
    assert main.main([*words, "--segment_seconds", "1", "--overwrite"]) == 0
    assert "are longer" not in capsys.readouterr().out
    store = read_store_table(data / "folder.h5")
    assert names(store) == ["a.wav#t=0,1", "a.wav#t=1,2", "a.wav#t=2,2.5"]
    assert events(store) == [[("owl", 0.5, 1.0)], [("owl", 0.0, 0.25)], [("bee", 0.1, 0.4)]]
    assert (classes(store), len(set(store.split.tolist()))) == ([["owl"], ["owl"], ["bee"]], 1)
    with open_store(store.paths[0]) as file:
        sound = Waveforms(file)
        assert [len(sound.read(row)) for row in range(3)] == [8000, 8000, 4000]
        assert abs(int(sound.read(1)[0]) - 8000) <= 1
    wrong: list[dict[str, Any]] = [{"segment_seconds": 0.0, "table": table}, {"segment_seconds": 1.0}]
    wrong.append({"segment_seconds": 1.0, "table": write_text(tmp_path / "l.csv", "filename,label\na.wav,owl\n")})
    write_sound(raw / "owl" / "a.wav")
    for flags in wrong:
        with pytest.raises(UserError, match="--segment_seconds"):
            prepare("folder", tmp_path, raw=raw, **flags)


def test_rounded_times_leave_no_label_and_no_clip(tmp_path: Path) -> None:
    """An event that ends 2e-16 s into a segment, one of 5 ms, and a recording that ends 4 ms after a segment."""
    write_sound(tmp_path / "raw" / "a.wav", 3.004)
    lines = "a.wav\t0.3\t1.0000000000000002\tdog\na.wav\t1.5\t1.505\tcat\na.wav\t1.5\t1.51\towl\n"
    table = write_text(tmp_path / "t.tsv", EVENTS + lines)
    report, store = prepare("folder", tmp_path, raw=tmp_path / "raw", table=table, segment_seconds=1.0)
    assert names(store) == ["a.wav#t=0,1", "a.wav#t=1,2", "a.wav#t=2,3"]
    assert (classes(store), store.labels) == ([["dog"], ["owl"], []], ["dog", "owl"])
    assert events(store) == [[("dog", 0.3, 1.0)], [("owl", 0.5, 0.51)], []]
    assert (report.short_events, report.short_segments) == (2, 1)


def test_a_recording_whose_end_cannot_be_read_leaves_no_segment(tmp_path: Path) -> None:
    """Nor its counts; the others are there, with their events."""
    sound = np.full(24500, 0.1, np.float32)
    for name in ("a", "b", "c"):
        write_sound(tmp_path / "raw" / f"{name}.wav", 2.0)
    soundfile.write(tmp_path / "raw" / "b.wav", np.append(sound, np.nan), 8000, subtype="FLOAT")
    lines = "".join(f"{name}.wav\t0.3\t0.9\tdog\n" for name in "abc") + "b.wav\t0.3\t1.001\tdog\n"
    table = write_text(tmp_path / "t.tsv", EVENTS + lines)
    report, store = prepare("folder", tmp_path, raw=tmp_path / "raw", table=table, segment_seconds=1.0)
    assert names(store) == [f"{name}.wav#t={part}" for name in "ac" for part in ("0,1", "1,2")]
    assert events(store) == [[("dog", 0.3, 0.9)], []] * 2
    assert ([name for name, _ in report.skipped], report.clips, report.short_events) == (["b.wav"], 4, 0)


def test_labels_of_folders_and_tables(raw: Path, tmp_path: Path) -> None:
    """Spaces at the ends and Unicode forms are no other class; one that looks like several is named; one without a
    clip is none."""
    text = 'filename,label\n0.wav,dog \n1.wav,dog\n2.wav,"dog,outdoor"\ngone.wav,cat\n'
    report, table = prepare("folder", tmp_path, raw=raw, table=write_text(tmp_path / "t.csv", text))
    assert table.labels == ["dog", "dog,outdoor"]
    assert ["dog,outdoor" in note for note in report.notes] == [True]
    for folder in ("Ka\u0308uz", "dog "):
        write_sound(tmp_path / "more" / folder / "a.wav")
    _, table = prepare("folder", tmp_path, raw=tmp_path / "more")
    assert table.labels == ["K\u00e4uz", "dog"]


def test_the_task_may_be_chosen(tmp_path: Path) -> None:
    flags = make_folder(tmp_path)
    for task in ("single_label", "multilabel"):
        assert prepare("folder", tmp_path, task=task, **flags)[1].task == task
    table = write_text(tmp_path / "t.csv", "filename,label\nbee/0.wav,a\nbee/0.wav,b\nbee/1.wav,a\n")
    with pytest.raises(UserError, match=r"single_label .* 1 of 2 .* bee/0\.wav"):
        prepare("folder", tmp_path, table=table, task="single_label", **flags)


def test_a_store_is_replaced_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same inputs again change nothing; other ones need --overwrite, or a name. Status 1: broken.wav is skipped."""
    flags = make_folder(tmp_path)
    words = ["prepare", "--dataset_type", "folder", "--raw", str(flags["raw"]), "--sample_rate", str(RATE)]
    words += ["--workspace", str(tmp_path / "w")]
    store = tmp_path / "w" / "data" / "folder" / "folder.h5"
    assert main.main(words) == 1
    made = store.stat().st_mtime_ns
    first = capsys.readouterr().out
    assert "random_seed" in first
    assert "broken.wav" in first
    assert (main.main(words), store.stat().st_mtime_ns) == (1, made)
    assert capsys.readouterr().out.startswith(first.splitlines()[0])
    write_sound(flags["raw"] / "bee" / "new.wav")
    assert (main.main(words), store.stat().st_mtime_ns) == (2, made)
    assert "--overwrite" in capsys.readouterr().err
    assert main.main([*words, "--name", "birds"]) == 1
    assert (tmp_path / "w" / "data" / "birds" / "folder.h5").is_file()
    assert main.main([*words, "--overwrite"]) == 1
    assert len(read_store_table(store)) == 7
    assert main.main([*words, "--name", "../birds"]) == 2
    assert main.main([*words, "--name", "birds", "--dataset_path", "x"]) == 2
