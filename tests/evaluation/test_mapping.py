"""AudioSet's classes to DESED's: the groups, what is refused, and a test of an AudioSet network on a DESED store."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import fl_evaluate
import main
from data.clip_store import Clip, ClipStoreWriter, Event
from data.labels import audioset_mids, published_labels
from evaluation.mapping import load_mapping
from evaluation.scores import load_scores
from inference import Tagger
from prepare.desed import LABELS as DESED
from settings import UserError
from tests.helpers import LEAN, LEAN_FLAGS, refused, save_network

AUDIOSET = published_labels("audioset", 527)


def write_mapping(path: Path, classes: object) -> str:
    path.write_text(json.dumps({"classes": classes}))
    return str(path)


def test_published_groups() -> None:
    mapping = load_mapping("published", AUDIOSET, audioset_mids()).in_order(DESED)
    groups = dict(zip(mapping.labels, mapping.groups, strict=True))
    assert groups["Speech"] == tuple(range(8))
    assert groups["Alarm_bell_ringing"] == (310, *range(388, 403))
    assert [len(group) for group in mapping.groups] == [8, 3, 1, 10, 1, 1, 16, 5, 6, 1]
    assert mapping.thresholds == (0.275, 0.20, 0.20, 0.23, 0.48, 0.20, 0.18, 0.51, 0.39, 0.14)


def test_reviewed_groups_are_without_the_mistakes() -> None:
    mapping = load_mapping("reviewed", AUDIOSET, audioset_mids()).in_order(DESED)
    names = {k: {AUDIOSET[s] for s in group} for k, group in zip(mapping.labels, mapping.groups, strict=True)}
    assert names["Frying"] == {"Frying (food)"}
    assert {"Toothbrush", "Electric toothbrush"} < names["Electric_shaver_toothbrush"]
    assert "Cutlery, silverware" in names["Dishes"]
    water = names["Running_water"]
    assert {"Water tap, faucet", "Sink (filling or washing)", "Bathtub (filling or washing)"} < water
    assert not water & {"Rain", "Raindrop", "Rain on surface", "Ocean", "Waves, surf"}
    assert "Whimper (dog)" in names["Dog"]
    explained = json.loads((Path(main.__file__).parent / "assets" / "desed_reviewed.json").read_text())["classes"]
    assert all(entry["why"] for entry in explained.values())


def test_the_highest_of_each_group() -> None:
    mapping = load_mapping("published", AUDIOSET, audioset_mids())
    scores = np.random.default_rng(0).random((3, 500, 527)).astype(np.float32)  # more frames than one block
    mapped = mapping.apply(scores)
    for k, group in enumerate(mapping.groups):
        np.testing.assert_array_equal(mapped[:, :, k], scores[:, :, list(group)].max(axis=-1))
    np.testing.assert_array_equal(mapping.apply(scores[:, 0]), mapped[:, 0])  # of clips


def test_names_ids_and_numbers(tmp_path: Path) -> None:
    path = write_mapping(tmp_path / "m.json", {"talk": ["Speech", "/m/05zppz", 2], "bark": {"from": ["/m/05tny_"]}})
    mapping = load_mapping(path, AUDIOSET, audioset_mids())
    assert (mapping.labels, mapping.groups, mapping.thresholds) == (("talk", "bark"), ((0, 1, 2), (75,)), None)
    assert mapping.in_order(["bark", "talk"]).groups == ((75,), (0, 1, 2))
    with pytest.raises(UserError, match="bark, meow"):
        mapping.in_order(["bark", "meow"])


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        ({"a": ["Speach"]}, "'Speach'"),
        ({"a": ["/m/nothing"]}, "/m/nothing"),
        ({"a": [527]}, "527 .* 0 to 526"),
        ({"a": [True]}, "a: True"),
        ({"a": []}, "group of a"),
        ({"a": [0, 1], "b": ["Speech"]}, r"'Speech' \(in a and b\)"),
        ({"a": {"from": [0], "threshold": 2}}, "threshold 2"),
        ({"a": {"from": [0], "threshold": 0.5}, "b": [1]}, "threshold for b"),
        ({"a": {"form": [0]}}, "a: .*from"),
        ({}, r"m\.json"),
        (["Speech"], r"m\.json"),
    ],
)
def test_mappings_that_are_refused(tmp_path: Path, classes: object, named: str) -> None:
    path = write_mapping(tmp_path / "m.json", classes)
    with pytest.raises(UserError, match=named):
        load_mapping(path, AUDIOSET, audioset_mids())


def test_files_that_are_no_mappings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reviwed: give published, reviewed"):
        load_mapping("reviwed", AUDIOSET)
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(UserError, match=r"m\.json"):
        load_mapping(str(tmp_path / "m.json"), AUDIOSET)


@pytest.fixture
def desed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a DESED-like store of five clips of 2 to 10 s, and a tiny AudioSet network that is not trained."""
    rng = np.random.default_rng(0)
    with ClipStoreWriter(
        tmp_path / "workspace" / "data" / "desed" / "desed.h5", clip_samples=320000, sample_rate=32000, labels=DESED,
        dataset_type="desed", source="noise", licence="none",
    ) as store:  # fmt: skip
        for number in range(5):
            waveform = rng.integers(-9000, 9000, 64000 * (number + 1)).astype(np.int16)
            event = Event(number, 0.5, 1.5 + number)
            store.add(Clip(f"{number}.wav", waveform, [number], split="test", events=[event]))
    save_network(tmp_path / "audioset.ckpt", AUDIOSET, dataset_type="audioset", **LEAN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TEST = [
    "test", "--dataset_type", "desed", "--resume_checkpoint", "audioset.ckpt", "--fl_local", "True",
    "--heatmap_dir", "scores", *LEAN_FLAGS,
]  # fmt: skip
EVALUATE = ["--heatmap_dir", "scores", "--pictures", "0", "--resamples", "20"]


def test_an_audioset_network_on_desed(desed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*TEST, "--fl_audioset_mapping", "published"]) == 0
    assert "held_out" in capsys.readouterr().out  # DESED's clips chose nothing, whatever AudioSet's protocol was
    scores = load_scores(Path("scores/test.h5"))
    assert (scores.labels, scores.frame_scores().shape) == (DESED, (5, 32, 10))
    assert scores.durations.tolist() == [2.0, 4.0, 6.0, 8.0, 10.0]
    with h5py.File("workspace/data/desed/desed.h5") as store:
        waveform = store["waveform"][4].astype(np.float32) / 32767
    tagged = Tagger.from_checkpoint("audioset.ckpt").tag(waveform)
    mapping = load_mapping("published", AUDIOSET).in_order(DESED)
    np.testing.assert_allclose(scores.frame_scores()[4], mapping.apply(tagged.framewise), atol=1e-5)
    np.testing.assert_allclose(scores.clipwise[4], mapping.apply(tagged.clipwise), atol=1e-5)

    assert fl_evaluate.main(EVALUATE) == 0
    assert "thresholds of the mapping published; thresholds 0.14 to 0.51" in capsys.readouterr().out
    report = json.loads(Path("scores/test_detection.json").read_text())
    assert report["postprocessing"]["thresholds"] == list(mapping.thresholds or ())
    assert fl_evaluate.main([*EVALUATE, "--fl_class_num", "Dishes,Speech", "--fl_threshold", "0.1,0.2"]) == 0
    report = json.loads(Path("scores/test_detection.json").read_text())
    assert report["postprocessing"]["labels"] == ["Dishes", "Speech"]
    assert report["postprocessing"]["thresholds"] == [0.1, 0.2]


