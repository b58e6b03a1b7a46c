"""The importer of legacy files: their clips are imported, other objects in a pickle do not run."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from data.clip_store import ClipTable, read_store_table
from prepare.esc50 import LABELS
from prepare.legacy import import_legacy, read_legacy
from prepare.report import PrepareReport
from settings import UserError
from tests.helpers import call, refused
from tests.prepare.raw_data import names

RATE = 32000


def sound(seed: int, samples: int = 800) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def clip(number: int, **fields: Any) -> dict[str, Any]:
    """As the published notebook made them: the name is NumPy's text, the class a number."""
    return {"name": np.str_(f"{number}.wav"), "target": number % 50, "waveform": sound(number), **fields}


def save(path: Path, content: Any) -> Path:
    """np.save as the published code used it."""
    array = np.empty(len(content), dtype=object)
    for place, entry in enumerate(content):
        array[place] = entry
    np.save(path, array, allow_pickle=True)
    return path


def save_pickle(path: Path, pickled: bytes, shape: tuple[int, ...] = (1,)) -> Path:
    """A .npy file of objects with any pickle in it."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": shape})
        file.write(pickled)
    return path


def imported(paths: list[Path], store: Path, splits: list[str] | None = None) -> tuple[PrepareReport, ClipTable]:
    about = {"sample_rate": RATE, "labels": LABELS, "dataset_type": "esc-50", "splits": splits}
    report = import_legacy(paths, store, **about)  # type: ignore[arg-type]
    return report, read_store_table(store)


@pytest.mark.parametrize("equal", [True, False])
def test_folds_of_esc50(tmp_path: Path, equal: bool) -> None:
    """Folds of equal size are saved as a matrix of dicts, others as an array of lists."""
    folds = [[clip(5 * fold + n) for n in range(3 if equal else 2 + fold % 2)] for fold in range(5)]
    np.save(tmp_path / "esc-50-data.npy", np.array(folds, dtype=object), allow_pickle=True)
    _, table = imported([tmp_path / "esc-50-data.npy"], tmp_path / "esc-50.h5")
    flat = [(number, one) for number, fold in enumerate(folds, start=1) for one in fold]
    assert table.fold.tolist() == [fold for fold, _ in flat]
    assert names(table) == [one["name"] for _, one in flat]
    assert table.targets.nonzero()[1].tolist() == [one["target"] for _, one in flat]
    assert (table.labels, table.sample_rate, table.task) == (LABELS, RATE, "single_label")
    assert (table.attributes["dataset_type"], (table.split != b"").any()) == ("esc-50", False)
    with h5py.File(tmp_path / "esc-50.h5") as file:
        expected = np.round(np.stack([one["waveform"] for _, one in flat]) * 32767)
        assert np.abs(file["waveform"][:] - expected).max() <= 1


def test_one_file_for_each_split(tmp_path: Path) -> None:
    train = save(tmp_path / "scv2_train.npy", [clip(1), clip(2, waveform=sound(2, 500))])
    test = save(tmp_path / "scv2_test.npy", [clip(3)])
    _, table = imported([train, test], tmp_path / "s.h5", ["train", "test"])
    assert table.split.tolist() == [b"train", b"train", b"test"]
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["real_len"][:].tolist() == [800, 500, 800]
    for splits in (None, ["train"], ["train", "eval"]):
        with pytest.raises(UserError, match="--legacy_splits"):
            imported([train, test], tmp_path / "s.h5", splits)
    folds = save(tmp_path / "folds.npy", [[clip(1)], [clip(2), clip(3)]])
    with pytest.raises(UserError, match=r"folds\.npy holds 2 folds"):
        imported([folds, test], tmp_path / "s.h5", ["train", "test"])
    with pytest.raises(UserError, match=r"holds 128 folds"):
        imported([save(tmp_path / "many.npy", [[clip(n)] for n in range(128)])], tmp_path / "s.h5")


def test_desed_has_no_targets(tmp_path: Path) -> None:
    waveform = np.array([-32768, 0, 5, 32767], dtype=np.int16)
    path = save(tmp_path / "eval.npy", [{"audio_name": "Y1.wav", "waveform": waveform, "other": {"a": (1, {2})}}])
    _, table = imported([path], tmp_path / "d.h5", ["test"])
    assert (table.targets.any(), table.task) == (False, "multilabel")
    with h5py.File(tmp_path / "d.h5") as file:
        assert file["waveform"][0].tolist() == waveform.tolist()


@pytest.mark.parametrize("protocol", [0, 2, 3, 4])
@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_old_pickles(tmp_path: Path, protocol: int, module: str) -> None:
    """Other protocols of pickle, the module's name in old versions of NumPy, other byte orders and lists."""
    vector = np.zeros(50)
    vector[[3, 7]] = 1
    array = np.empty(3, dtype=object)
    array[:] = [
        clip(1, target=np.int64(4), waveform=sound(1).astype(">f4")),
        clip(2, target=vector, waveform=sound(2)[None].T),
        clip(3, target=[k == 9 for k in range(50)], waveform=[0.5, np.float32(-0.5), 0]),
    ]
    pickled = pickle.dumps(array, protocol=protocol)
    if protocol < 4:  # from protocol 4 on, the length of a name is part of the pickle
        pickled = pickled.replace(b"numpy._core.multiarray", module.encode())
    (found,) = read_legacy(save_pickle(tmp_path / "old.npy", pickled, (3,)))
    assert [one.name for one in found] == ["1.wav", "2.wav", "3.wav"]
    for one, waveform in zip(found, (sound(1), sound(2), np.array([0.5, -0.5, 0])), strict=True):
        assert np.array_equal(one.waveform, waveform)
    _, table = imported([tmp_path / "old.npy"], tmp_path / "s.h5", ["train"])
    assert [np.flatnonzero(target).tolist() for target in table.targets] == [[4], [3, 7], [9]]


