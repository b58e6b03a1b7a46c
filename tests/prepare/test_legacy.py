"""The importer of legacy files: what is in them comes over, what a pickle may hold besides does not run."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from commands import import_legacy as command
from data.clip_store import ClipTable, read_store_table
from prepare.esc50 import LABELS
from prepare.legacy import import_legacy, read_legacy

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
        header = {"descr": "|O", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(pickled)
    return path


def take_over(paths: list[Path], store: Path, **options: Any) -> ClipTable:
    import_legacy(paths, store, sample_rate=RATE, labels=LABELS, dataset_type="esc-50", **options)
    return read_store_table(store)


@pytest.mark.parametrize("equal", [True, False])
def test_folds_of_esc50(tmp_path: Path, equal: bool) -> None:
    """Folds of equal size are saved as a matrix of dicts, others as an array of lists."""
    folds = [[clip(5 * fold + n) for n in range(3 if equal else 2 + fold % 2)] for fold in range(5)]
    np.save(tmp_path / "esc-50-data.npy", np.array(folds, dtype=object), allow_pickle=True)
    table = take_over([tmp_path / "esc-50-data.npy"], tmp_path / "esc-50.h5")
    flat = [(number, c) for number, fold in enumerate(folds, start=1) for c in fold]
    assert table.fold.tolist() == [fold for fold, _ in flat]
    assert table.names.tolist() == [str(c["name"]).encode() for _, c in flat]
    assert table.targets.nonzero()[1].tolist() == [c["target"] for _, c in flat]
    assert (table.labels, table.sample_rate, table.attributes["dataset_type"]) == (LABELS, RATE, "esc-50")
    assert not (table.split != b"").any()
    with h5py.File(tmp_path / "esc-50.h5") as file:
        expected = np.round(np.stack([c["waveform"] for _, c in flat]) * 32767)
        assert np.abs(file["waveform"][:] - expected).max() <= 1


def test_one_file_for_each_split(tmp_path: Path) -> None:
    train = save(tmp_path / "scv2_train.npy", [clip(1), clip(2, waveform=sound(2, 500))])
    test = save(tmp_path / "scv2_test.npy", [clip(3)])
    table = take_over([train, test], tmp_path / "s.h5", splits=["train", "test"])
    assert table.split.tolist() == [b"train", b"train", b"test"]
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["real_len"][:].tolist() == [800, 500, 800]
    for splits in (None, ["train"], ["train", "eval"]):
        with pytest.raises(ValueError, match="each one of train, validation, test"):
            take_over([train, test], tmp_path / "s.h5", splits=splits)
    folds = save(tmp_path / "folds.npy", [[clip(1)], [clip(2), clip(3)]])
    with pytest.raises(ValueError, match=r"folds\.npy holds 2 folds: import it alone"):
        take_over([folds, test], tmp_path / "s.h5", splits=["train", "test"])


def test_desed_has_no_targets(tmp_path: Path) -> None:
    waveform = np.array([-32768, 0, 5, 32767], dtype=np.int16)
    path = save(tmp_path / "eval.npy", [{"audio_name": "Y1.wav", "waveform": waveform, "other": {"a": (1, {2})}}])
    table = take_over([path], tmp_path / "d.h5", splits=["test"])
    assert not table.targets.any()
    with h5py.File(tmp_path / "d.h5") as file:
        assert file["waveform"][0].tolist() == waveform.tolist()


@pytest.mark.parametrize("protocol", [0, 2, 3, 4])
@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_old_pickles(tmp_path: Path, protocol: int, module: str) -> None:
    """Other protocols of pickle, the module's name in old versions of NumPy, other byte orders and lists."""
    vector = np.zeros(50)
    vector[[3, 7]] = 1
    clips = [
        clip(1, target=np.int64(4), waveform=sound(1).astype(">f4")),
        clip(2, target=vector, waveform=sound(2)[None].T),
        clip(3, target=[k == 9 for k in range(50)], waveform=[0.5, np.float32(-0.5), 0]),
    ]
    array = np.empty(3, dtype=object)
    array[:] = clips
    pickled = pickle.dumps(array, protocol=protocol)
    if protocol < 4:  # from protocol 4 on, the length of a name is part of the pickle
        pickled = pickled.replace(b"numpy._core.multiarray", module.encode())
    (found,) = read_legacy(save_pickle(tmp_path / "old.npy", pickled, (3,)))
    assert [c.name for c in found] == ["1.wav", "2.wav", "3.wav"]
    assert np.array_equal(found[0].waveform, sound(1))
    assert np.array_equal(found[1].waveform, sound(2))
    assert found[2].waveform.tolist() == [0.5, -0.5, 0]
    table = take_over([tmp_path / "old.npy"], tmp_path / "s.h5", splits=["train"])
    assert [np.flatnonzero(target).tolist() for target in table.targets] == [[4], [3, 7], [9]]


