"""python main.py evaluate: tables and score files in, tables, JSON and TSV out; what is wrong is named."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import main
from evaluation.detection import intersection_f1
from evaluation.postprocess import EVENT_COLUMNS
from evaluation.scores import Scores

STEP = 0.3125


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
    write(tmp_path / "truth.tsv", true)
    write(tmp_path / "good.tsv", good)
    write(tmp_path / "bad.tsv", bad)
    clips = [f"{clip}.wav\t10.0" for clip in range(21)]
    (tmp_path / "durations.tsv").write_text("\n".join(["filename\tduration", *clips]) + "\n")
    return tmp_path


def write(path: Path, rows: list[tuple[str, float, float, str]]) -> None:
    pd.DataFrame(rows, columns=EVENT_COLUMNS).to_csv(path, sep="\t", index=False)


def evaluate(*words: str, detections: str = "good.tsv") -> int:
    given = ["--detections", detections, "--ground_truth", "truth.tsv", "--durations", "durations.tsv"]
    return main.main(["evaluate", *given, "--resamples", "100", *words])


def test_tables_to_metrics(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--output", "out/good") == 0
    shown = capsys.readouterr().out
    content = json.loads((tables / "out" / "good_metrics.json").read_text())
    named = {(m["name"], m["criterion"]): m for m in content["metrics"]}
    assert [name for name, _ in named] == [
        "intersection F1", "intersection F1", "collar F1", "collar F1, onset only", "segment F1", "segment error rate",
        "PSDS1", "PSDS1, macro mean", "PSDS2", "clip F1",
    ]  # fmt: skip
    assert all(m["name"] in shown and m["tool"] in shown for m in content["metrics"])
    assert content["clips"] == 21
    first = named["intersection F1", "DTC = GTC = 0.5"]
    expected = intersection_f1(
        pd.read_csv("good.tsv", sep="\t"), pd.read_csv("truth.tsv", sep="\t"),
        {f"{clip}.wav": 10.0 for clip in range(21)}, labels=["cat", "dog"],
    )  # fmt: skip
    assert (first["macro"], first["per_class"]) == (expected.macro, expected.per_class)
    assert f"{expected.macro:.4f}" in shown
    assert first["counts"]["cat"]["positives"] == 20
    assert first["intervals"]["macro"]["low"] <= first["macro"] <= first["intervals"]["macro"]["high"]
    assert first["intervals"]["cat"]["resamples"] == 100
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
    compared = json.loads((tables / "both_metrics.json").read_text())["comparison"]
    collar = next(c for c in compared if c["name"] == "collar F1" and c["value"] == "micro")
    comparison = collar["comparison"]
    assert comparison["difference"] == pytest.approx(collar["first"] - collar["second"])
    assert comparison["difference"] > 0
    intersection = next(c["comparison"] for c in compared if c["name"] == "intersection F1")
    assert intersection["interval"]["low"] > 0
    assert intersection["p_value"] < 0.05
    assert "PSDS1" not in {c["name"] for c in compared}  # from one operating point each: no resamples
    assert evaluate("--compare", "good.tsv", "--output", "same") == 0
    same = json.loads((tables / "same_metrics.json").read_text())["comparison"]
    assert {(c["comparison"]["difference"], c["comparison"]["p_value"]) for c in same} == {(0.0, 1.0)}


def test_more_operating_points_raise_psds(tables: Path) -> None:
    assert evaluate("--output", "one", detections="bad.tsv") == 0
    assert evaluate("--output", "two", detections="bad.tsv,good.tsv") == 0
    one, two = (json.loads((tables / f"{name}_metrics.json").read_text()) for name in ("one", "two"))
    values = [{m["name"] + m["criterion"].partition(";")[0]: m["macro"] for m in c["metrics"]} for c in (one, two)]
    changed = {name.partition("DTC")[0] for name in values[0] if values[0][name] != values[1][name]}
    assert changed == {"PSDS1", "PSDS1, macro mean", "PSDS2"}
    assert any("2 operating points" in m["criterion"] for m in two["metrics"])
    assert "All but PSDS is of the first table, bad.tsv." in two["notes"]


def test_what_is_odd_is_noted(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "1.wav\t1\t2\towl\n2.wav\t1\t2\towl\n3.wav\t11\t12\tcat\n4.wav\t0\t9\tdog\n"
    (tables / "odd.tsv").write_text((tables / "good.tsv").read_text() + more)
    assert evaluate("--output", "odd", detections="odd.tsv") == 0
    notes = "\n".join(json.loads((tables / "odd_metrics.json").read_text())["notes"])
    assert "never true: owl (2)" in notes
    assert "1 overlapping detections" in notes
    assert "1 detections in odd.tsv begin behind the end" in notes
    collar = next(
        m for m in json.loads((tables / "odd_metrics.json").read_text())["metrics"] if m["name"] == "collar F1"
    )
    assert collar["per_class"]["owl"] is None
    assert collar["counts"]["owl"] == {
        "true_positives": 0, "false_positives": 2, "false_negatives": 0, "positives": 0,
    }  # fmt: skip
    assert np.mean([collar["per_class"][k] for k in ("cat", "dog")]) == pytest.approx(collar["macro"])
    assert "never true: owl" in capsys.readouterr().out
    assert evaluate("--fl_class_num", "cat", "--output", "cat", detections="odd.tsv") == 0
    only = json.loads((tables / "cat_metrics.json").read_text())["metrics"][0]
    assert list(only["per_class"]) == ["cat"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--detections", "good.tsv"], "evaluate lacks --ground_truth, --durations"),
        (["--scores", "a.h5", "--detections", "good.tsv"], "Give either --scores, or --detections"),
        (["--scores", "gone.h5"], "There is no score file gone.h5"),
    ],
)
def test_missing_inputs_are_named(
    tables: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main.main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err


def test_wrong_inputs_are_named(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str, detections: str = "good.tsv") -> str:
        assert evaluate(*words, detections=detections) == 2
        return capsys.readouterr().err

    (tables / "unknown.tsv").write_text("filename\tonset\toffset\tevent_label\nz9.wav\t1\t2\tcat\n")
    assert "do not know: z9.wav" in refused(detections="unknown.tsv")
    assert "do not know: z9.wav" in refused("--compare", "unknown.tsv")
    assert "resamples = 3 is not allowed" in refused("--resamples", "3")
    assert "owl has no true events" in refused("--fl_class_num", "owl")
    assert "No table of detections" in refused(detections=",")
    (tables / "empty.tsv").write_text("filename\tonset\toffset\tevent_label\n")
    assert evaluate(detections="empty.tsv") == 0  # a system that finds nothing scores 0
    assert "0.0000" in capsys.readouterr().out


def scores_of(tables: Path, noise: float, seed: int) -> Scores:
    """A score file's content whose frame scores are the truth of truth.tsv on the grid, and noise."""
    truth = pd.read_csv(tables / "truth.tsv", sep="\t")
    rng, labels = np.random.default_rng(seed), ["cat", "dog"]
    names = [f"{clip}.wav" for clip in range(20)]
    framewise = rng.uniform(0, noise, (20, 32, 2)).astype(np.float32)
    events: list[list[tuple[int, float, float]]] = [[] for _ in names]
    for name, onset, offset, label in truth.to_numpy().tolist():
        clip, k = names.index(name), labels.index(label)
        events[clip].append((k, onset, offset))
        framewise[clip, round(onset / STEP) : round(offset / STEP), k] += 0.55
    targets = np.ones((20, 2), dtype=bool)
    targets[0, 0] = False
    return Scores(names, framewise.max(axis=1), targets, np.full(20, 10.0), labels, framewise, STEP, events)


