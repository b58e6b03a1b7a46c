"""python main.py evaluate: tables and score files in, tables, JSON and TSV out; what is wrong is named."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import main
from evaluation.detection import System, measure
from evaluation.event_tables import GroundTruth, read_events
from evaluation.scores import EventList, Scores
from tests.evaluation.examples import STEP, clip_names, events, on_grid, score_store
from tests.helpers import refused


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """truth.tsv, good.tsv, bad.tsv and durations.tsv of 20 clips; bad.tsv misses half of what good.tsv finds."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    true, good, bad = [], [], []
    for clip in range(20):
        for label in ("cat", "dog"):
            onset = rng.uniform(0, 6)
            offset = onset + rng.uniform(1, 3)
            true.append((f"{clip}.wav", onset, offset, label))
            found = (f"{clip}.wav", max(onset + rng.uniform(-0.3, 0.3), 0), offset + rng.uniform(-0.3, 0.3), label)
            good.append(found)
            bad.append(found if clip % 2 else (f"{clip}.wav", 9.0, 9.5, label))
    for name, rows in (("truth", true), ("good", good), ("bad", bad)):
        events(*rows).to_csv(tmp_path / f"{name}.tsv", sep="\t", index=False)
    clips = [f"{clip}.wav\t10.0" for clip in range(21)]
    (tmp_path / "durations.tsv").write_text("\n".join(["filename\tduration", *clips]) + "\n")
    return tmp_path


def evaluate(*words: str, detections: str = "good.tsv") -> int:
    given = ["--detections", detections, "--ground_truth", "truth.tsv", "--durations", "durations.tsv"]
    return main.main(["evaluate", *given, "--resamples", "60", *words])


def written(name: str) -> dict:
    return json.loads(Path(f"{name}_metrics.json").read_text())