def test_odd_clips_are_skipped_and_reported(tmp_path: Path) -> None:
    odd = {"empty": sound(0, 0), "nan": np.array([0.0, np.nan]), "loud": np.array([0.0, 9000.0])}
    odd |= {"wide": np.array([0, 70000]), "truth": np.array([True])}
    path = save(tmp_path / "a.npy", [clip(1), *(clip(2, name=name, waveform=w) for name, w in odd.items())])
    report = import_legacy(
        [path], tmp_path / "s.h5", sample_rate=RATE, labels=LABELS, dataset_type="esc-50", splits=["train"]
    )
    assert report.clips == 1
    assert [name for name, _ in report.skipped] == list(odd)
    with pytest.raises(ValueError, match="None of the 1 clips"):
        take_over([save(tmp_path / "b.npy", [clip(1, waveform=sound(0, 0))])], tmp_path / "t.h5", splits=["train"])
    assert not (tmp_path / "t.h5").exists()


@pytest.mark.parametrize("target", [50, -1, 1.5, float("nan"), True, np.ones(3), np.full(50, 0.5), [1]])
def test_wrong_classes(tmp_path: Path, target: Any) -> None:
    path = save(tmp_path / "a.npy", [clip(1), clip(2, target=target)])
    with pytest.raises(ValueError, match=r"2\.wav has (class .*; the classes are 0 to 49|a target of shape)"):
        take_over([path], tmp_path / "s.h5", splits=["train"])