def test_odd_clips_are_skipped_and_reported(tmp_path: Path) -> None:
    odd = {"empty": sound(0, 0), "nan": np.array([0.0, np.nan]), "loud": np.array([0.0, 9000.0])}
    odd |= {"wide": np.array([0, 70000]), "truth": np.array([True])}
    path = save(tmp_path / "a.npy", [clip(1), *(clip(2, name=name, waveform=w) for name, w in odd.items())])
    report, _ = imported([path], tmp_path / "s.h5", ["train"])
    assert (report.clips, [name for name, _ in report.skipped]) == (1, list(odd))
    with pytest.raises(UserError, match="None of the 1 clips"):
        imported([save(tmp_path / "b.npy", [clip(1, waveform=sound(0, 0))])], tmp_path / "t.h5", ["train"])
    assert not (tmp_path / "t.h5").exists()


@pytest.mark.parametrize("target", [50, -1, 1.5, float("nan"), True, np.ones(3), np.full(50, 0.5), [1]])
def test_wrong_classes(tmp_path: Path, target: Any) -> None:
    path = save(tmp_path / "a.npy", [clip(1), clip(2, target=target)])
    with pytest.raises(UserError, match=r"2\.wav has (class .*; the classes are 0 to 49|a target of shape)"):
        imported([path], tmp_path / "s.h5", ["train"])


