"""The model card: what a tiny run writes, its YAML header, licences, and what is said where little is known."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

import main
from data_generator import load_training_data
from evaluation.metrics import Interval, Metric
from model import build_model
from prepare import demo, desed, esc50, scv2
from runs.card import (
    count_parameters,
    describe_data,
    licence_identifier,
    recorded_data,
    write_card,
    write_run_card,
)
from settings import resolve, section
from tests.helpers import TINY

LABELS = ["dog | cat", "<rain>", "wind"]


def content(**changes: Any) -> dict[str, Any]:
    settings = resolve({**TINY, "classes_num": 3, "random_seed": 5, **changes})
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


def test_card_says_everything(tmp_path: Path) -> None:
    metric = Metric("mAP", 0.51234, "macro average precision", 60, 3, 3, Interval(0.4, 0.6, 0.95, 1000))
    facts = {
        "splits": {"train": {"clips": 40, "fingerprint": "0123456789abcdef"}},
        "source": "us",
        "licence": "CC0 1.0",
    }
    average = {**content(), "sources": [f"/home/me/runs/mine/checkpoints/e_1.ckpt sha256:{'ab' * 32}", "e_2.ckpt"]}
    path = write_card(
        tmp_path / "new" / "README.md", average, file=Path("average.ckpt"), metrics=[metric], measured="On test clips.",
        data=facts,
    )  # fmt: skip
    text = path.read_text()
    assert header_of(text) == {
        "pipeline_tag": "audio-classification",
        "library_name": "hts-at",
        "license": "cc0-1.0",
        "tags": ["audio", "hts-at", "audio-tagging", "sound-event-detection", "demo"],
    }
    for said in (
        "| mAP | 0.5123 | 0.4000 to 0.6000 | macro average precision | 60 | 3 of 3 | held_out |\n\nOn test clips.",
        "| train | 40 clips, fingerprint 0123456789abcdef |",
        "| source | us |",
        "the mean of 2 checkpoints: mine/e_1.ckpt (abababab), e_2.ckpt",
        "| `random_seed` | 5 |",
        "| `htsat_depth` | [1, 1, 1, 1] |",
        "| `sample_rate` | 32000 Hz |",
        "| `hop_size` | 320 samples |",
        "| `mel_bins` | 64 |",
        "| `fmax` | 14000.0 Hz |",
        "3 classes",
        "0. dog | cat\n1. &lt;rain&gt;\n2. wind",
        "10 s at a time",
        "312.5 ms",
        "data with this licence: CC0 1.0",
        "predict --resume_checkpoint average.ckpt",
        'Tagger.from_checkpoint("average.ckpt")',
    ):
        assert said in text, said
    assert list(path.parent.iterdir()) == [path]


def test_paths_of_the_machine_stay_out(tmp_path: Path) -> None:
    described = content(
        workspace=str(tmp_path / "secret"), resume_checkpoint="/home/someone/runs/best.ckpt", exp_name="mine"
    )
    text = write_card(tmp_path / "README.md", described, file=Path("a.ckpt")).read_text()
    assert "secret" not in text
    assert "someone" not in text
    assert "| `resume_checkpoint` | best.ckpt |" in text
    assert "# HTS-AT: mine" in text


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    known = content()
    foreign = {"state_dict": known["state_dict"], "settings": {"classes_num": 3}, "frontend": known["frontend"]}
    text = write_card(tmp_path / "README.md", foreign, file=Path("a.ckpt")).read_text()
    assert "license" not in header_of(text)
    assert "names no licence" not in text  # nothing is known of the data, least of all that it has no licence
    for said in (
        "is not known here",
        "state your own",
        "nothing about how it was trained",
        "names no classes",
        "None recorded",
        "50.0 Hz",
    ):
        assert said in text, said


def test_data_without_a_licence(tmp_path: Path) -> None:
    facts = {"splits": {}, "source": "mine", "licence": ""}
    text = write_card(tmp_path / "README.md", content(), file=Path("a.ckpt"), data=facts).read_text()
    assert "names no licence. Weights: state your own" in text


def test_data_of_a_run_that_has_ended(tmp_path: Path, demo_workspace: Path) -> None:
    """Splits as they were recorded; source and licence where the store still holds these clips."""
    settings = resolve({**TINY, "dataset_path": str(demo_workspace / "workspace/data/demo")})
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


def test_step_of_other_networks(tmp_path: Path) -> None:
    def said(**changes: Any) -> str:
        return write_card(tmp_path / "README.md", content(**changes), file=Path("a.ckpt")).read_text()

    network = build_model(resolve({**TINY, "mel_bins": 128, "hop_size": 640}))
    assert f"{10000 / network.frames:g} ms" in said(mel_bins=128, hop_size=640)
    assert "also where there is none" not in said()
    assert "also where there is none" in said(task="single_label", loss_type="clip_ce")


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
    text = write_card(tmp_path / "R.md", content(), file=Path("a"), data={"licence": 'Ask us: "no" #1'}).read_text()
    assert header_of(text)["license"] == "other"
    assert header_of(text)["license_name"] == "as-the-training-data"
    assert 'Ask us: "no" #1' in text


def test_parameters_are_what_is_learned() -> None:
    network = build_model(resolve(TINY))
    learned = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert count_parameters(network.state_dict()) == learned
    assert count_parameters({f"sed_model.{key}": value for key, value in network.state_dict().items()}) == learned


def test_card_of_a_run(tmp_path: Path, demo_workspace: Path) -> None:
    """What train calls at its end: best.ckpt of the run, its metric, and the data of its two splits."""
    where = {"workspace": str(tmp_path), "dataset_path": str(demo_workspace / "workspace/data/demo")}
    settings = resolve({**TINY, **where})
    data = load_training_data(settings, ("train", "validation"))
    folder = settings.run_folder / "checkpoints"
    folder.mkdir(parents=True)
    described = {**content(classes_num=10), "labels": data.tables["train"].labels, "epoch": 2}
    torch.save(described, folder / "best.ckpt")
    trainer: Any = SimpleNamespace(checkpoint_callback=SimpleNamespace(best_model_score=torch.tensor(0.25)))
    path = write_run_card(settings, data, trainer)
    assert path == settings.run_folder / "README.md"
    text = path.read_text()
    assert header_of(text)["license"] == "cc0-1.0"
    splits = describe_data(data.tables)["splits"]
    for split in ("train", "validation"):
        assert f"| {split} | {splits[split]['clips']} clips, fingerprint {splits[split]['fingerprint']} |" in text
    for said in ("| mAP | 0.2500 |", "after epoch 3", "on which the best epoch was chosen", "checkpoints/best.ckpt"):
        assert said in text, said
    for label in data.tables["train"].labels:
        assert label in text
    for name in section("front-end"):
        assert f"`{name}`" in text


def test_train_writes_a_card(
    tmp_path: Path, demo_workspace: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {**TINY, "max_epoch": "1", "dataset_path": str(demo_workspace / "workspace/data/demo")}
    assert main.main(["train", *(word for name, value in values.items() for word in (f"--{name}", value))]) == 0
    card = Path("workspace/runs/htsat_demo/README.md")
    assert f"Model card: {card}" in capsys.readouterr().out
    assert header_of(card.read_text())["pipeline_tag"] == "audio-classification"
    assert "| `max_epoch` | 1 |" in card.read_text()