def test_score_files(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clear, noisy = scores_of(tables, 0.2, 1), scores_of(tables, 0.65, 2)
    clear.save(tables / "clear.h5")
    noisy.save(tables / "noisy.h5")
    words = ["evaluate", "--scores", "clear.h5", "--resamples", "50"]
    assert main.main([*words, "--compare", "noisy.h5", "--output", "clear"]) == 0
    content = json.loads((tables / "clear_metrics.json").read_text())
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
    high = json.loads((tables / "high_metrics.json").read_text())
    assert high["postprocessing"]["thresholds"] == [0.9, 0.9]
    assert high["metrics"][0]["macro"] == 0  # no score is so high
    assert next(m["macro"] for m in high["metrics"] if m["name"] == "PSDS1") == psds["macro"]
    assert main.main([*words, "--compare", "good.tsv"]) == 0
    assert "Difference: clear.h5 minus good.tsv" in capsys.readouterr().out
    clear.select_classes(["cat"]).save(tables / "cat.h5")
    assert main.main([*words, "--compare", "cat.h5"]) == 2
    assert "know no class dog" in capsys.readouterr().err


def test_score_files_of_other_clips_are_refused(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clear = scores_of(tables, 0.2, 1)
    clear.save(tables / "clear.h5")
    Scores(**{**vars(clear), "names": ["other.wav", *clear.names[1:]]}).save(tables / "other.h5")
    Scores(**{**vars(clear), "framewise": None}).save(tables / "frameless.h5")
    Scores(**{**vars(clear), "events": None}).save(tables / "timeless.h5")
    for words, message in (
        (["--scores", "clear.h5", "--compare", "other.h5"], "different clips: only in one of them ['0.wav', 'other"),
        (["--scores", "frameless.h5"], "no frame scores"),
        (["--scores", "timeless.h5"], "no true events"),
    ):
        assert main.main(["evaluate", *words]) == 2
        assert message in capsys.readouterr().err