class Call:
    """Pickled, it calls a function with arguments, and gives the result a state."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, *([state] if state is not None else []))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def deep_eval(proof: Path) -> Any:
    """An array of a clip in which a call of eval is hidden."""
    array = np.empty(1, dtype=object)
    array[0] = clip(1, waveform={"deep": [(Call(eval, f"open({str(proof)!r}, 'w').close()"),)]})
    return array


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", ["system", "eval"])
def test_a_pickle_that_calls_a_function_does_not_run(tmp_path: Path, protocol: int, name: str) -> None:
    proof = tmp_path / "it_ran"
    system = [{"name": "a", "target": 1}, Call(os.system, f"touch {proof}")]
    pickled = pickle.dumps(system if name == "system" else deep_eval(proof), protocol=protocol)
    with pytest.raises(UserError, match=rf"evil\.npy is refused.*\.{name}"):
        read_legacy(save_pickle(tmp_path / "evil.npy", pickled))
    assert not proof.exists()
    pickle.loads(pickled)  # the same, as the published code reads it
    assert proof.exists()


RECONSTRUCT = np.zeros(1).__reduce__()[0]
FORGED = Call(np.dtype, "V8", state=(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (Call(RECONSTRUCT, dict, (0,), b"b"), "dict"),
        (Call(np.ndarray, (10**6,)), "numpy.ndarray"),
        (np.ndarray.__reduce__, "builtins.getattr"),
        (np.random.default_rng, "numpy.random"),
        (FORGED, "V8"),
        (Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), FORGED, False, bytes(8))), "V8"),
        (Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, bytes(8))), "without the"),
        (Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (9,), np.dtype("f4"), False, bytes(8))), "too small"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]), "V8"),
        (Call(np.dtype, "f4,O"), "f4,O"),
        (np.datetime64("2020-01-01"), "M8"),
        (np.ma.zeros(3), "numpy.ma"),
        (Path("a"), "pathlib"),
    ],
)  # fmt: skip
def test_other_objects_are_refused(tmp_path: Path, content: Any, match: str) -> None:
    pickled = pickle.dumps([clip(1, waveform=content)], protocol=4)
    with pytest.raises(UserError, match=match):
        read_legacy(save_pickle(tmp_path / "evil.npy", pickled))


@pytest.mark.parametrize(
    "pickled",
    [
        b"cnumpy\ndtype\n(N}Vx\nI1\nstb.",  # a state for what stands for numpy.dtype itself
        b"c_codecs\nencode\n(N}Vx\nI1\nstb.",
        b"cnumpy._core.multiarray\n_reconstruct\n(N}Vx\nI1\nstb.",
        b"cbuiltins\nset\n(N}Vx\nI1\nstb.",
        b"P1\n.",  # an object outside of the file
        b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",  # a name with a dot
        b"ccollections\nOrderedDict.fromkeys\n.",
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n)\x81)b.",  # an array that was not made as arrays are
    ],
)
def test_pickles_written_by_hand(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(UserError, match=r"evil\.npy (is refused|cannot be read)"):
        read_legacy(save_pickle(tmp_path / "evil.npy", pickled))


@pytest.mark.parametrize("name", [b"scalar", b"_reconstruct"])
def test_objects_that_are_made_without_their_arguments(tmp_path: Path, name: bytes) -> None:
    pickled = b"\x80\x02]}(X\x04\0\0\0nameX\1\0\0\0aX\x08\0\0\0waveformcnumpy._core.multiarray\n%b\n)\x81ua."
    with pytest.raises(UserError, match="waveform of a"):
        read_legacy(save_pickle(tmp_path / "a.npy", pickled % name))


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.npy", [clip(1), clip(2)]).read_bytes()
    for length in (0, 3, 7, 9, 60, 128, 129, 200, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npy").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.npy.* cut off"):
            read_legacy(tmp_path / "cut.npy")


NO_CLIPS: list[Any] = [[], [1, 2], [[[clip(1)]]], [clip(1), [clip(2)]], ["text"]]
NO_NAME_OR_SOUND: list[Any] = [[{"name": "a", "target": 1}], [{"waveform": sound(1), "target": 1}], [{}]]
NO_NUMBERS: list[Any] = [[clip(1, waveform="text")], [clip(1, waveform=[[1], [2, 3]])], [clip(1, target=None)]]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        *((content, "no list of clips") for content in NO_CLIPS),
        *((content, "name, audio_name, filename") for content in NO_NAME_OR_SOUND),
        *((content, r"of 1\.wav must be numbers") for content in NO_NUMBERS),
        ([clip(1, waveform=np.zeros((2, 5)))], r"of 1\.wav .* \(2, 5\)"),
        ([clip(1, name=3)], "int"),
    ],
)
def test_lists_that_are_no_legacy_files(tmp_path: Path, content: list[Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_legacy(save(tmp_path / "a.npy", content))


def test_files_that_are_no_legacy_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with pytest.raises(UserError, match="There is no file"):
        read_legacy(path)
    archive = io.BytesIO()
    np.savez(archive, a=np.zeros(3))
    for content in (pickle.dumps([clip(1)]), archive.getvalue()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"no \.npy file"):
            read_legacy(path)
    np.save(path, np.zeros((3, 4)))
    with pytest.raises(UserError, match="float64"):
        read_legacy(path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "esc-50-data.npy", [[clip(1), clip(2)], [clip(3)], [clip(4)]])
    data = ("import_legacy", "--dataset_path", str(tmp_path / "data"), "--dataset_type")
    call(*data, "esc-50", "--legacy", path)
    table = read_store_table(tmp_path / "data" / "esc-50.h5")
    assert (table.fold.tolist(), table.labels) == ([1, 1, 2, 3], LABELS)
    assert "4 clips" in capsys.readouterr().out
    files = [str(save(tmp_path / f"{split}.npy", [clip(1)])) for split in ("train", "test")]
    flags = ["--legacy_splits", "train, test", "--legacy", files[0], "--legacy", files[1]]
    call(*data, "folder", "--classes_num", "60", *flags)
    table = read_store_table(tmp_path / "data" / "folder.h5")
    assert (table.split.tolist(), table.labels[59]) == ([b"train", b"test"], "class 59")
    assert "audioset" in refused(capsys, *data, "audioset", "--legacy", path)
