"""The clip store: round trip, PANNs' files, and what is refused."""

import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

from data.clip_store import (
    STRONG,
    UNLABELLED,
    WEAK,
    Clip,
    ClipStoreWriter,
    Event,
    Waveforms,
    class_index,
    labelling,
    open_store,
    read_events,
    read_index_table,
    read_store_table,
)
from settings import UserError

OLD_STORE = Path(__file__).with_name("old_store.h5")


def write(path: Path) -> list[Clip]:
    rng = np.random.default_rng(0)
    clips = [
        Clip(
            f"clip{number}.wav",
            rng.integers(-32768, 32767, 50 + number * 60).astype(np.int16),
            [number % 3],
            fold=number % 2 + 1,
            split="train" if number else "test",
            events=[Event(number % 3, 0.25, 0.5)],
        )
        for number in range(4)
    ]
    with ClipStoreWriter(
        path, clip_samples=200, sample_rate=100, labels=["a", "b", "c"], source="test", task="multilabel"
    ) as writer:
        for clip in clips:
            writer.add(clip)
    return clips


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "store.h5"
    clips = write(path)
    table = read_store_table(path)
    assert table.names.tolist() == [clip.name.encode() for clip in clips]
    assert table.targets.argmax(axis=1).tolist() == [0, 1, 2, 0]
    assert table.fold.tolist() == [1, 2, 1, 2]
    assert table.split.tolist() == [b"test", b"train", b"train", b"train"]
    assert (table.labels, table.sample_rate, table.attributes) == (["a", "b", "c"], 100, {"source": "test"})
    assert table.task == table.select(np.array([0])).task == "multilabel"
    assert read_events(path)[2] == [Event(2, 0.25, 0.5)]
    with h5py.File(path) as file:
        assert file["real_len"][:].tolist() == [50, 110, 170, 200]
        for row, clip in enumerate(clips):
            kept = min(len(clip.waveform), 200)
            assert np.array_equal(file["waveform"][row, :kept], clip.waveform[:kept])
            assert not file["waveform"][row, kept:].any()


def test_nothing_is_left_half_written(tmp_path: Path) -> None:
    path = tmp_path / "store.h5"
    with pytest.raises(RuntimeError, match="interrupted"):
        with ClipStoreWriter(path, clip_samples=10, sample_rate=100, labels=["a"]) as writer:
            writer.add(Clip("x", np.ones(5, np.int16), [0]))
            raise RuntimeError("interrupted")
    assert list(tmp_path.iterdir()) == []


def test_bad_clips_are_refused(tmp_path: Path) -> None:
    with ClipStoreWriter(tmp_path / "s.h5", clip_samples=10, sample_rate=100, labels=["a"]) as writer:
        with pytest.raises(UserError, match="no samples"):
            writer.add(Clip("x", np.ones(0, np.int16), [0]))
        with pytest.raises(UserError, match="the classes are 0 to 0"):
            writer.add(Clip("x", np.ones(5, np.int16), [1]))


