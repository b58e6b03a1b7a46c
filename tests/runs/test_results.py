"""The results ledger: what a test adds, how lines are read, chosen and averaged, and what `results` prints."""

import csv
import hashlib
import json
import multiprocessing
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.clip_store import ClipTable
from evaluation.mapping import ClassMapping
from evaluation.metrics import Metric
from model.checkpoint import Checkpoint
from runs import testing
from runs.ledger import (
    Result,
    append_result,
    file_sha256,
    joint_settings_hash,
    newest,
    over_seeds,
    read_results,
    settings_hash,
)
from runs.members import Member
from runs.testing import mapping_name, summarize
from settings import resolve
from tests.helpers import LEAN, LEAN_FLAGS, call, flags, refused, save_network, tiny

METRIC = Metric("mAP", 0.5, "macro average precision", 3, 10, 10)
NOTHING = np.zeros(0, dtype=np.int64)
TABLE = ClipTable([Path("demo.h5")], np.zeros(0, "S1"), np.zeros((0, 10), bool), NOTHING, NOTHING, NOTHING, NOTHING)


def result(value: float | None = 0.5, **changes: Any) -> Result:
    interval = {"low": 0.4, "high": 0.6, "level": 0.95, "resamples": 1000}
    about = {"criterion": "c", "clips": 20, "classes": 10, "all_classes": 10}
    fields = {
        "date": "2025-01-02T03:04:05+00:00", "kind": "single", "dataset_type": "demo", "split": "test",
        "protocol": "held_out", "esc_fold": None, "clips": 20, "tta_shifts": [0], "settings_hash": "ab" * 8,
        "random_seed": 1, "data_fingerprint": "cd" * 8, "git_revision": "1234567+", "device": "CPU",
        "checkpoints": [{"path": "workspace/runs/mine/checkpoints/best.ckpt", "sha256": f"{value}" * 3}],
        "metrics": [
            {"name": "mAP", "value": value, **about, "interval": interval},
            {"name": "d_prime", "value": None, **about},
        ],
    }  # fmt: skip
    return Result.model_validate({**fields, **changes})


def write(path: Path, *results: Result) -> Path:
    for each in results:
        append_result(path, each)
    return path


def test_a_line_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path / "new" / "results.jsonl", result(), result(0.25, random_seed=[1, 2]))
    written = [result(), result(0.25, random_seed=[1, 2])]
    assert read_results(path) == (written, [])
    with path.open("a") as file:  # as a later version may write it
        file.write(json.dumps({**result().model_dump(), "energy_joules": 3}) + "\n")
    assert read_results(path) == ([*written, result()], [])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["metrics"][0]["interval"]["low"] == 0.4
    assert lines[0]["metrics"][1]["value"] is None


def append_many(path: Path, start: int) -> None:
    for number in range(50):
        append_result(path, result(0.5, device="x" * 3000, random_seed=start + number))


def test_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_many, args=(path, start)) for start in (0, 100, 200)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found, broken = read_results(path)
    assert broken == []
    seeds = [each.random_seed for each in found if isinstance(each.random_seed, int)]
    assert sorted(seeds) == [start + number for start in (0, 100, 200) for number in range(50)]


def test_broken_lines_are_named_and_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "results.jsonl", result())
    whole = path.read_bytes()
    path.write_bytes(whole + b"\n[1]\n" + whole.replace(b'"held_out"', b"7") + b"\xff\xfe\n" + whole[:100])
    append_result(path, result(0.75))  # after a line that was cut off
    found, broken = read_results(path)
    assert found == [result(), result(0.75)]
    assert [int(message.split("line ")[1].split(",")[0]) for message in broken] == [3, 4, 5, 6]
    assert "protocol" in broken[1]


