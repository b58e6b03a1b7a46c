"""ESC-50: 2,000 environmental recordings of 5 s in 50 classes and five folds."""

import csv
import json
from pathlib import Path

from data.audio import read_int16
from data.clip_store import Clip, ClipStoreWriter, Task
from prepare.report import PrepareReport
from settings import UserError

SOURCE = "K. J. Piczak: ESC: Dataset for Environmental Sound Classification, ACM Multimedia 2015"
LICENCE = "Creative Commons Attribution-NonCommercial 3.0 (ESC-10: Attribution 3.0), clips by their Freesound authors"
TASK: Task = "single_label"
LABELS: list[str] = json.loads((Path(__file__).parents[1] / "assets" / "esc50_labels.json").read_text())
CLIP_SECONDS = 5
COLUMNS = ("filename", "fold", "target", "category")


def prepare_esc50(raw: Path, store: Path, sample_rate: int) -> PrepareReport:
    """Write the store of a folder with meta/esc50.csv and audio/, as ESC-50 comes (or ESC-10, or other folds of it).

    Clips over 5 s are cut; shorter ones keep their length and are filled when they are read. Files that cannot be
    read are skipped and reported. Raises UserError where the table is missing or is none.
    """
    rows = read_meta(raw / "meta" / "esc50.csv")
    report = PrepareReport(store)
    with ClipStoreWriter(
        store, clip_samples=CLIP_SECONDS * sample_rate, sample_rate=sample_rate, labels=LABELS,
        dataset_type="esc-50", task=TASK, source=SOURCE, licence=LICENCE,
    ) as writer:  # fmt: skip
        for row in rows:
            try:
                waveform = read_int16(raw / "audio" / row["filename"], sample_rate)
                writer.add(Clip(row["filename"], waveform, [int(row["target"])], fold=int(row["fold"])))
            except UserError as error:
                report.skipped.append((row["filename"], str(error)))
                continue
            report.clips += 1
        if report.clips == 0:
            raise UserError(f"None of the {len(rows)} files of esc50.csv could be read.\n{report}")
    return report


def read_meta(path: Path) -> list[dict[str, str]]:
    """The rows of esc50.csv. Raises UserError for missing columns, and for classes that are not ESC-50's."""
    if not path.is_file():
        raise UserError(f"There is no {path}: --raw must be the folder that holds meta/ and audio/ of ESC-50.")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        lacking = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if lacking:
            raise UserError(f"{path} lacks the columns {', '.join(lacking)}; it has {reader.fieldnames}.")
        rows = list(reader)
    for number, row in enumerate(rows, start=2):
        target, fold = row["target"] or "", row["fold"] or ""
        if not (target.isdigit() and int(target) < len(LABELS) and row["category"] == LABELS[int(target)]):
            raise UserError(f"{path}, line {number}: class {target} {row['category']!r} is not one of ESC-50's.")
        if not (fold.isdigit() and 1 <= int(fold) <= 127):
            raise UserError(f"{path}, line {number}: fold {fold!r} is not a whole number from 1.")
    return rows
