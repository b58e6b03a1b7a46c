"""AudioSet: 10 s clips of YouTube in 527 classes -> HDF5 files in PANNs' layout, several processes at once."""

import csv
import math
from pathlib import Path

from data.clip_store import Task
from data.tables import read_text
from prepare.adapters import Flags
from prepare.packing import pack_parts
from prepare.segments import (
    AUDIOSET_LICENCE,
    AUDIOSET_SOURCE,
    CLASS_OF_MID,
    LABELS,
    AudiosetReport,
    Part,
    Segment,
    find_audio,
    index_audio,
    no_audio,
    write_details,
)
from settings import Config, UserError

NAME = "audioset"
SOURCE, LICENCE = AUDIOSET_SOURCE, AUDIOSET_LICENCE
TASK: Task = "multilabel"
FLAGS: Flags = {
    "raw": {"type": Path, "metavar": "FOLDER", "help": "folder of the audio, or of HDF5 files or data sets of it"},
    "segments": {"type": Path, "metavar": "FILE", "help": "CSV of the segments"},
    "processes": {"type": int, "metavar": "N", "help": "how many parts to pack at once [1]"},
}

SPLITS = ("balanced_train", "eval", "unbalanced_train")
CLIPS_PER_PART = 50_000  # of unbalanced_train


def prepare(settings: Config, raw: Path, segments: Path, processes: int = 1) -> AudiosetReport:
    """Pack the clips of one segments table from the audio below `raw`; files that an earlier run finished are kept.

    segments: balanced_train*.csv, eval*.csv or unbalanced_train*.csv, as AudioSet comes. raw: searched with its
    folders for `<YTID>` or `Y<YTID>`, also with the start (`_30`, `_30.000`, `_30000`), of any format of
    data.audio; prepare.segments.find_start finds the segment in a longer file. Writes below dataset_path
    hdf5s/waveforms/{balanced_train,eval}.h5, or hdf5s/waveforms/unbalanced_train/unbalanced_train_partNN.h5 of
    CLIPS_PER_PART lines each, with clips padded with zeros to 10 s, and a table hdf5s/reports/<split>.csv of the clips
    that are missing, corrupt, short or cut. A file without any clip is not written. processes: how many parts are
    packed at once; whole videos are decoded in full, 1.3 GB an hour of stereo. Raises UserError where a table or folder
    is missing or wrong, no audio is found, or a file there holds other clips.
    """
    split, dataset_path, rate = _split_of(segments), Path(settings.dataset_path), settings.sample_rate
    rows = read_segments(segments)
    left_out = AudiosetReport(dataset_path)
    audio = index_audio(raw, left_out)
    files = [find_audio(row, audio) for row in rows]
    if not any(files):
        raise no_audio(rows, segments, raw, audio)
    paths = part_paths(dataset_path, split, len(rows))
    size = CLIPS_PER_PART if split == "unbalanced_train" else len(rows)
    parts = [
        Part(path, rate, rows[number * size : (number + 1) * size], files[number * size : (number + 1) * size])
        for number, path in enumerate(paths)
    ]
    report = AudiosetReport(paths[0].parent if split == "unbalanced_train" else paths[0])
    report.others, report.unopened = left_out.others, left_out.unopened
    for done in pack_parts(parts, processes):
        report.add(done)
    write_details(report, dataset_path / "hdf5s" / "reports" / f"{split}.csv")
    if report.clips == 0:
        raise UserError(f"None of the clips could be read.\n{report}")
    return report


def _split_of(segments: Path) -> str:
    split = next((split for split in SPLITS if segments.name.startswith(split)), None)
    if split is None or segments.suffix.lower() != ".csv":
        names = ", ".join(f"{split}*.csv" for split in SPLITS)
        raise UserError(f"{segments} does not say by its name which clips it lists: it must be one of {names}.")
    return split


def read_segments(path: Path) -> list[Segment]:
    """The lines `YTID, start, end, "mid,mid"` of a segments table; lines that begin with # are comments.

    Raises UserError, with the line, for a wrong number of columns, start, class or an id that comes twice.
    """
    found: dict[str, Segment] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip() and not line.startswith("#"):
            segment = _parse_segment(line, f"{path}, line {number}")
            if segment.ytid in found:
                raise UserError(f"{path}, line {number}: {segment.ytid} is listed twice.")
            found[segment.ytid] = segment
    if not found:
        raise UserError(f'{path} lists no segments; its lines must read YTID, start, end, "mid,mid".')
    return list(found.values())


def _parse_segment(line: str, where: str) -> Segment:
    try:
        columns = next(csv.reader([line], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UserError(f"{where}: {error}.") from None
    if len(columns) != 4:
        raise UserError(f'{where}: {len(columns)} columns; there must be 4: YTID, start, end, "mid,mid".')
    ytid, start, end, mids = (column.strip() for column in columns)
    try:
        first, last = float(start), float(end)
    except ValueError:
        first = last = math.nan
    if not ytid or not 0 <= first < last < math.inf:
        raise UserError(f"{where}: {ytid!r} with start {start!r}, end {end!r}; an id and rising seconds are needed.")
    labels = []
    for mid in mids.split(","):
        if mid.strip() not in CLASS_OF_MID:
            raise UserError(
                f"{where}: class {mid.strip()!r} is not one of AudioSet's {len(LABELS)}, which "
                f"assets/audioset_labels.json lists, as /m/09x0r (Speech)."
            )
        labels.append(CLASS_OF_MID[mid.strip()])
    return Segment(ytid, first, last, tuple(labels))


def part_paths(dataset_path: Path, split: str, clips: int) -> list[Path]:
    """The files of a split, in the order of its table.

    Raises UserError where the folder has parts that are not among them: an index would include these.
    """
    waveforms = dataset_path / "hdf5s" / "waveforms"
    if split != "unbalanced_train":
        return [waveforms / f"{split}.h5"]
    count = -(-clips // CLIPS_PER_PART)
    digits = max(2, len(str(count - 1)))
    paths = [waveforms / split / f"{split}_part{number:0{digits}}.h5" for number in range(count)]
    others = sorted(set((waveforms / split).glob("*.h5")) - set(paths))
    if others:
        raise UserError(
            f"{others[0]} is not one of the {count} parts that {CLIPS_PER_PART} clips a part make: delete it, or give "
            f"another dataset_path."
        )
    return paths
