"""config.py, flags and derived values; what is refused; what a checkpoint brings, and what a resumed run must keep."""

import ast
import copy
import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import pytest
from mypy import api

import main
from commands.command_line import COMMANDS, build_parser, settings_read
from model import build_model
from model.checkpoint import Checkpoint
from runs import resume
from settings import (
    FIELDS_PATH,
    NETWORK_SECTIONS,
    RECIPES,
    TRAINED_SECTIONS,
    UserError,
    all_settings,
    fewest,
    fields_stub,
    place_flags,
    read_recipe,
    resolve,
    section,
)
from tests.helpers import ROOT, TINY


@pytest.fixture
def notebook_config() -> Iterator[ModuleType]:
    """`import config`, as in a notebook; forgotten afterwards."""
    sys.modules.pop("config", None)
    import config

    yield config
    sys.modules.pop("config", None)


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({"dataset_type": "scv2"}, {"sample_rate": 16000, "hop_size": 160, "clip_samples": 160000, "classes_num": 35}),
        ({"dataset_type": "scv2"}, {"fmax": 8000.0}),
        ({"dataset_type": "audioset"}, {"sample_rate": 32000, "hop_size": 320, "classes_num": 527, "batch_size": 128}),
        ({"dataset_type": "esc-50"}, {"loss_type": "clip_ce"}),
        ({"sample_rate": 16000}, {"hop_size": 160}),
        ({"sample_rate": 16000, "hop_size": 200}, {"hop_size": 200}),
        ({"exp_name": "x"}, {"heatmap_dir": "workspace/runs/x/scores"}),
        ({"exp_name": "night[1] a.b"}, {"exp_name": "night[1] a.b"}),
        ({"test_split": "train"}, {"test_file": "train"}),
        ({"max_epoch": "5", "fl_local": "True", "crop_size": "None"}, {"max_epoch": 5, "fl_local": True}),
        ({"crop_size": "None"}, {"crop_size": None}),
        ({"lr_scheduler_epoch": "1,2,3"}, {"lr_scheduler_epoch": [1, 2, 3]}),
        ({"lr_rate": "[0.1, 0.2, 0.3]"}, {"lr_rate": [0.1, 0.2, 0.3]}),
        ({"esm_model_pathes": "a.ckpt,b.ckpt"}, {"esm_model_pathes": ["a.ckpt", "b.ckpt"]}),
        ({"fl_class_num": '["Speech, male", "Dog"]'}, {"fl_class_num": ["Speech, male", "Dog"]}),
        ({"lr_rate": '["0.1", 0.2, 0.3]'}, {"lr_rate": [0.1, 0.2, 0.3]}),
        ({"encoder_options": '{"a": "1,2"}'}, {"encoder_options": {"a": "1,2"}}),
    ],
)
def test_values_of_flags_and_what_follows_from_them(given: dict[str, Any], derived: dict[str, Any]) -> None:
    assert derived.items() <= resolve(given).model_dump().items()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_epochs": 5}, "max_epoch"),
        ({"dataset_type": "esc50"}, "'esc-50'"),
        ({"max_epoch": "many"}, "max_epoch = 'many'"),
        ({"max_epoch": 0}, "max_epoch = 0"),
        *(({"exp_name": name}, "exp_name") for name in ("", ".", "..", "../a", "/a", "a/b", "a\\b", "a\n", "a\0")),
        ({"test_file": "../a"}, "test_file"),
        ({"index_type": "../a"}, "index_type"),
        ({"crop_size": 0}, "crop_size = 0"),
        ({"htsat_depth": "2,0"}, "htsat_depth"),
        ({"mixup_alpha": -1}, "mixup_alpha = -1"),
        ({"lr_rate": [0.1]}, "lr_rate"),
        ({"lr_scheduler_epoch": "3,2,1"}, "lr_scheduler_epoch"),
        ({"token_label_range": "0.6,0.2"}, "token_label_range"),
        ({"token_label_range": "0.2,1.6"}, "token_label_range"),
        ({"loss_type": "clip_ce"}, "task"),
        ({"tta_shifts": []}, "tta_shifts"),
        ({"learning_rate": "nan"}, "learning_rate"),
        ({"lr_rate": "0.1,nan,0.2"}, "lr_rate"),
        ({"gradient_clip": float("inf")}, "gradient_clip"),
        ({"fl_class_num": '["Speech, male"'}, "Speech, male"),
        ({"fl_class_num": '[["Speech", "male"], "Dog"]'}, "Speech"),
        ({"htsat_drop_path": 1.0}, "htsat_drop_path"),
        ({"layer_decay": 1.1}, "layer_decay"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"window_overlap": 1.0}, "window_overlap"),
        ({"dataset_type": "audioset", "protocol": "held_out"}, "protocol"),
        ({"enable_label_enhance": True}, "class_map_path"),
        ({"linear_probe": True}, "resume_checkpoint"),
        ({"mean_teacher": 1.0}, "mean_teacher"),
        ({"balanced_by": "frames"}, "balanced_by"),
        ({"loss_type": "frame_bce", "balanced_by": "frames"}, "balanced_data"),
        ({"loss_type": "frame_bce", "mixup_waveforms": True}, "mixup_alpha"),
        ({"loss_type": "frame_bce", "task": "single_label"}, "task"),
        ({"loss_type": "frame_bce", "enable_token_label": True}, "enable_token_label"),
        ({"loss_type": "frame_bce", "labelling_shares": "0.5,0.5"}, "labelling_shares"),
        ({"loss_type": "frame_bce", "labelling_shares": "0.5,0.5,0", "balanced_data": True}, "balanced_data"),
        ({"mean_teacher_decay": 1.0}, "mean_teacher_decay"),
        ({"frequency_warp": 1.0}, "frequency_warp"),
        ({"distillation_weight": 1.5}, "distillation_weight"),
    ],
)
def test_refusals_name_the_setting(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        resolve(given)


@pytest.mark.parametrize(("given", "named"), [({"fmin": 15000}, "fmax"), ({"clip_samples": 640000}, "clip_samples")])
def test_what_a_network_cannot_take(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        build_model(resolve(given))


def test_bands_above_half_the_rate_warn() -> None:
    with pytest.warns(UserWarning, match="fmax"):
        build_model(resolve({**TINY, "sample_rate": 16000, "fmax": 14000}))


def test_config_is_frozen_and_can_be_copied_to_another_process() -> None:
    config = resolve({"max_epoch": 7})
    with pytest.raises(ValueError, match="frozen"):
        config.max_epoch = 3
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_notebook_edit_counts(notebook_config: ModuleType) -> None:
    vars(notebook_config).update(max_epoch=3, dataset_type="scv2")
    found = resolve()
    assert (found.max_epoch, found.sample_rate) == (3, 16000)
    assert resolve({"max_epoch": 4}).max_epoch == 4
    vars(notebook_config).update(classes_num=12)
    with pytest.raises(UserError, match=r"classes_num = 12 .*classes_num = 10"):
        resolve(facts=lambda values: {"classes_num": 10})
    vars(notebook_config).update(max_epochs=3)
    with pytest.raises(UserError, match="Did you mean max_epoch"):
        resolve()


def test_what_is_set_for_training_does_not_hinder_a_test(notebook_config: ModuleType) -> None:
    """config.py as edited for a training on event times, while a checkpoint of clip labels is used."""
    vars(notebook_config).update(loss_type="frame_bce", mean_teacher=1.0)
    trained = {**resolve().model_dump(), "loss_type": "clip_bce"}
    assert resolve({}, checkpoint=trained).loss_type == "clip_bce"
    with pytest.raises(UserError, match="mean_teacher"):
        resolve({"loss_type": "clip_bce"})


@pytest.mark.parametrize("everything", [True, False])
def test_every_setting_is_a_flag_with_its_comment(everything: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """--help has those that the command reads, --help-all all of them; any may be given."""
    known = all_settings().values()
    assert all(setting.comment for setting in known)
    for name, row in COMMANDS.items():
        for each in row.reads:  # a section, or a setting
            assert settings_read([each]), each
        parser = build_parser(name, everything=everything)
        with pytest.raises(SystemExit):
            parser.parse_args([name, "--help-all" if everything else "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        read = settings_read(row.reads)
        for setting in known:
            listed = re.search(rf"--{setting.name} (VALUE|{{)", shown) is not None
            assert listed == (everything or setting.name in read), (name, setting.name)
    assert set(settings_read(COMMANDS["predict"].reads)) & {"window_overlap", "fl_threshold", "mixup_alpha"} == {
        "window_overlap", "fl_threshold",
    }  # fmt: skip
    assert "max_epoch" in settings_read(COMMANDS["train"].reads)


@pytest.mark.parametrize(
    ("words", "close"),
    [
        ("train --max_epochs 3", "--max_epoch"),
        ("train --max-epoch 3", "--max_epoch"),
        ("predict a.wav --json x", "--jsonl"),
        ("predict a.wav --learning_rat 3", "--learning_rate"),
    ],
)
def test_unknown_flag_names_close_ones(words: str, close: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main.main(words.split())
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert f"Did you mean {close}" in said
    assert len(said) < 300


def other_value(name: str) -> Any:
    """A value of a setting that is not its default, and that goes with the defaults of the others."""
    kind, usual = all_settings()[name].type, getattr(resolve(), name)
    values: list[Any] = ["other"]
    if get_origin(kind) is Literal:
        values = list(get_args(kind))
    elif isinstance(usual, bool):
        values = [not usual]
    elif isinstance(usual, (int, float)):
        values = [usual // 2, usual * 2, usual / 2]
    elif isinstance(usual, dict):
        values = [{"depth": "6"}]
    elif isinstance(usual, list):
        values = [usual[::-1], [*usual, *usual], ["other"]]
    for value in values:
        try:
            if value != usual and getattr(resolve({name: value}), name) == value:
                return value
        except UserError:
            continue
    raise AssertionError(f"no other value of {name} is allowed")


@pytest.mark.parametrize("name", [*section(*TRAINED_SECTIONS), "exp_name"])
def test_a_checkpoint_brings_what_it_was_trained_with(name: str) -> None:
    value = other_value(name)
    saved = json.loads(json.dumps(resolve({name: value}).model_dump()))
    assert getattr(resolve({}, checkpoint=saved), name) == value
    assert getattr(resolve({name: value}, checkpoint=saved), name) == value
    if name in section(*NETWORK_SECTIONS, "split"):
        other = {"depth": "5", "dim": "64"} if isinstance(value, dict) else getattr(resolve(), name)
        with pytest.raises(UserError, match=f"{name} = .* contradicts the checkpoint, .*{name} = "):
            resolve({name: other}, checkpoint=saved)


def test_encoder_options_count_key_by_key() -> None:
    saved = {"encoder": "ast", "encoder_options": {"dim": "128", "time_stride": "10"}}
    given = {"encoder_options": "dim=128,heads=2"}
    assert resolve(given, checkpoint=saved).encoder_options == {"dim": "128", "time_stride": "10", "heads": "2"}
    other = {"encoder_options": "time_stride=16"}
    with pytest.raises(UserError, match="time_stride"):
        resolve(other, checkpoint=saved)
    tuned = resolve(other, checkpoint=saved, fine_tuning=True)
    assert tuned.encoder_options == {"dim": "128", "time_stride": "16"}


def test_a_checkpoint_leaves_the_rest_to_config() -> None:
    saved = resolve({"dataset_type": "esc-50", "batch_size": 7, "esc_fold": 3}).model_dump()
    found = resolve({}, checkpoint=saved)
    assert (found.dataset_type, found.classes_num, found.esc_fold) == ("esc-50", 50, 3)
    assert found.batch_size == resolve({"dataset_type": "esc-50"}).batch_size
    assert found.dataset_path == "workspace/data/esc-50"
    assert resolve({"dataset_type": "demo", "esc_fold": 2}, checkpoint=saved).esc_fold == 2


@pytest.mark.parametrize("value", ["../a", "/a", ""])
def test_a_checkpoint_names_no_place_outside(value: str) -> None:
    with pytest.raises(UserError, match="exp_name"):
        resolve({}, checkpoint={"exp_name": value})


def test_a_checkpoint_knows_where_its_data_are(tmp_path: Path) -> None:
    """Unless something else is said, or they are no longer there."""
    for place, there in ((tmp_path, True), (tmp_path / "gone", False)):
        saved = resolve({"dataset_type": "folder", "dataset_path": str(place)}).model_dump()
        assert (resolve({}, checkpoint=saved).dataset_path == str(place)) == there
        assert resolve({"workspace": "w"}, checkpoint=saved).dataset_path == "w/data/folder"


def test_the_flags_that_give_some_settings() -> None:
    given = {"dataset_type": "scv2", "workspace": "a b", "lr_rate": [1.0, 1.0, 1.0], "exp_name": "x"}
    settings = resolve({**given, "batch_size": 32})
    assert fewest(json.loads(json.dumps(settings.model_dump()))) == given
    assert place_flags(settings, "batch_size", "exp_name") == " --workspace 'a b' --exp_name x"
    assert place_flags(resolve()) == ""


@pytest.mark.parametrize("name", section(*resume.RUN_SECTIONS))
def test_a_resumed_run_keeps_what_it_learns_from(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = resolve({"resume": "last.ckpt"})

    def saved(path: Path) -> Checkpoint:
        return Checkpoint(path, {}, settings=then, epoch=0, resumable=True)

    monkeypatch.setattr(resume, "read_checkpoint", saved)
    then = settings.model_dump()
    assert resume.find_resumed(settings) is not None
    then[name] = "another"
    with pytest.raises(UserError, match=f"{name} = 'another'"):
        resume.find_resumed(settings)


def test_type_checkers_know_the_fields() -> None:
    assert FIELDS_PATH.read_text() == fields_stub(), "run `python settings.py`"


@pytest.mark.slow
def test_a_misspelt_setting_is_a_type_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = ["from settings import resolve", "resolve().mixup_alhpa", "text: str = resolve().batch_size"]
    said, failed, _ = api.run(["-c", "\n".join(lines)])
    assert '"Config" has no attribute "mixup_alhpa"' in said, failed
    assert 'expression has type "int"' in said
    assert "Found 2 errors" in said


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_recipes_are_settings(path: Path) -> None:
    """Each has values that are allowed; its docstring says the published number and the command."""
    values = read_recipe(path.stem)
    settings = resolve({"recipe": path.stem, "resume_checkpoint": "start.ckpt"}).model_dump()
    assert values.items() <= settings.items()
    assert settings["recipe"] == path.stem
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "Published" in text
    assert f"--recipe {path.stem}" in text


def test_flags_override_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebook_config: ModuleType) -> None:
    settings = resolve({"recipe": "htsat_esc50", "max_epoch": "5"})
    assert (settings.dataset_type, settings.protocol, settings.max_epoch) == ("esc-50", "paper", 5)
    vars(notebook_config)["recipe"] = "htsat_scv2"
    assert resolve().sample_rate == 16000
    monkeypatch.setattr("settings.RECIPES", tmp_path)
    for line, named in (
        ("max_epoch = 0", "max_epoch = 0"),
        ("max_epochs = 5", "max_epoch"),
        ("max_epoch = print(5)", "mine.py"),
        ("import os", "line 2"),
        ("max_epoch", "line 2"),
        ("max_epoch =", "mine.py"),
    ):
        (tmp_path / "mine.py").write_text(f'"""A recipe."""\n{line}\n')
        with pytest.raises(UserError, match=named):
            resolve({"recipe": "mine"})
    with pytest.raises(UserError, match="mine"):
        resolve({"recipe": "htsat_esc50"})


def test_a_run_of_a_recipe_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder follows from the recipe too; where it was given others than the recipe's, as defaults, they stay."""
    monkeypatch.chdir(tmp_path)
    given = {"recipe": "dcase2016_task2_frozen", "dataset_type": "demo", "resume_checkpoint": "x", "resume": "auto"}
    settings = resolve({**given, "max_epoch": 7, "mixup_alpha": 0.5})
    settings.run_folder.mkdir(parents=True)
    (settings.run_folder / "config.json").write_text(json.dumps(settings.model_dump()))
    for words in (given, {"exp_name": settings.exp_name, "resume": "auto"}):
        assert resolve(resume.with_recorded(words)) == settings


def test_combinations_of_frame_training_that_do_nothing() -> None:
    for given in ({"balanced_data": True, "balanced_replacement": False}, {"balanced_by": "active_frames"}):
        with pytest.raises(UserError, match="balanced_"):
            resolve({"loss_type": "frame_bce", **given})