class Call:
    """Pickled, it calls a function with arguments, and gives the result a state."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, *([state] if state is not None else []))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_with_os_system_does_not_run(tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "it_ran"
    pickled = pickle.dumps([{"name": "a", "target": 1}, Call(os.system, f"touch {proof}")], protocol=protocol)
    with pytest.raises(ValueError, match=rf"evil\.npy is refused.* {os.name}\.system; only arrays"):
        read_legacy(save_pickle(tmp_path / "evil.npy", pickled))
    assert not proof.exists()
    pickle.loads(pickled)  # the same, as the published code reads it
    assert proof.exists()


def test_a_pickle_with_a_nested_eval_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it_ran"
    array = np.empty(1, dtype=object)
    array[0] = clip(1, waveform={"deep": [(Call(eval, f"open({str(proof)!r}, 'w').close()"),)]})
    np.save(tmp_path / "evil.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=r"builtins\.eval"):
        read_legacy(tmp_path / "evil.npy")
    assert not proof.exists()
    np.load(tmp_path / "evil.npy", allow_pickle=True)
    assert proof.exists()


RECONSTRUCT = np.zeros(1).__reduce__()[0]
FORGED = Call(np.dtype, "V8", state=(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Call(RECONSTRUCT, dict, (0,), b"b"), "an array of the kind <class 'dict'>|builtins.dict"),
        (Call(np.ndarray, (10**6,)), "it calls numpy.ndarray"),
        (np.ndarray.__reduce__, "builtins.getattr"),
        (np.random.default_rng, "numpy.random"),
        (FORGED, "an array of V8"),
        (Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), FORGED, False, bytes(8))), "an array of V8"),
        (Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, bytes(8))), "without the"),
        (Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (9,), np.dtype("f4"), False, bytes(8))), "too small"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]), "an array of V8"),
        (Call(np.dtype, "f4,O"), "an array of f4,O"),
        (np.datetime64("2020-01-01"), "an array of M8"),
        (np.ma.zeros(3), "numpy.ma"),
        (Path("a"), "pathlib"),
    ],
)  # fmt: skip
def test_what_else_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    pickled = pickle.dumps([clip(1, waveform=content)], protocol=4)
    with pytest.raises(ValueError, match=said):
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
    with pytest.raises(ValueError, match=r"evil\.npy (is refused|cannot be read)"):
        read_legacy(save_pickle(tmp_path / "evil.npy", pickled))


def test_objects_that_are_made_without_their_arguments(tmp_path: Path) -> None:
    for name in ("scalar", "_reconstruct"):
        pickled = b"\x80\x02]}(X\x04\0\0\0nameX\1\0\0\0aX\x08\0\0\0waveformcnumpy._core.multiarray\n%b\n)\x81ua."
        with pytest.raises(ValueError, match="waveform of a must be numbers"):
            read_legacy(save_pickle(tmp_path / "a.npy", pickled % name.encode()))


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.npy", [clip(1), clip(2)]).read_bytes()
    for length in (0, 3, 7, 9, 60, 128, 129, 200, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.npy.* cut off"):
            read_legacy(tmp_path / "cut.npy")


def test_files_that_are_no_legacy_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with pytest.raises(ValueError, match="There is no file"):
        read_legacy(path)
    np.save(path, np.zeros((3, 4)))
    with pytest.raises(ValueError, match="array of float64; a legacy file holds dicts"):
        read_legacy(path)
    path.write_bytes(pickle.dumps([clip(1)]))
    with pytest.raises(ValueError, match=r"no \.npy file"):
        read_legacy(path)
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"no \.npy file"):
        read_legacy(path)
    for content in ([], [1, 2], [[[clip(1)]]], [clip(1), [clip(2)]], ["text"]):
        with pytest.raises(ValueError, match="no list of clips"):
            read_legacy(save(path, content))
    without_waveform = {"name": "a", "target": 1}
    for entry in (without_waveform, {"waveform": sound(1), "target": 1}, {}):
        with pytest.raises(ValueError, match="a clip needs waveform and one of name, audio_name, filename"):
            read_legacy(save(path, [entry]))
    for entry in (clip(1, waveform="text"), clip(1, waveform=[[1], [2, 3]]), clip(1, target=None)):
        with pytest.raises(ValueError, match=r"of 1\.wav must be numbers"):
            read_legacy(save(path, [entry]))
    with pytest.raises(ValueError, match="must be one channel"):
        read_legacy(save(path, [clip(1, waveform=np.zeros((2, 5)))]))
    with pytest.raises(ValueError, match="must be text; int was found"):
        read_legacy(save(path, [clip(1, name=3)]))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "esc-50-data.npy", [[clip(1), clip(2)], [clip(3)], [clip(4)]])
    given = {"dataset_type": "esc-50", "dataset_path": str(tmp_path / "data")}
    command.run(given, [str(path)])
    table = read_store_table(tmp_path / "data" / "esc-50.h5")
    assert (table.fold.tolist(), table.labels) == ([1, 1, 2, 3], LABELS)
    assert "4 clips" in capsys.readouterr().out
    given = {"dataset_type": "folder", "dataset_path": str(tmp_path / "data"), "classes_num": "60"}
    files = [str(save(tmp_path / f"{split}.npy", [clip(1)])) for split in ("train", "test")]
    command.run(given, files, "train, test")
    table = read_store_table(tmp_path / "data" / "folder.h5")
    assert (table.split.tolist(), table.labels[59]) == ([b"train", b"test"], "class 59")
    with pytest.raises(ValueError, match="import_legacy knows --dataset_type"):
        command.run({"dataset_type": "audioset"}, files)