def test_fingerprint_changes_with_the_clips(tmp_path: Path) -> None:
    write(tmp_path / "store.h5")
    table = read_store_table(tmp_path / "store.h5")
    assert table.fingerprint() == read_store_table(tmp_path / "store.h5").fingerprint()
    assert table.fingerprint() != table.select(np.array([0, 1, 2])).fingerprint()


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file"):
        open_store(tmp_path / "missing.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        open_store(tmp_path / "text.h5")
    write(tmp_path / "store.h5")
    whole = (tmp_path / "store.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut off"):
        read_store_table(tmp_path / "cut.h5")
    with pytest.raises(UserError, match="lacks hdf5_path"):
        read_index_table(tmp_path / "store.h5", tmp_path)


def test_panns_files_and_index_are_valid(tmp_path: Path) -> None:
    """A part and an index as PANNs' scripts write them, after the folder has moved."""
    part = tmp_path / "hdf5s" / "waveforms" / "part.h5"
    index = tmp_path / "hdf5s" / "indexes" / "full_train.h5"
    for path in (part, index):
        path.parent.mkdir(parents=True)
    targets = np.eye(3, dtype=bool)
    names = np.array([b"Yone.wav", b"Ytwo.wav", b"Ythree.wav"])
    with h5py.File(part, "w") as file:
        file["audio_name"], file["target"] = names, targets
        file["waveform"] = np.arange(30, dtype=np.int16).reshape(3, 10)
    with h5py.File(index, "w") as file:
        file["audio_name"], file["target"] = names[::-1], targets[::-1]
        file["hdf5_path"] = np.array([b"/elsewhere/audioset/hdf5s/waveforms/part.h5"] * 3)
        file["index_in_hdf5"] = np.array([2, 1, 0], dtype=np.int32)
    assert read_store_table(part).names.tolist() == names.tolist()
    table = read_index_table(index, tmp_path)
    assert table.paths == [part]
    assert table.row.tolist() == [2, 1, 0]
    assert read_events(part) == [[], [], []]


def test_a_store_made_before_task_was_an_attribute() -> None:
    """old_store.h5 was written by revision 6762aca: 4 clips of 0.1 s at 8 kHz, two folds, all labellings."""
    table = read_store_table(OLD_STORE)
    assert table.names.tolist() == [b"a.wav", b"b.wav", b"c.wav", b"d.wav"]
    assert (table.labels, table.sample_rate, table.task) == (["low", "high"], 8000, None)
    assert table.attributes == {"dataset_type": "folder", "source": "tones", "licence": "CC0 1.0"}
    assert table.targets.tolist() == [[True, False], [True, True], [False, True], [False, False]]
    assert (labelling(table).tolist(), table.fold.tolist()) == ([STRONG, STRONG, WEAK, UNLABELLED], [1, 1, 2, 2])
    assert read_events(OLD_STORE) == [[Event(0, 0.01, 0.05)], [Event(0, 0.0, 0.1), Event(1, 0.02, 0.09)], [], []]
    with open_store(OLD_STORE) as file:
        sound = Waveforms(file)
        assert [len(sound.read(row)) for row in range(4)] == [800] * 4
        assert [np.abs(np.fft.rfft(sound.read(row))).argmax() * 10 for row in range(4)] == [500, 1000, 1500, 2000]


def put(key: str, value: object, row: int = 0) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        file[key][row] = value

    return damage


def replaced(key: str, values: object) -> Callable[[h5py.File], None]:
    """values: an array, a link, or a function that makes the data set."""

    def damage(file: h5py.File) -> None:
        del file[key]
        if callable(values):
            values(file, key)
        else:
            file[key] = values

    return damage


def attribute(key: str, value: object) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(key, value)


def virtual(file: h5py.File, key: str) -> None:
    layout = h5py.VirtualLayout((4, 200), "int16")
    layout[:] = h5py.VirtualSource("other.h5", "waveform", (4, 200))
    file.create_virtual_dataset(key, layout)


def flac_in_stereo(file: h5py.File) -> None:
    del file["waveform"]
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros((50, 2), np.int16), 100, format="FLAC")
    rows = file.create_dataset("waveform_flac", (4,), dtype=h5py.vlen_dtype(np.uint8))
    for row in range(4):
        rows[row] = np.frombuffer(sound.getvalue(), np.uint8)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (replaced("waveform", h5py.SoftLink("/waveform")), "waveform is a link"),
        (replaced("waveform", h5py.ExternalLink("other.h5", "/waveform")), "waveform is a link"),
        (replaced("waveform", virtual), "waveform lies in other files"),
        (replaced("real_len", lambda f, k: f.create_dataset(k, (4,), "i4", external=[("o", 0, 16)])), "real_len lies"),
        (replaced("waveform", lambda f, k: f.create_group(k)), "waveform is no data set"),
        (replaced("audio_name", lambda f, k: f.create_group(k)), "audio_name is no data set"),
        (replaced("waveform", np.zeros((4, 200), np.float32)), "waveform is float32"),
        (replaced("waveform", np.zeros((4, 200), np.int32)), "waveform is int32"),
        (replaced("waveform", lambda f, k: f.create_dataset(k, (4, 2**36), "i2", chunks=(1, 256))), "row of waveform"),
        (
            replaced("audio_name", lambda f, k: f.create_dataset(k, (2**40,), "S9", chunks=(9,))),
            "audio_name has 1099511627776 rows",
        ),
        (replaced("fold", lambda f, k: f.create_dataset(k, (4,), "i1", chunks=(1,))), "fold declares"),
        (replaced("target", np.eye(3, dtype=bool)), "target has 3 rows"),
        (replaced("target", np.full((4, 3), np.nan)), "target"),
        (replaced("audio_name", np.array([b"a", b"b", b"c", b"\xff"])), "audio_name"),
        (put("real_len", -5), "real_len of row 0 is -5"),
        (put("real_len", 2**31 - 1), "real_len of row 0"),
        (put("labelling", 9), "labelling"),
        (put("split", b"dev"), "split .* 'dev'"),
        (put("fold", -1), "fold"),
        (attribute("labels", ["a"]), "labels names 1 classes"),
        (attribute("labels", ["a", "a", "b"]), "labels"),
        (attribute("labels", ["a", " ", "b"]), "labels"),
        (attribute("labels", [1, 2, 3]), "texts"),
        (attribute("sample_rate", [8000, 8000]), "sample_rate"),
        (attribute("sample_rate", 8000.5), "sample_rate is 8000.5"),
        (attribute("task", "both"), "task is 'both'"),
        (put("event_clip", 4), "1 of 4 events"),
        (put("event_class", -1), "1 of 4 events"),
        (put("event_onset", np.nan), "1 of 4 events are not in order"),
        (put("event_offset", 0.1), "1 of 4 events are not in order"),
        (replaced("event_onset", np.zeros(3)), "event_onset has 3 rows"),
        (lambda file: file.pop("event_onset"), "event_onset"),
    ],
)
def test_a_store_that_is_wrong_inside_is_refused(
    tmp_path: Path, damage: Callable[[h5py.File], object], named: str
) -> None:
    write(tmp_path / "store.h5")
    with h5py.File(tmp_path / "store.h5", "r+") as file:
        damage(file)
    with pytest.raises(UserError, match=named):
        read_store_table(tmp_path / "store.h5")


def test_rows_of_flac_are_what_the_store_says(tmp_path: Path) -> None:
    write(tmp_path / "store.h5")
    with h5py.File(tmp_path / "store.h5", "r+") as file:
        flac_in_stereo(file)
    with open_store(tmp_path / "store.h5") as file:
        with pytest.raises(UserError, match="Row 0 holds 2 channels of 50"):
            Waveforms(file).read(0)


def test_a_damaged_head_is_a_users_error(tmp_path: Path) -> None:
    write(tmp_path / "store.h5")
    whole, rng = (tmp_path / "store.h5").read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(6):
            damaged[rng.integers(3000)] = rng.integers(256)
        (tmp_path / "store.h5").write_bytes(damaged)
        with suppress(UserError):
            read_store_table(tmp_path / "store.h5")


def test_more_classes_than_int16_counts() -> None:
    with pytest.raises(ValueError, match="32768"):
        class_index(np.zeros((1, 32768), dtype=bool))