def test_tables_to_metrics(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--output", "out/good") == 0
    shown = capsys.readouterr().out
    content = written("out/good")
    named = {(m["name"], m["criterion"]): m for m in content["metrics"]}
    assert [name for name, _ in named] == [
        "intersection F1", "intersection F1", "collar F1", "collar F1, onset only", "onset_f1_200ms",
        "onset_f1_50ms", "segment F1", "segment error rate", "PSDS1", "psds1_macro", "PSDS2", "clip F1",
    ]  # fmt: skip
    assert all(m["name"] in shown and m["tool"] in shown for m in content["metrics"])
    assert content["clips"] == 21
    first = named["intersection F1", "DTC = GTC = 0.5"]
    truth = GroundTruth.build(read_events(Path("truth.tsv")), dict.fromkeys(clip_names(21), 10.0), ["cat", "dog"])
    expected = measure(truth, System(read_events(Path("good.tsv"))))[0].metric
    assert (first["macro"], first["per_class"]) == (expected.macro, expected.per_class)
    assert f"{expected.macro:.4f}" in shown
    assert first["counts"]["cat"]["positives"] == 20
    assert first["intervals"]["macro"]["low"] <= first["macro"] <= first["intervals"]["macro"]["high"]
    assert first["intervals"]["cat"]["resamples"] == 60
    psds = next(m for m in content["metrics"] if m["name"] == "PSDS1")
    assert psds["intervals"] == {}
    assert "No interval" in psds["note"]
    assert psds["curve"]["false_alarms"][0] == 0
    with (tables / "out" / "good_metrics.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    macro = next(row for row in rows if row["metric"] == "intersection F1" and row["class"] == "macro")
    assert float(macro["value"]) == expected.macro
    cat = next(row for row in rows if row["metric"] == "segment F1" and row["class"] == "cat")
    assert cat["unit"] == "segments"
    assert int(cat["true_positives"]) + int(cat["false_negatives"]) == int(cat["positives"])
    assert not list(tables.rglob("*.partial"))


def test_two_systems_are_compared(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--compare", "bad.tsv", "--output", "both") == 0
    assert "Difference: good.tsv minus bad.tsv" in capsys.readouterr().out
    compared = written("both")["comparison"]
    collar = next(c for c in compared if c["name"] == "collar F1" and c["value"] == "micro")
    comparison = collar["comparison"]
    assert comparison["difference"] == pytest.approx(collar["first"] - collar["second"])
    assert comparison["difference"] > 0
    intersection = next(c["comparison"] for c in compared if c["name"] == "intersection F1")
    assert intersection["interval"]["low"] > 0
    assert intersection["p_value"] < 0.05
    assert "PSDS1" not in {c["name"] for c in compared}  # from one operating point each: no resamples
    assert evaluate("--compare", "good.tsv", "--output", "same") == 0
    same = written("same")["comparison"]
    assert {(c["comparison"]["difference"], c["comparison"]["p_value"]) for c in same} == {(0.0, 1.0)}


def test_more_operating_points_raise_psds(tables: Path) -> None:
    assert evaluate("--output", "one", detections="bad.tsv") == 0
    assert evaluate("--output", "two", detections="bad.tsv,good.tsv") == 0
    one, two = written("one"), written("two")
    values = [{m["name"] + m["criterion"].partition(";")[0]: m["macro"] for m in c["metrics"]} for c in (one, two)]
    changed = {name.partition("DTC")[0] for name in values[0] if values[0][name] != values[1][name]}
    assert changed == {"PSDS1", "psds1_macro", "PSDS2"}
    assert any("2 operating points" in m["criterion"] for m in two["metrics"])
    assert any("PSDS" in note and "bad.tsv" in note for note in two["notes"])


def test_what_is_odd_is_noted(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "1.wav\t1\t2\towl\n2.wav\t1\t2\towl\n3.wav\t11\t12\tcat\n4.wav\t0\t9\tdog\n"
    (tables / "odd.tsv").write_text((tables / "good.tsv").read_text() + more)
    with (tables / "truth.tsv").open("a") as file:
        file.write("0.wav\t9\t10\tcat\n0.wav\t9.5\t10\tcat\n")
    assert evaluate("--output", "odd", detections="odd.tsv") == 0
    content = written("odd")
    notes = "\n".join(content["notes"])
    for named in ("owl (2)", "1 overlapping detections", "1 detections in odd.tsv", "1 overlapping true events"):
        assert named in notes
    collar = next(m for m in content["metrics"] if m["name"] == "collar F1")
    assert collar["per_class"]["owl"] is None
    assert collar["counts"]["owl"] == {
        "true_positives": 0, "false_positives": 2, "false_negatives": 0, "positives": 0,
    }  # fmt: skip
    assert np.mean([collar["per_class"][k] for k in ("cat", "dog")]) == pytest.approx(collar["macro"])
    assert "owl (2)" in capsys.readouterr().out
    assert evaluate("--fl_class_num", "cat", "--output", "cat", detections="odd.tsv") == 0
    only = written("cat")["metrics"][0]
    assert list(only["per_class"]) == ["cat"]


def test_a_system_that_finds_nothing_scores_0(tables: Path) -> None:
    (tables / "empty.tsv").write_text("filename\tonset\toffset\tevent_label\n")
    assert evaluate("--output", "empty", detections="empty.tsv") == 0
    assert {m["macro"] for m in written("empty")["metrics"] if m["name"] != "segment error rate"} == {0.0}


def scores_of(tables: Path, noise: float, seed: int) -> Scores:
    """A score store whose frame scores are the truth of truth.tsv on the grid, and noise."""
    names, labels = clip_names(20), ["cat", "dog"]
    true: list[EventList] = [[] for _ in names]
    for name, onset, offset, label in read_events(tables / "truth.tsv").itertuples(index=False):
        true[names.index(name)].append((labels.index(label), onset, offset))
    random = np.random.default_rng(seed).uniform(0, noise, (20, 32, 2))
    framewise = (random + 0.55 * on_grid(true, random.shape, STEP)).astype(np.float32)
    scores = score_store(framewise, true, labels=labels)
    scores.targets[0, 0] = False
    return scores


def test_score_files(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clear, noisy = scores_of(tables, 0.2, 1), scores_of(tables, 0.65, 2)
    clear.save(tables / "clear.h5")
    noisy.select_clips(np.random.default_rng(0).permutation(20)).save(tables / "noisy.h5")  # in another order
    words = ["evaluate", "--scores", "clear.h5", "--resamples", "50"]
    assert main.main([*words, "--compare", "noisy.h5", "--output", "clear"]) == 0
    content = written("clear")
    named = {(m["name"], m["criterion"].partition(";")[0]): m for m in content["metrics"]}
    assert named["intersection F1", "DTC = GTC = 0.5"]["macro"] == 1
    psds = named["PSDS1", "DTC = GTC = 0.7, alpha_ST = 1, 100 / h"]
    assert psds["tool"] == "sed_scores_eval"
    assert psds["intervals"]["macro"]["low"] <= psds["macro"] <= psds["intervals"]["macro"]["high"]
    assert set(psds["class_curves"]) == {"cat", "dog"}
    assert named["clip mAP", "macro average precision"]["intervals"]["macro"]["resamples"] == 50
    compared = {(c["name"], c["value"]): c for c in content["comparison"]}
    assert compared["PSDS1", "macro"]["comparison"]["difference"] > 0
    assert main.main([*words, "--fl_threshold", "0.9", "--output", "high"]) == 0
    high = written("high")
    assert high["postprocessing"]["thresholds"] == [0.9, 0.9]
    assert high["metrics"][0]["macro"] == 0  # no score is so high
    assert next(m["macro"] for m in high["metrics"] if m["name"] == "PSDS1") == psds["macro"]
    assert main.main([*words, "--compare", "good.tsv", "--fl_class_num", "dog,cat"]) == 0
    assert "Difference: clear.h5 minus good.tsv" in capsys.readouterr().out
    clear.select_classes(["cat"]).save(tables / "cat.h5")
    assert "cat.h5 has no class dog" in refused(capsys, *words, "--compare", "cat.h5")
    (tables / "owl.tsv").write_text("filename\tonset\toffset\tevent_label\n1.wav\t1\t2\towl\n")
    assert "owl.tsv" in refused(capsys, *words, "--compare", "owl.tsv")


def test_wrong_inputs_are_named(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside = ["--ground_truth", "truth.tsv", "--durations", "durations.tsv"]
    good = ["--detections", "good.tsv", *beside]
    clear = scores_of(tables, 0.2, 1)
    clear.save(tables / "clear.h5")
    replace(clear, names=["other.wav", *clear.names[1:]]).save(tables / "other.h5")
    replace(clear, framewise=None, events=None).save(tables / "frameless.h5")
    replace(clear, events=None).save(tables / "timeless.h5")
    (tables / "unknown.tsv").write_text("filename\tonset\toffset\tevent_label\nz9.wav\t1\t2\tcat\n")
    for words, named in (
        (["--detections", "good.tsv"], "--ground_truth, --durations"),
        (["--scores", "a.h5", "--detections", "good.tsv"], "either --scores, or --detections"),
        (["--scores", "gone.h5"], "gone.h5"),
        (["--detections", "unknown.tsv", *beside], "z9.wav"),
        ([*good, "--compare", "unknown.tsv"], "z9.wav"),
        ([*good, "--resamples", "3"], "resamples = 3"),
        ([*good, "--fl_class_num", "owl"], "owl"),
        (["--detections", ",", *beside], "No table"),
        (["--scores", "clear.h5", "--compare", "other.h5"], "0.wav, other.wav"),
        (["--scores", "frameless.h5"], "frameless.h5 has no frame scores"),
        (["--scores", "clear.h5", "--compare", "frameless.h5"], "frameless.h5 has no frame scores"),
        (["--scores", "timeless.h5"], "timeless.h5 has no true events"),
    ):
        assert named in refused(capsys, "evaluate", *words)
