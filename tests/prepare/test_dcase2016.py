"""DCASE 2016 task 2 in HEAR's layout."""

import json
from pathlib import Path

import pytest

from tests.prepare.raw_data import classes, events, make_dcase2016, names, prepare, refused, write_text


def test_recordings_are_cut_within_their_split(tmp_path: Path) -> None:
    report, table = prepare("dcase2016-task2", tmp_path, **make_dcase2016(tmp_path))
    assert table.labels == ["knock", "cough"]
    found = dict(zip(names(table), zip(events(table), table.split.tolist(), strict=True), strict=True))
    assert found == {
        "train/a.wav#t=0,1": ([("cough", 0.9, 1.0), ("knock", 0.3, 0.4)], b"train"),
        "train/a.wav#t=1,2": ([("cough", 0.0, 1.0)], b"train"),
        "train/a.wav#t=2,2.5": ([("cough", 0.0, 0.2)], b"train"),
        "valid/b.wav#t=0,1": ([("knock", 0.0, 1.0), ("knock", 0.5, 1.0)], b"validation"),
        "valid/b.wav#t=1,2": ([("knock", 0.0, 0.5)], b"validation"),
        "valid/b.wav#t=2,2.5": ([], b"validation"),
        "test/c.wav#t=0,1": ([], b"test"),
        "test/c.wav#t=1,2": ([], b"test"),
        "test/c.wav#t=2,2.5": ([], b"test"),
    }
    assert classes(table)[0] == ["knock", "cough"]
    assert [name for name, _ in report.skipped] == ["valid/broken.wav"]


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("train.json", {"a.wav": [{"label": "sneeze", "start": 0, "end": 1}]}, "a.wav: 'sneeze'"),
        ("train.json", {"a.wav": [{"label": "knock", "start": 2, "end": 1}]}, "a.wav: .* is no event"),
        ("train.json", {"a.wav": [{"label": "knock", "start": 0, "end": 9000}]}, "a.wav"),
        ("train.json", {"../a.wav": []}, "a.wav"),
        ("valid.json", [], "valid.json"),
        ("task_metadata.json", {"embedding_type": "scene"}, "scene"),
        ("labelvocabulary.csv", "idx,label\n1,knock\n2,cough\n", "labelvocabulary"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, file: str, content: object, named: str) -> None:
    flags = make_dcase2016(tmp_path)
    write_text(tmp_path / "raw" / file, content if isinstance(content, str) else json.dumps(content))
    refused(named, "dcase2016-task2", tmp_path, **flags)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    flags = make_dcase2016(tmp_path)
    (tmp_path / "raw" / "test.json").unlink()
    refused("test.json", "dcase2016-task2", tmp_path, **flags)
