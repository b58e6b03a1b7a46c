"""What every adapter keeps: its parts, a valid store with its origin, broken files reported, nothing half-written."""

import inspect
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest

import main
from data.clip_store import SPLITS, STRONG, ClipStoreWriter, labelling, read_store_table
from prepare.adapters import ADAPTERS, all_flags, check_flags, load_adapter, read_flags
from settings import UserError, all_settings
from tests.prepare.raw_data import RATE, RAW_DATA, events

PARTS = ["NAME", "SOURCE", "LICENCE", "TASK", "FLAGS", "prepare"]


def command(name: str, target: Path, flags: dict[str, Any]) -> int:
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    about = ["--dataset_type", name, "--dataset_path", str(target), "--sample_rate", str(RATE)]
    return main.main(["prepare", *about, *words])


def stores(target: Path) -> list[Path]:
    return sorted(target.rglob("*.h5*"))


def content(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return {
            **{key: file[key][:].tolist() for key in file},
            **{key: np.array(v).tolist() for key, v in file.attrs.items()},
        }


def test_there_is_one_adapter_for_each_data_set() -> None:
    assert set(ADAPTERS) == set(RAW_DATA) == set(get_args(all_settings()["dataset_type"].type))


@pytest.mark.parametrize("name", ADAPTERS)
def test_parts_and_flags(name: str) -> None:
    adapter = load_adapter(name)
    assert [part for part in vars(adapter) if part in PARTS] == PARTS
    assert (name, read_flags(name)) == (adapter.NAME, adapter.FLAGS)
    parameters = [name for name in inspect.signature(adapter.prepare).parameters if name != "task"]  # --task chooses it
    assert parameters == ["settings", *adapter.FLAGS]
    for flag, options in all_flags():
        own = adapter.FLAGS.get(flag.removeprefix("--"))
        if own is None:
            with pytest.raises(UserError, match=flag):
                check_flags(adapter, [*adapter.FLAGS, flag.removeprefix("--")])
        else:
            assert name in options["help"]
            assert (own["type"], own["help"] in options["help"]) == (options["type"], True)
    for flag, parameter in inspect.signature(adapter.prepare).parameters.items():
        if flag != "settings" and parameter.default is parameter.empty:
            with pytest.raises(UserError, match=f"--{flag}"):
                check_flags(adapter, adapter.FLAGS.keys() - {flag})


@pytest.mark.parametrize("name", ADAPTERS)
def test_store(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Origin, classes, rate, splits and times are recorded; a broken file is reported; a second run writes the same."""
    flags = RAW_DATA[name](tmp_path)
    skipped = int(name != "demo")
    assert command(name, tmp_path / "data", flags) == skipped
    printed = capsys.readouterr().out
    assert ("broken" in printed) == (name != "demo")
    (path,) = stores(tmp_path / "data")
    adapter, table = load_adapter(name), read_store_table(path)
    assert table.attributes["source"].startswith(adapter.SOURCE.partition("{")[0])
    assert table.attributes["source"]
    assert table.attributes["licence"] == adapter.LICENCE
    assert (table.attributes["dataset_type"], table.sample_rate) == (name, RATE)
    assert table.task == ("single_label" if name == "folder" else adapter.TASK)
    assert f"{len(table)} clips" in printed
    assert len(table) == len(set(table.names.tolist())) > 1
    assert not any(b"broken" in clip for clip in table.names)
    assert len(table.labels) == len(set(table.labels)) == table.targets.shape[1]
    if table.task == "single_label":
        assert (table.targets.sum(axis=1) == 1).all()
    if name == "audioset":  # each file is a split
        assert path.name == "balanced_train.h5"
    elif (table.fold > 0).any():
        assert len(set(table.fold.tolist())) > 2
    else:
        assert set(table.split.tolist()) == {split.encode() for split in SPLITS}
    with h5py.File(path) as file:
        seconds = file["real_len"][:] / RATE
        assert (np.abs(file["waveform"][:]).max(axis=1) > 0).all()
    assert (seconds > 0).all()
    for mine, target, end, known in zip(events(table), table.targets, seconds, labelling(table), strict=True):
        assert all(0 <= onset < offset <= end + 1e-6 for _, onset, offset in mine)
        assert {label for label, _, _ in mine} == {table.labels[k] for k in np.flatnonzero(target) if known == STRONG}
    assert command(name, tmp_path / "again", flags) == skipped
    assert content(stores(tmp_path / "again")[0]) == content(path)


@pytest.mark.parametrize("name", ADAPTERS)
def test_nothing_is_left_half_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at the second clip; and where no file can be read, which is the user's mistake."""
    flags = RAW_DATA[name](tmp_path)
    add = ClipStoreWriter.add

    def interrupted(self: ClipStoreWriter, clip: Any) -> None:
        if self.rows:
            raise KeyboardInterrupt
        add(self, clip)

    with monkeypatch.context() as patch:
        patch.setattr(ClipStoreWriter, "add", interrupted)
        assert command(name, tmp_path / "data", flags) == 130
    assert not stores(tmp_path / "data")
    if "raw" in flags:
        for path in flags["raw"].rglob("*.*"):
            if path.suffix in (".wav", ".flac", ".ogg"):
                path.write_text("no sound")
        assert command(name, tmp_path / "data", flags) == 2
        assert not stores(tmp_path / "data")
