"""DCASE 2016 task 2 (office sounds) in the layout of HEAR's preprocessed tasks: events in recordings of two minutes."""

from pathlib import Path
from typing import Any

from data.clip_store import STRONG, Task, store_path
from data.files import read_json
from data.finding import find_audio
from data.tables import TimedLabel, read_table, require_columns
from prepare.adapters import Flags
from prepare.report import PrepareReport
from prepare.tables import Entry, lasts, measure, require_folder, write_entries
from settings import Config, UserError

NAME = "dcase2016-task2"
SOURCE = (
    "A. Mesaros et al.: Detection and Classification of Acoustic Scenes and Events: Outcome of the DCASE 2016 "
    "Challenge, IEEE/ACM TASLP 2018; J. Turian et al.: HEAR: Holistic Evaluation of Audio Representations, NeurIPS "
    "2021 Competitions and Demonstrations"
)
LICENCE = "as stated with the download of HEAR's tasks"
TASK: Task = "multilabel"
FLAGS: Flags = {
    "raw": {"type": Path, "metavar": "FOLDER", "help": "folder of the task, with train.json and 16000/train"},
    "segment_seconds": {"type": float, "metavar": "SECONDS", "help": "cut recordings into clips so long [10]"},
}

SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # HEAR's name: the store's


def prepare(settings: Config, raw: Path, segment_seconds: float = 10.0) -> PrepareReport:
    """Write the store of HEAR's task folder `raw`, each recording cut into clips that stay in its split.

    The folder has task_metadata.json, labelvocabulary.csv (idx, label: the order of the classes), train.json,
    valid.json and test.json ({file: [{"label", "start", "end"}, ...]}, in ms), and the audio as <rate>/<split>/<file>;
    the rate that is sample_rate is taken, else the highest. Recordings that cannot be read are skipped and reported.
    Raises UserError for another kind of task, unknown classes, wrong times, and missing tables.
    """
    require_folder(raw, "the folder of HEAR's task, as tasks/dcase2016_task2-hear2021-full")
    if not lasts(segment_seconds):
        raise UserError(f"--segment_seconds {segment_seconds:g} is too short for a clip.")
    labels = read_vocabulary(raw)
    rates = sorted(int(path.name) for path in raw.iterdir() if path.is_dir() and path.name.isdecimal())
    if not rates:
        raise UserError(
            f"{raw} has no folder of audio, as 16000: it must be that of a task that HEAR has preprocessed."
        )
    audio = raw / str(settings.sample_rate if settings.sample_rate in rates else rates[-1])
    report = PrepareReport(store_path(settings.dataset_path, NAME), split_by="as HEAR's")
    entries = [entry for name, split in SPLITS.items() for entry in read_split(raw, name, split, audio, labels)]
    report.add_left_out(find_audio(audio), audio, used=len(entries))
    write_entries(
        measure(entries, audio, report), labels, settings.sample_rate, report,
        segment_seconds=segment_seconds, dataset_type=NAME, task=TASK, source=SOURCE, licence=LICENCE,
    )  # fmt: skip
    return report


def read_vocabulary(raw: Path) -> list[str]:
    """The classes in their order. Raises UserError where the task is not one of events, or a number lacks."""
    kind = _read(raw / "task_metadata.json").get("embedding_type", "event")
    if kind != "event":
        raise UserError(f"{raw / 'task_metadata.json'}: embedding_type is {kind!r}, and a task of events is needed.")
    table = raw / "labelvocabulary.csv"
    columns, rows = read_table(table)
    require_columns(table, columns, ("idx", "label"))
    labels = {row.cells["idx"]: row.cells["label"] for row in rows}
    order = [str(number) for number in range(len(rows))]
    if set(labels) != set(order) or len(set(labels.values())) != len(labels):
        raise UserError(f"{table}: idx must be 0 to {len(rows) - 1}, and no label may come twice.")
    return [labels[number] for number in order]


def read_split(raw: Path, name: str, split: str, audio: Path, labels: list[str]) -> list[Entry]:
    """The recordings of a split and their events, in seconds, in the order of its file."""
    table = raw / f"{name}.json"
    entries = []
    for file, listed in _read(table).items():
        where = f"{table}, {file}"
        if Path(file).name != file or not isinstance(listed, list):
            raise UserError(f"{where}: the name of a file and a list of events are needed.")
        events = [_event(where, each, labels) for each in listed]
        entries.append(
            Entry(
                f"{name}/{file}", {event.label for event in events}, events, split, path=audio / name / file,
                labelling=STRONG,
            )
        )  # fmt: skip
    return entries


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"There is no {path}: --raw must be the folder of a task that HEAR has preprocessed.")
    return dict(read_json(path, dict))


def _event(where: str, given: Any, labels: list[str]) -> TimedLabel:
    """An event of a recording. where: the file, for messages."""
    times: list[Any] = [given.get(name) for name in ("start", "end")] if isinstance(given, dict) else [None]
    if not all(isinstance(time, (int, float)) for time in times) or not 0 <= times[0] <= times[1]:
        raise UserError(f"{where}: {given!r:.200} is no event: label, and start and end in ms are needed.")
    if given.get("label") not in labels:
        raise UserError(f"{where}: {given.get('label')!r} is no class of labelvocabulary.csv: {', '.join(labels)}.")
    return TimedLabel(where, given["label"], times[0] / 1000, times[1] / 1000)
