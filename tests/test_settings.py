"""config.py, flags and derived values; what is refused, and how."""

import copy
import pickle
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

import main
from commands.command_line import COMMANDS, build_parser
from settings import all_settings, resolve


@pytest.fixture
def notebook_config() -> Iterator[ModuleType]:
    """`import config`, as in a notebook; forgotten afterwards."""
    sys.modules.pop("config", None)
    import config

    yield config
    sys.modules.pop("config", None)


def test_derived_settings_follow() -> None:
    scv2 = resolve({"dataset_type": "scv2"})
    assert (scv2.sample_rate, scv2.hop_size, scv2.clip_samples, scv2.classes_num) == (16000, 160, 160000, 35)
    assert scv2.fmax == 8000.0
    audioset = resolve({"dataset_type": "audioset"})
    assert (audioset.sample_rate, audioset.hop_size, audioset.classes_num, audioset.batch_size) == (
        32000,
        320,
        527,
        128,
    )
    assert resolve({"dataset_type": "esc-50"}).loss_type == "clip_ce"
    assert resolve({"sample_rate": 16000}).hop_size == 160
    assert resolve({"sample_rate": 16000, "hop_size": 200}).hop_size == 200
    assert resolve({"exp_name": "x"}).heatmap_dir == "workspace/runs/x/scores"


def test_text_of_flags_becomes_values() -> None:
    given = {"max_epoch": "5", "lr_scheduler_epoch": "1,2,3", "lr_rate": "[0.1, 0.2, 0.3]", "fl_local": "True"}
    found = resolve({**given, "crop_size": "None", "esm_model_pathes": "a.ckpt,b.ckpt"})
    assert (found.max_epoch, found.lr_scheduler_epoch, found.lr_rate) == (5, [1, 2, 3], [0.1, 0.2, 0.3])
    assert found.fl_local is True
    assert found.crop_size is None
    assert found.esm_model_pathes == ["a.ckpt", "b.ckpt"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_epochs": 5}, "Did you mean max_epoch"),
        ({"dataset_type": "esc50"}, "'audioset', 'audioset-strong', 'esc-50'"),
        ({"max_epoch": "many"}, "max_epoch = 'many' is not allowed"),
        ({"max_epoch": 0}, "must be greater than 0"),
        ({"mixup_alpha": -1}, "must be 0 or greater"),
        ({"fmin": 15000}, "must lie below fmax"),
        ({"lr_rate": [0.1]}, "three values"),
        ({"loss_type": "clip_ce"}, "use clip_bce"),
        ({"tta_shifts": []}, r"give \[0\]"),
        ({"htsat_drop_path": 1.0}, "below 1"),
        ({"clip_samples": 640000}, "2001 frames, the network takes 1024"),
        ({"dataset_type": "audioset", "protocol": "held_out"}, "protocol must be paper"),
    ],
)
def test_refusals_say_what_is_allowed(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resolve(given)


def test_bands_above_half_the_rate_warn() -> None:
    with pytest.warns(UserWarning, match="stay empty"):
        assert resolve({"dataset_type": "scv2", "fmax": 14000}).fmax == 14000


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        resolve().max_epoch = 3  # type: ignore[attr-defined]


def test_notebook_edit_counts(notebook_config: ModuleType) -> None:
    notebook_config.max_epoch = 3  # type: ignore[attr-defined]
    notebook_config.dataset_type = "scv2"  # type: ignore[attr-defined]
    found = resolve()
    assert (found.max_epoch, found.sample_rate) == (3, 16000)
    assert resolve({"max_epoch": 4}).max_epoch == 4


def test_notebook_typo_is_refused(notebook_config: ModuleType) -> None:
    notebook_config.max_epochs = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="Did you mean max_epoch"):
        resolve()


def test_every_setting_is_a_flag_with_its_comment(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            build_parser(name).parse_args([name, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for setting in all_settings().values():
            assert f"--{setting.name} " in shown
            assert setting.comment
            assert setting.comment.split()[0] in shown


def test_checkpoint_decides_the_network() -> None:
    saved = resolve({"dataset_type": "esc-50", "htsat_dim": 48, "batch_size": 7, "esc_fold": 3}).model_dump()
    found = resolve({}, checkpoint=saved)
    assert (found.dataset_type, found.htsat_dim, found.classes_num, found.esc_fold) == ("esc-50", 48, 50, 3)
    assert found.batch_size == resolve({"dataset_type": "esc-50"}).batch_size
    assert found.dataset_path == "workspace/data/esc-50"
    with pytest.raises(ValueError, match="contradicts the checkpoint"):
        resolve({"htsat_dim": 96}, checkpoint=saved)


def test_config_can_be_copied_to_another_process() -> None:
    config = resolve({"max_epoch": 7})
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


def test_another_fold_than_the_checkpoints_is_refused() -> None:
    saved = resolve({"dataset_type": "esc-50", "esc_fold": 1}).model_dump()
    with pytest.raises(ValueError, match="esc_fold = 2 contradicts the checkpoint"):
        resolve({"esc_fold": 2}, checkpoint=saved)
    assert resolve({"dataset_type": "demo", "esc_fold": 2}, checkpoint=saved).esc_fold == 2


def test_unknown_flag_names_the_close_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main.main(["train", "--max_epochs", "3"])
    assert left.value.code == 2
    assert "Did you mean max_epoch" in capsys.readouterr().err


def test_what_is_set_for_training_does_not_hinder_a_test(notebook_config: ModuleType) -> None:
    """config.py as edited for a training on event times, while a checkpoint of clip labels is used."""
    vars(notebook_config).update(loss_type="frame_bce", mean_teacher=1.0)
    trained = {**resolve().model_dump(), "loss_type": "clip_bce"}
    assert resolve({}, checkpoint=trained).loss_type == "clip_bce"
    with pytest.raises(ValueError, match="mean_teacher: only loss_type = frame_bce"):
        resolve({"loss_type": "clip_bce"})
