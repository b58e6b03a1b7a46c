"""The model card: of a run, of an average, of a foreign file; its YAML header and licences."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from data_generator import load_training_data
from evaluation.metrics import Interval, Metric
from model import build_model
from prepare import demo, desed, esc50, scv2
from runs.card import count_parameters, describe_data, licence_identifier, recorded_data, write_card
from settings import section
from tests.helpers import tiny

LABELS = ["dog | cat", "<rain>", "wind"]


def content(**changes: Any) -> dict[str, Any]:
    settings = tiny(**{"classes_num": 3, "random_seed": 5, **changes})
    return {
        "state_dict": build_model(settings).state_dict(),
        "settings": settings.model_dump(),
        "labels": LABELS,
        "frontend": {name: getattr(settings, name) for name in section("front-end")},
    }


def header_of(text: str) -> dict[str, Any]:
    _, header, body = text.split("---\n", 2)
    assert body.startswith("\n# HTS-AT")
    return yaml.safe_load(header)


def written(folder: Path, described: dict[str, Any], **more: Any) -> str:
    return write_card(folder / "README.md", described, file=Path("a.ckpt"), **more).read_text()


def test_a_card_with_everything(tmp_path: Path) -> None:
    metric = Metric("mAP", 0.51234, "macro average precision", 60, 3, 3, Interval(0.4, 0.6, 0.95, 1000))
    splits = {"train": {"clips": 40, "fingerprint": "0123456789abcdef"}}
    facts = {"splits": splits, "source": "us", "licence": "CC0 1.0"}
    average = {**content(), "sources": [f"/home/me/runs/mine/checkpoints/e_1.ckpt sha256:{'ab' * 32}", "e_2.ckpt"]}
    text = written(tmp_path / "new", average, metrics=[metric], measured="On test clips.", data=facts, more="## More")
    assert header_of(text) == {
        "pipeline_tag": "audio-classification",
        "library_name": "hts-at",
        "license": "cc0-1.0",
        "tags": ["audio", "hts-at", "audio-tagging", "sound-event-detection", "demo"],
    }
    for said in (
        "| mAP | 0.5123 | 0.4000 to 0.6000 | macro average precision | 60 | 3 of 3 | held_out |\n\nOn test clips.",
        "| train | 40 clips, fingerprint 0123456789abcdef |\n| source | us |\n| licence | CC0 1.0 |\n\n",
        "mean of 2 checkpoints: mine/e_1.ckpt (abababab), e_2.ckpt.\n\n## Metrics",
        "| setting | value |\n|---|---|\n",
        "| `random_seed` | 5 |",
        "| `htsat_depth` | [1, 1, 1, 1] |",
        "| `sample_rate` | 32000 Hz |",
        "| `hop_size` | 320 samples |",
        "| `mel_bins` | 64 |",
        "| `fmax` | 14000.0 Hz |",
        "<details><summary>3 classes</summary>\n\n0. dog | cat\n1. &lt;rain&gt;\n2. wind\n\n</details>",
        "10 s of mono sound of 32000 Hz",
        "312.5 ms",
        "licence: CC0 1.0",
        "predict --resume_checkpoint a.ckpt",
        'Tagger.from_checkpoint("a.ckpt")',
    ):
        assert said in text, said
    assert text.endswith("\n\n## More\n")
    assert "\n\n\n" not in text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["README.md"]


def test_paths_of_the_machine_stay_out(tmp_path: Path) -> None:
    places = {"workspace": str(tmp_path / "secret"), "resume_checkpoint": "/home/someone/runs/best.ckpt"}
    text = written(tmp_path, content(**places, exp_name="mine"))
    assert "secret" not in text
    assert "someone" not in text
    assert "| `resume_checkpoint` | best.ckpt |" in text
    assert "# HTS-AT: mine" in text


def test_a_foreign_file(tmp_path: Path) -> None:
    known = content()
    foreign = {"state_dict": known["state_dict"], "settings": {"classes_num": 3}, "frontend": known["frontend"]}
    text = written(tmp_path, foreign)
    assert "license" not in header_of(text)
    assert "names no licence" not in text  # the data are unknown, and so is their licence
    for said in ("not known here", "state your own", "None recorded", "names no classes", "50.0 Hz"):
        assert said in text, said
    without = written(tmp_path, content(), data={"splits": {}, "source": "mine", "licence": ""})
    assert "names no licence. Weights: state your own" in without


def test_data_of_a_run_that_has_ended(tmp_path: Path, demo_workspace: Path) -> None:
    """Splits as they were recorded; source and licence where the store still holds these clips."""
    settings = tiny(demo_workspace)
    paths = [tmp_path / run / "checkpoints" / "best.ckpt" for run in ("a", "b")]
    described = describe_data(load_training_data(settings, ("train", "validation")).tables)
    for path in paths:
        path.parent.mkdir(parents=True)
        path.parents[1].joinpath("provenance.json").write_text(json.dumps([{}, {"data": described["splits"]}]))
    assert recorded_data(paths, settings.model_dump()) == described
    assert described["licence"]
    elsewhere = {**settings.model_dump(), "dataset_path": str(tmp_path)}
    assert recorded_data(paths, elsewhere) == {"splits": described["splits"], "source": None, "licence": None}
    assert recorded_data(paths, None) == {}
    assert recorded_data([tmp_path / "loose.ckpt"], settings.model_dump()) == {}
    other = {**described["splits"], "train": {"clips": 1, "fingerprint": "0"}}
    paths[1].parents[1].joinpath("provenance.json").write_text(json.dumps([{"data": other}]))
    assert recorded_data(paths, settings.model_dump()) == {}  # of several data sets none is named
    found = recorded_data(paths[1:], settings.model_dump())
    assert found == {"splits": other, "source": None, "licence": None}  # the store has changed since


def test_frames_and_task(tmp_path: Path) -> None:
    other: dict[str, Any] = {"mel_bins": 128, "hop_size": 640}
    assert f"{1000 * build_model(tiny(**other)).frame_seconds:g} ms" in written(tmp_path, content(**other))
    assert "one class for each clip" not in written(tmp_path, content())
    assert "one class for each clip" in written(tmp_path, content(task="single_label", loss_type="clip_ce"))


@pytest.mark.parametrize(
    ("licence", "identifier"),
    [
        (demo.LICENCE, "cc0-1.0"),
        (esc50.LICENCE, "cc-by-nc-3.0"),
        (scv2.LICENCE, "cc-by-4.0"),
        (desed.LICENCE, "other"),
        (None, None),
        ("", None),
    ],
)
def test_licences(licence: str | None, identifier: str | None) -> None:
    assert licence_identifier(licence) == identifier


def test_other_licence_has_a_name(tmp_path: Path) -> None:
    text = written(tmp_path, content(), data={"licence": 'Ask us: "no" #1'})
    assert header_of(text)["license"] == "other"
    assert header_of(text)["license_name"] == "as-the-training-data"
    assert 'Ask us: "no" #1' in text


def test_parameters_are_what_is_learned() -> None:
    network = build_model(tiny())
    learned = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert count_parameters(network.state_dict()) == learned
    assert count_parameters({f"sed_model.{key}": value for key, value in network.state_dict().items()}) == learned


def test_card_of_a_run(trained_run: Path) -> None:
    """best.ckpt of the run, its metric, and the data of its two splits."""
    run = trained_run / "workspace/runs/htsat_demo"
    text, recorded = (run / "README.md").read_text(), json.loads((run / "provenance.json").read_text())[0]["data"]
    assert header_of(text)["license"] == "cc0-1.0"
    for split in ("train", "validation"):
        clips, fingerprint = recorded[split]["clips"], recorded[split]["fingerprint"]
        assert f"| {split} | {clips} clips, fingerprint {fingerprint} |" in text
    named = (
        "| mAP | 0.",
        "after epoch ",
        "on which the best epoch was chosen",
        "checkpoints/best.ckpt",
        "max_epoch` | 2",
    )
    for said in (*named, *demo.LABELS, *(f"`{name}`" for name in section("front-end"))):
        assert said in text, said
