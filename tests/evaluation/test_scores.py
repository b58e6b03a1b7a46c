"""The score store: written and read, joined from the shares of several jobs, and as sed_scores_eval's tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sed_scores_eval.base_modules.io import read_sed_scores

from evaluation.postprocess import PostProcessing
from evaluation.scores import Scores, export_tables, find_shards, import_tables, load_scores, shard_path

STEP = 10 / 32


def random_scores(clips: int = 7) -> Scores:
    rng = np.random.default_rng(0)
    return Scores(
        names=[f"{clip}.wav" for clip in range(clips)],
        clipwise=rng.random((clips, 3)).astype(np.float32),
        targets=rng.random((clips, 3)) > 0.5,
        durations=np.linspace(3, 10, clips),
        labels=["a", "b", "c"],
        framewise=rng.random((clips, 32, 3)).astype(np.float32),
        seconds_per_frame=STEP,
        events=[[(clip % 3, 0.5, 2.0 + clip / 10)] for clip in range(clips)],
        attributes={"split": "validation", "run_id": "one", "split_clips": clips},
    )


def write_shards(path: Path, count: int = 3) -> list[Path]:
    whole = random_scores()
    written = []
    for number in range(count):
        written.append(shard_path(path, number + 1, count))
        pick(whole, range(number, len(whole.names), count)).save(written[-1])
    return written


def pick(scores: Scores, clips: range) -> Scores:
    assert scores.framewise is not None
    assert scores.events is not None
    chosen = np.array(clips)
    return replace(
        scores,
        names=[scores.names[k] for k in clips],
        clipwise=scores.clipwise[chosen],
        targets=scores.targets[chosen],
        durations=scores.durations[chosen],
        framewise=scores.framewise[chosen],
        events=[scores.events[k] for k in clips],
        clip_index=chosen,
    )


def test_round_trip(tmp_path: Path) -> None:
    scores = random_scores()
    scores.save(tmp_path / "new" / "s.h5")
    again = load_scores(tmp_path / "new" / "s.h5")
    assert (again.names, again.labels, again.events) == (scores.names, scores.labels, scores.events)
    assert again.attributes == scores.attributes
    for name in ("clipwise", "targets", "durations", "framewise"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scores, name))
    assert again.clip_index is not None
    assert again.clip_index.tolist() == list(range(7))
    assert again.postprocessing is None
    with pytest.raises(ValueError, match="There is no score file"):
        load_scores(tmp_path / "missing.h5")
    (tmp_path / "text.h5").write_text("no scores")
    with pytest.raises(ValueError, match="is no score file"):
        load_scores(tmp_path / "text.h5")


def test_shards_are_joined_in_the_order_of_the_split(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "test.h5")
    assert find_shards(tmp_path / "test.h5") == shards
    pick(random_scores(), range(7)).save(shards[0])  # a job that went on longer than it had to
    whole, joined = random_scores(), load_scores(tmp_path / "test.h5")
    assert (joined.names, joined.events) == (whole.names, whole.events)
    for name in ("clipwise", "targets", "durations", "framewise"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


def test_shards_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.h5"
    shards = write_shards(path)
    content = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(ValueError, match=r"test\.shard2of3\.h5 is missing"):
        load_scores(path)
    shards[1].write_bytes(content[:2000])
    with pytest.raises(ValueError, match=r"shard2of3\.h5 is no score file, or it is cut off"):
        load_scores(path)
    clips = pick(random_scores(), range(1, 7, 3))
    replace(clips, attributes={**clips.attributes, "run_id": "two"}).save(shards[1])
    with pytest.raises(ValueError, match=r"different runs: .* not so test\.shard2of3\.h5"):
        load_scores(path)
    pick(clips, range(1)).save(shards[1])
    with pytest.raises(ValueError, match="hold 5 clips of 7"):
        load_scores(path)
    clips.save(shards[1])
    clips.save(shard_path(path, 1, 2))
    with pytest.raises(ValueError, match="Shards of different tests"):
        load_scores(path)
    random_scores().save(path)
    with pytest.raises(ValueError, match="There are both"):
        load_scores(path)


def test_some_classes() -> None:
    scores = random_scores()
    chosen = scores.select_classes(["c", "a"])
    assert chosen.framewise is not None
    assert scores.framewise is not None
    np.testing.assert_array_equal(chosen.framewise, scores.framewise[:, :, [2, 0]])
    assert chosen.events is not None
    assert chosen.events[:3] == [[(1, 0.5, 2.0)], [], [(0, 0.5, 2.2)]]
    with pytest.raises(ValueError, match="no class d; they have a, b, c"):
        scores.select_classes(["d"])


def test_postprocessing_follows_the_classes() -> None:
    post = PostProcessing(("c", "b", "a"), thresholds=(0.3, 0.2, 0.1))
    scores = replace(random_scores(), attributes={"postprocessing": pd.Series(post.as_dict()).to_json()})
    assert scores.postprocessing is not None
    assert scores.postprocessing.thresholds == (0.1, 0.2, 0.3)


def test_tables_of_sed_scores_eval_and_back(tmp_path: Path) -> None:
    scores = random_scores()
    assert scores.framewise is not None
    export_tables(scores, tmp_path / "tables")
    tables = read_sed_scores(tmp_path / "tables")
    assert sorted(tables) == [str(clip) for clip in range(7)]
    assert tables["0"].columns.tolist() == ["onset", "offset", "a", "b", "c"]
    assert (len(tables["0"]), tables["0"].offset.iloc[-1]) == (10, 3.0)  # the clip ends in its tenth step
    again = import_tables(tmp_path / "tables", scores)
    assert again.framewise is not None
    assert again.seconds_per_frame == pytest.approx(STEP)
    for clip, name in enumerate(scores.names):
        steps = len(tables[name.removesuffix(".wav")])
        np.testing.assert_allclose(again.framewise[clip, :steps], scores.framewise[clip, :steps], atol=1e-7)
        assert not again.framewise[clip, steps:].any()
    np.testing.assert_array_equal(again.clipwise, again.framewise.max(axis=1))
    assert again.events == scores.events
    export_tables(scores, tmp_path / "tables")  # the same clips: written again


def test_tables_that_do_not_fit(tmp_path: Path) -> None:
    scores, folder = random_scores(), tmp_path / "tables"
    with pytest.raises(ValueError, match="There is no folder"):
        import_tables(folder, scores)
    export_tables(scores, folder)
    with pytest.raises(ValueError, match=r"only in the folder \['6'\]"):
        import_tables(folder, pick(scores, range(6)))
    table = pd.read_csv(folder / "3.tsv", sep="\t")
    table.rename(columns={"b": "x"}).to_csv(folder / "3.tsv", sep="\t", index=False)
    with pytest.raises(ValueError, match=r"3\.tsv has the classes a, x, c"):
        import_tables(folder, scores)
    table.iloc[4:].to_csv(folder / "3.tsv", sep="\t", index=False)
    with pytest.raises(ValueError, match=r"3\.tsv: frames of one length"):
        import_tables(folder, scores)
    (folder / "notes.tsv").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        export_tables(scores, folder)
    twice = replace(scores, names=["x/0.wav", "y/0.wav", *scores.names[2:]])
    with pytest.raises(ValueError, match="the same name but for folder and ending"):
        export_tables(twice, tmp_path / "other")
    with pytest.raises(ValueError, match="--fl_local True"):
        export_tables(replace(scores, framewise=None), tmp_path / "other")
