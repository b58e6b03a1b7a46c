"""The score store: written and read, joined from the shares of several jobs, and as sed_scores_eval's tables."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from sed_scores_eval.base_modules.io import read_sed_scores

from evaluation.calibration import calibrate
from evaluation.postprocess import PostProcessing
from evaluation.score_tables import export_tables, import_tables
from evaluation.scores import Scores, find_shards, load_scores, shard_path
from evaluation.systems import system_of_scores, truth_of_scores
from settings import UserError
from tests.evaluation.examples import STEP, score_store

COLUMNS = ("clipwise", "targets", "durations", "framewise", "clip_index")


@pytest.fixture(scope="module")
def scores() -> Scores:
    framewise = np.random.default_rng(0).random((7, 32, 3)).astype(np.float32)
    true = [[(clip % 3, 0.5, 2.0 + clip / 10)] for clip in range(7)]
    made = score_store(framewise, true, seconds=np.linspace(3, 10, 7), split="validation", run_id="one", split_clips=7)
    return replace(made, clip_index=np.arange(7))


def write_shards(scores: Scores, path: Path, count: int = 3) -> list[Path]:
    shards = [shard_path(path, number + 1, count) for number in range(count)]
    for number, shard in enumerate(shards):
        scores.select_clips(range(number, 7, count)).save(shard)
    return shards


def check_equal(one: Scores, other: Scores) -> None:
    for name in ("names", "labels", "events", "attributes"):
        assert getattr(one, name) == getattr(other, name)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_round_trip(scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.h5"
    replace(scores, clip_index=None).save(path)
    again = load_scores(path)
    check_equal(again, scores)
    assert (again.path, again.seconds_per_frame, again.postprocessing) == (path, STEP, None)
    with pytest.raises(UserError, match=r"missing\.h5"):
        load_scores(tmp_path / "missing.h5")
    (tmp_path / "text.h5").write_text("no scores")
    with pytest.raises(UserError, match=r"text\.h5"):
        load_scores(tmp_path / "text.h5")


def cut_name(file: h5py.File) -> None:
    del file["audio_name"]
    file["audio_name"] = np.array([b"\xff"] * 7)


def huge(file: h5py.File) -> None:
    del file["clipwise"]
    file.create_dataset("clipwise", (2**40, 3), "f4", chunks=(1024, 3))


def nested(file: h5py.File) -> None:
    file.attrs["postprocessing"] = "[" * 30_000


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file["framewise"].write_direct(np.full((7, 32, 3), np.nan, "f4")), "framewise"),
        (lambda file: file["clipwise"].write_direct(np.full((7, 3), np.inf, "f4")), "clipwise"),
        (lambda file: file["event_class"].write_direct(np.full(7, 77, "i2")), "class 77"),
        (lambda file: file["event_class"].write_direct(np.full(7, -1, "i2")), "class -1"),
        (lambda file: file["event_clip"].write_direct(np.full(7, -1, "i4")), "clip -1"),
        (lambda file: file["event_onset"].write_direct(np.full(7, 99.0)), "from 99"),
        (lambda file: file["event_offset"].write_direct(np.full(7, np.nan)), "nan"),
        (lambda file: file["duration"].write_direct(np.full(7, 1e12)), "duration"),
        (lambda file: file["duration"].write_direct(np.full(7, np.nan)), "duration"),
        (lambda file: file.attrs.update(seconds_per_frame=0.0), "frames of 0 s"),
        (lambda file: file.attrs.update(seconds_per_frame="x"), "x"),
        (lambda file: file.attrs.update(labels=["a", "b", "b"]), "labels"),
        (lambda file: file.attrs.update(labels=["a", "b"]), "clipwise"),
        (lambda file: file.attrs.update(postprocessing='{"labels": {"a": 1}}'), "postprocessing"),
        (lambda file: file.attrs.update(postprocessing='{"labels": ["a"], "thresholds": [[1]]}'), "thresholds"),
        (nested, ""), (cut_name, ""), (huge, "clipwise"), (lambda file: file.pop("target"), "target"),
    ],
)  # fmt: skip
def test_a_damaged_store_is_refused_by_name(
    damage: Callable[[h5py.File], object], said: str, scores: Scores, tmp_path: Path
) -> None:
    scores.save(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        damage(file)
    with pytest.raises(UserError, match=rf"s\.h5.*{said}"):
        load_scores(tmp_path / "s.h5")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("framewise", np.nan, "framewise"),
        ("clipwise", np.inf, "clipwise"),
        ("duration", 1e12, "duration"),
        ("duration", 0, "duration"),
        ("event_class", 77, "class 77"),
        ("event_clip", 7, "clip 7"),
        ("event_onset", np.nan, "event"),
        ("event_offset", 0.1, "event"),
        ("seconds_per_frame", 0, "0 s"),
        ("labels", ["a", "a", "b"], "labels"),
        ("labels", ["a", "b"], "clipwise"),
        ("postprocessing", "[" * 50_000, "damaged"),
        ("postprocessing", "{", "damaged"),
        ("postprocessing", '{"labels": 3}', "damaged"),
    ],
)
def test_a_score_file_that_is_wrong_inside_is_refused(
    scores: Scores, tmp_path: Path, key: str, value: object, named: str
) -> None:
    scores.save(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        if key in file:
            file[key][(0,) * file[key].ndim] = value
        else:
            file.attrs[key] = value
    with pytest.raises(UserError, match=named):
        load_scores(tmp_path / "s.h5")


@pytest.mark.parametrize(
    "use",
    [
        lambda scores: system_of_scores(scores, PostProcessing(("a", "b", "c"))),
        lambda scores: calibrate(scores, "collar_f1"),
        lambda scores: export_tables(scores, Path("tables")),
    ],
)
def test_a_store_without_frame_scores_is_refused_by_name(
    scores: Scores, tmp_path: Path, use: Callable[[Scores], object]
) -> None:
    """As of a network without a time axis, or of a test without --fl_local True: it has no events either."""
    replace(scores, framewise=None, events=None).save(tmp_path / "clips.h5")
    with pytest.raises(UserError, match=r"clips\.h5 has no frame scores.*time axis"):
        use(load_scores(tmp_path / "clips.h5"))


def test_a_class_with_a_backslash_is_refused_by_name(scores: Scores) -> None:
    with pytest.raises(UserError, match=r"b\\c"):
        truth_of_scores(replace(scores, labels=["a", "b\\c", "d"]))


@pytest.mark.parametrize("use", [truth_of_scores, lambda scores: calibrate(scores, "collar_f1")])
@pytest.mark.parametrize("events", [None, [[]] * 7])
def test_a_store_without_events_is_refused_by_name(
    scores: Scores, tmp_path: Path, events: list | None, use: Callable[[Scores], object]
) -> None:
    replace(scores, events=events).save(tmp_path / "timeless.h5")
    with pytest.raises(UserError, match=r"timeless\.h5 has no true events"):
        use(load_scores(tmp_path / "timeless.h5"))


def test_shards_are_joined_in_the_order_of_the_split(scores: Scores, tmp_path: Path) -> None:
    shards = write_shards(scores, tmp_path / "test.h5")
    assert find_shards(tmp_path / "test.h5") == shards
    scores.save(shards[0])  # a job that scored more clips than its share
    joined = load_scores(tmp_path / "test.h5")
    check_equal(joined, scores)
    assert joined.path == tmp_path / "test.h5"


def test_shards_that_are_refused(scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "test.h5"
    shards = write_shards(scores, path)
    second = load_scores(shards[1])

    def refused(named: str) -> None:
        with pytest.raises(UserError, match=named):
            load_scores(path)

    content = shards[1].read_bytes()
    shards[1].unlink()
    refused(r"test\.shard2of3\.h5 is missing")
    shards[1].write_bytes(content[:2000])
    refused(r"shard2of3\.h5")
    replace(second, attributes={**second.attributes, "run_id": "two"}).save(shards[1])
    refused(r"different runs: .*test\.shard2of3\.h5")
    second.select_clips([0]).save(shards[1])
    refused("6 clips of 7")
    second.save(shards[1])
    second.save(shard_path(path, 1, 2))
    refused("different tests")
    scores.save(path)
    refused("both")


def test_some_classes_and_clips(scores: Scores) -> None:
    chosen = scores.select_classes(["c", "a"])
    np.testing.assert_array_equal(chosen.frame_scores(), scores.frame_scores()[:, :, [2, 0]])
    assert chosen.true_events()[:3] == [[(1, 0.5, 2.0)], [], [(0, 0.5, 2.2)]]
    with pytest.raises(UserError, match="no class d"):
        scores.select_classes(["d"])
    check_equal(scores.select_clips([3, 1, 0, 2, 4, 6, 5]).in_order(scores.names), scores)
    with pytest.raises(UserError, match=r"6\.wav"):
        scores.in_order(scores.names[:6])


def test_postprocessing_follows_the_classes(scores: Scores) -> None:
    post = PostProcessing(("c", "b", "a"), thresholds=(0.3, 0.2, 0.1))
    found = replace(scores, attributes={"postprocessing": json.dumps(post.as_dict())}).postprocessing
    assert found is not None
    assert found.thresholds == (0.1, 0.2, 0.3)


def test_tables_of_sed_scores_eval_and_back(scores: Scores, tmp_path: Path) -> None:
    export_tables(scores, tmp_path / "tables")
    tables = read_sed_scores(tmp_path / "tables")
    assert sorted(tables) == [str(clip) for clip in range(7)]
    assert tables["0"].columns.tolist() == ["onset", "offset", "a", "b", "c"]
    assert (len(tables["0"]), tables["0"].offset.iloc[-1]) == (10, 3.0)  # the clip ends in its tenth step
    again = import_tables(tmp_path / "tables", replace(scores, framewise=None))  # the store has the truth only
    assert again.seconds_per_frame == pytest.approx(STEP)
    for clip, found in enumerate(again.frame_scores()):
        steps = len(tables[str(clip)])
        np.testing.assert_allclose(found[:steps], scores.frame_scores()[clip, :steps], atol=1e-7)
        assert not found[steps:].any()
    np.testing.assert_array_equal(again.clipwise, again.frame_scores().max(axis=1))
    assert again.events == scores.events
    export_tables(scores, tmp_path / "tables")  # the same clips: written again


def test_tables_that_do_not_fit(scores: Scores, tmp_path: Path) -> None:
    folder = tmp_path / "tables"

    def refused(named: str, store: Scores = scores) -> None:
        with pytest.raises(UserError, match=named):
            import_tables(folder, store)

    refused("tables")  # there is no such folder
    export_tables(scores, folder)
    refused(r"\['6'\]", scores.select_clips(range(6)))
    table = pd.read_csv(folder / "3.tsv", sep="\t")
    table.rename(columns={"b": "x"}).to_csv(folder / "3.tsv", sep="\t", index=False)
    refused(r"3\.tsv has the classes a, x, c")
    table.iloc[4:].to_csv(folder / "3.tsv", sep="\t", index=False)
    refused(r"3\.tsv")
    (folder / "notes.tsv").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.tsv"):
        export_tables(scores, folder)
    with pytest.raises(UserError, match="same name"):
        export_tables(replace(scores, names=["x/0.wav", "y/0.wav", *scores.names[2:]]), tmp_path / "other")
