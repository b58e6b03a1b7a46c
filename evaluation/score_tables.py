"""Frame scores as the tables of sed_scores_eval: one a clip, in memory or in a folder of <clip>.tsv files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from data.tables import read_table, require_columns
from evaluation.postprocess import frame_edges
from evaluation.scores import Scores
from settings import UserError

SHOWN = 4  # names in a message


def score_tables(
    framewise: np.ndarray, *, names: Sequence[str], labels: list[str], durations: np.ndarray, seconds_per_frame: float
) -> dict[str, pd.DataFrame]:
    """(N, frames, K) scores -> {clip: table}, with the columns onset and offset (seconds) and one for each class."""
    from sed_scores_eval.base_modules.scores import create_score_dataframe  # here and below: it imports slowly

    tables = {}
    for clip, name in enumerate(names):
        edges = frame_edges(framewise.shape[1], seconds_per_frame, float(durations[clip]))
        inside = edges[1:] > edges[:-1]
        tables[name] = create_score_dataframe(
            framewise[clip][inside].astype(np.float64), np.append(edges[:-1][inside], edges[-1]), labels
        )
    return tables


def export_tables(scores: Scores, folder: Path) -> None:
    """Write frame scores into a folder, each clip as <clip>.tsv: its file's name without folder and ending.

    Raises UserError without frame scores, for two clips of one name, and for other files in the folder.
    """
    from sed_scores_eval.base_modules.io import write_sed_scores

    tables = score_tables(
        scores.frame_scores(), names=[table_name(name) for name in scores.names], labels=scores.labels,
        durations=scores.durations, seconds_per_frame=scores.seconds_per_frame,
    )  # fmt: skip
    if len(tables) < len(scores.names):
        raise UserError("Some clips have the same name but for folder and ending: their tables would be one file.")
    others = [p.name for p in folder.glob("*") if p.name.removesuffix(".tsv") not in tables] if folder.is_dir() else []
    if others:
        raise UserError(f"{folder} holds other files ({', '.join(others[:3])}, ...): give a new or empty folder.")
    write_sed_scores(tables, folder)


def table_name(name: str) -> str:
    """A clip's name in sed_scores_eval's tables: its file's name without folder and ending."""
    return Path(name).name.rpartition(".")[0] or Path(name).name


def import_tables(folder: Path, truth: Scores) -> Scores:
    """Frame scores of any system, in files as of export_tables, with the clips and the ground truth of a score store.

    A clip's score is the highest of its frames. Raises UserError, with their names, for clips and classes that are on
    one side only, and for frames of different lengths (the last one of a clip may be shorter).
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: --import_scores names a folder of <clip>.tsv files.")
    tables = {path.stem: _read_scores(path) for path in sorted(folder.glob("*.tsv"))}
    names = [table_name(name) for name in truth.names]
    if set(names) != tables.keys():
        ours, theirs = sorted(set(names) - tables.keys()), sorted(tables.keys() - set(names))
        raise UserError(
            f"{folder} and {truth.source} have different clips: only in the folder {theirs[:SHOWN]}, only in the score "
            f"file {ours[:SHOWN]}."
        )
    step = _frame_seconds(tables)
    framewise = np.zeros((len(names), max(len(table) for table in tables.values()), len(truth.labels)), np.float32)
    for clip, name in enumerate(names):
        classes = list(tables[name].columns[2:])
        if set(classes) != set(truth.labels):
            raise UserError(
                f"{name}.tsv has the classes {', '.join(classes)}; {truth.source} has {', '.join(truth.labels)}."
            )
        framewise[clip, : len(tables[name])] = tables[name][truth.labels].to_numpy()
    kept = {
        name: value for name, value in truth.attributes.items() if name not in ("postprocessing", "run_id", "weights")
    }
    return replace(truth, framewise=framewise, clipwise=framewise.max(axis=1), seconds_per_frame=step, attributes=kept)


def _read_scores(path: Path) -> pd.DataFrame:
    """onset, offset and a column a class, one row a frame. Raises UserError, with the line, for other than numbers."""
    columns, rows = read_table(path)
    require_columns(path, columns, ("onset", "offset"))
    order = ["onset", "offset", *(name for name in columns if name not in ("onset", "offset"))]
    return pd.DataFrame([[row.number(name) for name in order] for row in rows], columns=order)


def _frame_seconds(tables: Mapping[str, pd.DataFrame]) -> float:
    """The length of a frame in seconds; the last one of a clip may have another. Raises UserError for others."""
    lengths = {name: (table.offset - table.onset).to_numpy() for name, table in tables.items()}
    inner = {name: length[:-1] for name, length in lengths.items()}
    step = float(max(map(np.max, filter(len, inner.values())), default=max(map(np.max, lengths.values()))))
    for name, length in inner.items():
        if not np.allclose(length, step, rtol=0, atol=1e-5) or abs(tables[name].onset.iloc[0]) > 1e-5:
            raise UserError(f"{name}.tsv: frames must begin at 0 s and have one length, {step} s as in other tables.")
    return step
