"""DESED: domestic recordings with events of ten classes and their times, for testing localization."""

import json
from pathlib import Path

from prepare.folder import measure, read_event_rows, read_table, write_entries
from prepare.report import PrepareReport

SOURCE = (
    "N. Turpault, R. Serizel, A. Parag Shah, J. Salamon: Sound event detection in domestic environments with weakly "
    "labeled data and soundscape synthesis, DCASE Workshop 2019"
)
LICENCE = "as stated with the download of DESED; the clips are their authors'"
LABELS: list[str] = json.loads((Path(__file__).parents[1] / "assets" / "desed_labels.json").read_text())


def prepare_desed(raw: Path, store: Path, sample_rate: int, table: Path) -> PrepareReport:
    """Write the store of a folder of clips and a strong table, all for the split `test`.

    table: TSV with the columns filename, onset, offset, event_label, times in seconds; a clip without events has one
    line with the last three empty. A file that is not directly in `raw` is looked for in its folders. Clips are kept
    whole, whatever their length. Files that are missing or cannot be read are skipped and reported. Raises ValueError,
    with the line, for classes other than DESED's ten, offsets that are not after their onset, and events that end over
    0.5 s after their clip (less is cut).
    """
    if not raw.is_dir():
        raise ValueError(f"There is no folder {raw}: --raw must be the folder of DESED's clips.")
    entries = read_event_rows(table, *read_table(table))
    for entry in entries:
        entry.split = "test"
        for event in entry.events:
            if event.label not in LABELS:
                raise ValueError(f"{event.place}: {event.label!r} is none of DESED's classes: {', '.join(LABELS)}.")
    report = PrepareReport(store)
    entries = measure(entries, raw, report)
    write_entries(entries, LABELS, sample_rate, report, dataset_type="desed", source=SOURCE, licence=LICENCE)
    return report