@pytest.mark.parametrize("text", [None, "", "\n \n"])
def test_without_results(tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    if text is not None:
        path.write_text(text)
    assert str(path) in refused(capsys, "results", "--results_path", path)


def test_settings_hash_is_that_of_the_experiment() -> None:
    base = resolve({"dataset_type": "esc-50"}).model_dump()
    same: dict[str, Any] = {
        "random_seed": 7, "esc_fold": 3, "exp_name": "other", "workspace": "/elsewhere", "devices": 4, "num_workers": 9,
        "accelerator": "gpu", "tta_shifts": [0, 100], "test_split": "train", "results_path": "x",
        "gradient_checkpointing": True, "performance": "manual", "compile": "default", "esm_together": True,
        "wa_top_k": 3, "wa_test": True, "wa_reestimate_bn": True,
    }  # fmt: skip
    assert settings_hash({**base, **same}) == settings_hash(base)
    assert settings_hash(dict(reversed(base.items()))) == settings_hash(base)
    other: dict[str, Any] = {
        "learning_rate": 0.5, "batch_size": 8, "htsat_dim": 48, "mixup_alpha": 0.1, "protocol": "paper",
        "precision": "bf16-mixed", "resume_checkpoint": "audioset.ckpt", "loss_type": "clip_bce",
    }  # fmt: skip
    hashes = {settings_hash({**base, name: value}) for name, value in other.items()}
    assert len(hashes) == len(other)
    assert settings_hash(base) not in hashes
    assert len(settings_hash(base)) == 16


def test_settings_hash_of_several() -> None:
    one, two = {"learning_rate": 1.0}, {"learning_rate": 2.0}
    assert joint_settings_hash([one]) == settings_hash(one)
    assert joint_settings_hash([one, two]) == joint_settings_hash([two, one])
    assert len({joint_settings_hash(members) for members in ([one, two], [one], [one, one])}) == 3
    assert joint_settings_hash([one, None]) is None


def test_the_newest_of_the_same_weights_counts() -> None:
    first, second = result(0.1), result(0.2)
    weights = {"checkpoints": [record.model_dump() for record in first.checkpoints]}
    again = result(0.3, **weights)
    assert newest([first, second, again]) == [second, again]
    for how in (
        {"split": "validation"}, {"protocol": "paper"}, {"tta_shifts": [0, 1]}, {"data_fingerprint": "e"},
        {"class_mapping": "reviewed"}, {"precision": "bf16-mixed"}, {"frontend": {"fmax": 8000}},
    ):  # fmt: skip
        assert newest([first, result(0.3, **weights, **how)]) == [first, result(0.3, **weights, **how)]


def test_members_of_an_ensemble_have_no_order() -> None:
    records = [{"path": name, "sha256": name} for name in ("a", "b")]
    one = result(0.1, kind="ensemble", random_seed=[1, 2], checkpoints=records)
    turned = result(0.2, kind="ensemble", random_seed=[2, 1], checkpoints=records[::-1])
    assert newest([one, turned]) == [turned]
    assert over_seeds([one, turned]) == []
    ((_, (spread,)),) = over_seeds([one, result(0.2, kind="ensemble", random_seed=[3, 4]), turned])
    assert spread.n == 2


def test_only_what_is_unusual_is_in_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unusual: dict[str, Any] = {"class_mapping": "m.json 01234567", "precision": "16-mixed", "frontend": {"fmax": 8000}}
    path = write(tmp_path / "results.jsonl", result(0.25), result(0.25, **unusual))
    plain, other = (json.loads(line) for line in path.read_text().splitlines())
    assert not unusual.keys() & plain.keys()
    assert {name: other[name] for name in unusual} == unusual
    table = tmp_path / "results.tsv"
    call("results", "--results_path", path, "--tsv", table)
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("m.json 01234567", "16-mixed", "configured front-end"):
        assert words in said
    with table.open() as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    assert [rows[2][name] for name in unusual] == ["m.json 01234567", "16-mixed", "fmax 8000"]
    assert [rows[0][name] for name in unusual] == ["", "32", ""]


def test_a_ledger_that_cannot_be_written_is_told_first(
    tested: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    places = {"--results_path": [tmp_path, tmp_path / "file" / "results.jsonl"], "--heatmap_dir": [tmp_path / "file"]}
    words = ["test", *tested[1], "--resume_checkpoint", str(tested[0] / "a.ckpt"), "--heatmap_dir"]
    for name, cases in places.items():
        for place in cases:
            scores = tmp_path / "scores"
            assert f"{name[2:]} = {place}" in refused(capsys, *words, scores, name, place)
            assert not (scores / "test.json").exists()


def test_mean_and_deviation_over_seeds() -> None:
    values = [0.5, 0.7, 0.9]
    runs = [result(value, random_seed=seed) for seed, value in enumerate(values)]
    others = [
        result(0.1, random_seed=7, settings_hash="other"),
        result(0.1, random_seed=7, split="validation"),
        result(0.1, random_seed=7, kind="weight average"),
        result(0.1, random_seed=7, data_fingerprint="other"),
        result(0.1, random_seed=None, settings_hash=None),
        result(0.2, random_seed=None, settings_hash=None),
    ]
    earlier = result(0.2, random_seed=2)  # another epoch of the third run, tested before
    ((shown, (spread,)),) = over_seeds([earlier, *runs, *others])
    assert shown == runs[-1]
    assert (spread.name, spread.n) == ("mAP", 3)
    assert spread.mean == pytest.approx(0.7)
    assert spread.deviation == pytest.approx(statistics.stdev(values)) == pytest.approx(0.2)
    assert over_seeds(runs[:1]) == []
    ((_, spreads),) = over_seeds([*runs[:2], result(None, random_seed=5)])
    assert spreads == []


def test_results_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "results.jsonl",
        result(0.25),
        result(0.75, random_seed=2),
        result(0.25, date="2025-05-05T05:05:05+00:00"),
        result(0.875, dataset_type="esc-50", esc_fold=4, random_seed=[1, 2], kind="ensemble", tta_shifts=[0, 9]),
    )
    with path.open("a") as file:
        file.write("{\n")
    table = tmp_path / "out" / "results.tsv"
    call("results", "--results_path", path, "--tsv", table)
    said = capsys.readouterr().out
    for words in (
        "line 5, is skipped", "mAP 0.7500 [0.4000 to 0.6000]", "d_prime -", "mine/best.ckpt", "esc-50 fold 4",
        "ensemble", "[low to high]", "2 shifts", "1234567+", "mAP 0.5000 +- 0.3536", "1 earlier tests",
    ):  # fmt: skip
        assert words in said, said
    assert "2025-01-02 03:04" in said
    assert said.index("0.7500") < said.index("0.2500") < said.index("0.8750")  # newest last
    with table.open() as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    assert [(row["metric"], row["value"]) for row in rows] == [
        ("mAP", "0.75"), ("d_prime", ""), ("mAP", "0.25"), ("d_prime", ""), ("mAP", "0.875"), ("d_prime", ""),
    ]  # fmt: skip
    assert (rows[4]["random_seed"], rows[4]["esc_fold"], rows[4]["low"], rows[4]["resamples"]) == (
        "1,2",
        "4",
        "0.4",
        "1000",
    )
    assert (rows[0]["git_revision"], rows[1]["low"], rows[0]["esc_fold"]) == ("1234567+", "", "")
    assert list(table.parent.iterdir()) == [table]

    call("results", "--results_path", path, "--dataset_type", "esc-50")
    said = capsys.readouterr().out
    assert "0.8750" in said
    assert "0.7500" not in said
    assert "scv2" in refused(capsys, "results", "--results_path", path, "--dataset_type", "scv2")


@pytest.fixture(scope="module")
def tested(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with the checkpoints a and b, of two seeds, and mean, their average; and flags for their tests."""
    folder = tmp_path_factory.mktemp("tested")
    given = {"workspace": folder, "dataset_path": demo_data / "workspace/data/demo", "accelerator": "cpu"}
    sizes = {**LEAN, **{name: str(value) for name, value in given.items()}}
    for seed, name in enumerate("ab", start=1):
        save_network(folder / f"{name}.ckpt", seed=seed, random_seed=seed, **sizes)
    content = torch.load(folder / "a.ckpt", weights_only=True)
    torch.save({**content, "sources": ["a.ckpt", "b.ckpt"]}, folder / "mean.ckpt")
    return folder, flags(given)


def test_each_test_adds_a_line(tested: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, given = tested
    paths = {name: str(folder / f"{name}.ckpt") for name in ("a", "b", "mean")}
    for path in paths.values():
        call("test", *given, "--resume_checkpoint", path, "--random_seed", "99")
    assert "1000 resamples" in capsys.readouterr().out
    call("esm_test", *given, "--esm_model_pathes", f"{paths['a']},{paths['b']}")
    call("test", *given, "--resume_checkpoint", paths["a"], "--debug", "True")  # adds none
    capsys.readouterr()

    (a, b, mean, ensemble), broken = read_results(folder / "results.jsonl")
    assert broken == []
    assert [each.kind for each in (a, b, mean, ensemble)] == ["single", "single", "weight average", "ensemble"]
    assert [each.random_seed for each in (a, b, mean, ensemble)] == [1, 2, 1, [1, 2]]  # the training's, not the test's
    assert a.settings_hash == b.settings_hash == mean.settings_hash != ensemble.settings_hash
    assert a.checkpoints[0].sha256 == hashlib.sha256((folder / "a.ckpt").read_bytes()).hexdigest()
    assert [record.path for record in ensemble.checkpoints] == [paths["a"], paths["b"]]
    assert (a.clips, a.split, a.protocol, a.esc_fold, a.tta_shifts) == (3, "test", "held_out", None, [0])
    assert [metric.name for metric in a.metrics] == ["mAP", "mAUC", "d_prime"]
    interval = a.metrics[0].interval
    assert interval is not None
    assert 0 <= interval.low <= interval.high <= 1
    summary = json.loads((folder / "runs/htsat_demo/scores/test.json").read_text())
    assert summary["metrics"][0]["interval"].keys() == {"low", "high", "level", "resamples"}
    assert summary["data_fingerprint"] == a.data_fingerprint

    call("results", *given)
    both = [each.metrics[0].value or 0.0 for each in (a, b)]
    assert f"mAP {statistics.fmean(both):.4f} +- {statistics.stdev(both):.4f}" in capsys.readouterr().out


def test_foreign_weights_have_no_seed(
    tested: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor a protocol, unless it is given; and their scores do not go into the run that exp_name happens to name."""
    content = torch.load(tested[0] / "a.ckpt", weights_only=True)
    bare, published = tmp_path / "bare.ckpt", tmp_path / "published.ckpt"
    torch.save({key.removeprefix("sed_model."): value for key, value in content["state_dict"].items()}, bare)
    torch.save({"state_dict": content["state_dict"]}, published)
    ledger = tmp_path / "ledger.jsonl"
    given = [*tested[1], *LEAN_FLAGS, "--results_path", str(ledger), "--workspace", str(tmp_path)]
    known = ["--protocol", "held_out"]
    for path, more, protocol in ((bare, [], "unknown"), (bare, known, "held_out"), (published, [], "paper")):
        call("test", *given, "--resume_checkpoint", path, *more)
        assert capsys.readouterr().out.count(protocol) >= 3, protocol  # on the first page and beside each metric
        found = read_results(ledger)[0][-1]
        assert (found.settings_hash, found.random_seed, found.kind) == (None, None, "single")
        assert found.protocol == protocol
        assert found.checkpoints[0].sha256 == file_sha256(path)
        summary = json.loads((tmp_path / "runs" / path.stem / "scores" / "test.json").read_text())
        assert summary["protocol"] == protocol
    assert not (tmp_path / "runs" / "htsat_demo").exists()
    call("test", *given, "--resume_checkpoint", bare, "--exp_name", "mine")
    assert (tmp_path / "runs" / "mine" / "scores" / "test.json").exists()
    both = f"{bare},{tested[0] / 'a.ckpt'}"
    assert "protocol held_out against unknown" in refused(capsys, "esm_test", *given, "--esm_model_pathes", both)


def test_the_hash_is_that_of_the_weights_that_were_loaded(tested: tuple[Path, list[str]], tmp_path: Path) -> None:
    path = tmp_path / "mine.ckpt"
    path.write_bytes((tested[0] / "a.ckpt").read_bytes())
    member = Member.read(str(path), {"accelerator": "cpu"})
    before = file_sha256(path)
    (tmp_path / "later.ckpt").touch()
    (tmp_path / "later.ckpt").replace(path)  # as a training that goes on replaces last.ckpt
    module: Any = SimpleNamespace(not_scored=0, shifts=[0])
    summary = summarize(module, member.reported(), TABLE, [METRIC], [str(path)], None)
    line = testing.test_result(summary, [METRIC], member.settings, [member])
    assert line.checkpoints[0].sha256 == before != file_sha256(path)
    assert line.random_seed == 1


def test_a_test_is_compiled_where_the_setting_says_so(tested: tuple[Path, list[str]]) -> None:
    for mode, compiled in (("auto", False), ("default", True)):
        network = Member.read(str(tested[0] / "a.ckpt"), {"accelerator": "cpu", "compile": mode}).network()
        assert {part._compiled_call_impl is not None for part in network.compiled_parts()} == {compiled}


def test_a_test_records_which_clips_it_scored(tested: tuple[Path, list[str]]) -> None:
    """Under the protocol paper the validation clips are the test clips; and a configured front-end is in the line."""
    given = {"accelerator": "cpu", "test_split": "validation", "frontend_from": "settings"}
    member = Member.read(str(tested[0] / "a.ckpt"), given)
    module: Any = SimpleNamespace(not_scored=0, shifts=[0])
    found = summarize(module, member.reported(), TABLE, [METRIC], [], ClassMapping("published", (), ()))
    assert (found["split"], found["class_mapping"], found["precision"]) == ("validation", "published", "32")
    assert found["frontend"]["fmax"] == 14000
    paper = member.settings.model_copy(update={"protocol": "paper", "frontend_from": "auto"})
    found = summarize(module, paper, TABLE, [METRIC], [], None)
    assert (found["split"], found["frontend"]) == ("test", {})


def test_a_mapping_from_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for text in (b"{}", b"{ }"):
        path.write_bytes(text)
        assert mapping_name(ClassMapping(str(path), (), ())) == f"m.json {hashlib.sha256(text).hexdigest()[:8]}"


def test_classes_of_a_published_checkpoint_have_their_names(tmp_path: Path) -> None:
    settings = tiny(classes_num=527, dataset_type="audioset")
    checkpoint = Checkpoint(tmp_path / "published.ckpt", {}, kind="published HTS-AT")
    unnamed = replace(TABLE, labels=[])
    assert Member(checkpoint, settings, "", "paper").labels(unnamed)[:2] == ["Speech", "Male speech, man speaking"]
    few = Member(checkpoint, settings.model_copy(update={"classes_num": 2}), "", "paper")
    assert (few.labels(replace(TABLE, labels=["a", "b"])), few.labels(unnamed)) == (["a", "b"], ["class 0", "class 1"])