def test_a_store_by_its_path_and_the_wrong_classes(desed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Path("workspace/data/desed/desed.h5").rename("elsewhere.h5")
    flags = ["--fl_dataset", str(store), "--test_file", "elsewhere"]
    assert main.main([*TEST, *flags]) == 0
    assert load_scores(Path("scores/elsewhere.h5")).labels == DESED
    other = write_mapping(desed / "m.json", {"talk": ["Speech"]})
    assert "m.json" in refused(capsys, *TEST, *flags, "--fl_audioset_mapping", other)


def test_shares_of_a_test_are_one_test(desed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two jobs score a share each; joined they are what one job writes."""
    assert main.main([*TEST, "--test_file", "whole"]) == 0
    for shard in ("1,2", "2,2"):
        assert main.main([*TEST, "--test_shard", shard]) == 0
    whole, joined = load_scores(Path("scores/whole.h5")), load_scores(Path("scores/test.h5"))
    assert (joined.names, joined.events) == (whole.names, whole.events)
    np.testing.assert_allclose(joined.frame_scores(), whole.frame_scores(), atol=1e-6)
    assert joined.attributes["run_id"] == whole.attributes["run_id"]
    assert len(Path("workspace/results.jsonl").read_text().splitlines()) == 1  # a share's metrics are no result
    assert fl_evaluate.main(EVALUATE) == 0

    content = torch.load("audioset.ckpt", weights_only=True)
    torch.save({**content, "epoch": 1}, "audioset.ckpt")
    assert main.main([*TEST, "--test_shard", "2,2"]) == 0
    capsys.readouterr()
    assert fl_evaluate.main(EVALUATE) == 2
    assert "of different runs" in capsys.readouterr().err
    assert "test_shard = [3, 2]" in refused(capsys, *TEST, "--test_shard", "3,2")
