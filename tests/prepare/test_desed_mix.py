"""DESED's sets side by side: strong, weak and unlabelled training clips, validation and test in one store."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

import main
from data.clip_store import STRONG, UNLABELLED, WEAK, Clip, ClipTable, read_events, read_store_table
from prepare.desed import LABELS, prepare_desed
from prepare.folder import prepare_folder

RATE = 8000
HEADER = "filename\tonset\toffset\tevent_label\n"
SETS = {  # folder of the audio: (names, the table's path and lines)
    "train/synthetic/soundscapes": (
        "1.wav 2.wav",
        "train/synthetic/soundscapes.tsv",
        "1.wav\t0\t0.1\tDog\n2.wav\t\t\t\n",
    ),
    "train/real": ("real.wav", "train/real.tsv", "real.wav\t0.05\t0.2\tSpeech\nreal.wav\t0.1\t0.2\tCat\n"),
    "train/weak": ("w1.wav w2.wav", "train/weak.tsv", "w1.wav\tDog,Speech\nw2.wav\tCat\n"),
    "train/unlabelled": ("u1.wav deeper/u2.wav", None, ""),
    "validation/synthetic/soundscapes": ("1.wav", "validation/synthetic/soundscapes.tsv", "1.wav\t0\t0.2\tBlender\n"),
    "eval": ("e.wav", "eval.tsv", "e.wav\t0.1\t0.2\tDog\n"),
}


def write_sound(path: Path, level: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(RATE // 5, level), RATE)


@pytest.fixture
def desed(tmp_path: Path) -> Path:
    """audio/ and metadata/ as DESED has them; each clip holds a number of its own."""
    number = 0
    for folder, (names, table, lines) in SETS.items():
        for name in names.split():
            number += 1
            write_sound(tmp_path / "audio" / folder / name, number / 100)
        if table is not None:
            path = tmp_path / "metadata" / table
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(("filename\tevent_labels\n" if "weak" in table else HEADER) + lines)
    return tmp_path


def prepare(desed: Path, **sets: object) -> tuple[ClipTable, list[str]]:
    """The store of all sets of `desed` (others with `sets`), and its names."""
    tables = desed / "metadata"
    given = {
        "table": tables / "eval.tsv",
        "strong": [tables / "train/synthetic/soundscapes.tsv", tables / "train/real.tsv"],
        "weak": tables / "train/weak.tsv",
        "unlabelled": Path("train/unlabelled"),
        "validation": tables / "validation/synthetic/soundscapes.tsv",
    }
    prepare_desed(desed / "audio", desed / "desed.h5", RATE, **{**given, **sets})  # type: ignore[arg-type]
    table = read_store_table(desed / "desed.h5")
    return table, [name.decode() for name in table.names]


def test_sets_lie_side_by_side(desed: Path) -> None:
    """Two clips are named 1.wav: each set gets the one of its folders, and both get a name of their own."""
    table, names = prepare(desed)
    assert names == [
        "train/synthetic/soundscapes/1.wav", "2.wav", "real.wav", "validation/synthetic/soundscapes/1.wav", "e.wav",
        "w1.wav", "w2.wav", "deeper/u2.wav", "u1.wav",
    ]  # fmt: skip
    assert table.labelling is not None
    assert table.labelling.tolist() == [STRONG] * 5 + [WEAK] * 2 + [UNLABELLED] * 2
    assert table.split.tolist() == [b"train"] * 3 + [b"validation", b"test"] + [b"train"] * 4
    classes = [[LABELS[k] for k in np.flatnonzero(target)] for target in table.targets]
    assert classes == [
        ["Dog"], [], ["Speech", "Cat"], ["Blender"], ["Dog"], ["Speech", "Dog"], ["Cat"], [], [],
    ]  # fmt: skip
    events = [[(LABELS[e.label], e.onset, e.offset) for e in clip] for clip in read_events(desed / "desed.h5")]
    assert events == [
        [("Dog", 0, 0.1)], [], [("Speech", 0.05, 0.2), ("Cat", 0.1, 0.2)], [("Blender", 0, 0.2)], [("Dog", 0.1, 0.2)],
        [], [], [], [],
    ]  # fmt: skip
    with h5py.File(desed / "desed.h5") as file:
        assert np.round(file["waveform"][:, 0] / 327.67).tolist() == [1, 2, 3, 8, 9, 4, 5, 7, 6]


def test_a_clip_is_taken_once_as_it_is_known_best(desed: Path) -> None:
    """The unlabelled folder may hold the other sets; a weak table may name a strong clip."""
    weak = desed / "metadata" / "train" / "weak.tsv"
    weak.write_text("filename\tevent_labels\nw1.wav\tDog\nreal.wav\tSpeech\n")
    table, names = prepare(desed, unlabelled=desed / "audio" / "train")
    known = dict(zip([name.split("/")[-1] for name in names], table.labelling.tolist(), strict=True))  # type: ignore
    assert known == {
        "1.wav": STRONG, "2.wav": STRONG, "real.wav": STRONG, "e.wav": STRONG, "w1.wav": WEAK, "w2.wav": UNLABELLED,
        "u1.wav": UNLABELLED, "u2.wav": UNLABELLED,
    }  # fmt: skip
    assert len(names) == len(set(names)) == 9


def test_a_clip_is_in_one_split_only(desed: Path) -> None:
    table = desed / "metadata" / "eval.tsv"
    table.write_text(f"{HEADER}e.wav\t0.1\t0.2\tDog\nreal.wav\t\t\t\n")
    with pytest.raises(
        ValueError, match=r"real.wav is there twice: as .*real.tsv \(train\) and as .*eval.tsv \(test\)"
    ):
        prepare(desed)
    with pytest.raises(ValueError, match=r"1.wav is there twice: .* \(validation\).* \(train\)"):
        prepare(desed, table=None, unlabelled=desed / "audio")
    table.write_text(f"{HEADER}e.wav\t0.1\t0.2\tDog\neval/e.wav\t\t\t\n")
    with pytest.raises(ValueError, match=r"e.wav is there twice: as e.wav in .* and as eval/e.wav in"):
        prepare(desed)
    assert not list(desed.glob("desed.h5*"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("filename\tlabel\nw1.wav\tDog\n", "weak.tsv lacks the columns event_labels of a weak table; it has filename"),
        (
            "filename\tevent_labels\nw1.wav\tDog\nw2.wav\tDog,dog\n",
            "weak.tsv, line 3: 'dog' is none of DESED's classes",
        ),
        ("filename\tevent_labels\nw1.wav\t\n", "weak.tsv, line 2: '' is none of DESED's classes"),
        ("filename\tevent_labels\n\tDog\n", "weak.tsv, line 2: the filename is empty"),
    ],
)
def test_wrong_weak_tables(desed: Path, lines: str, message: str) -> None:
    (desed / "metadata" / "train" / "weak.tsv").write_text(lines)
    with pytest.raises(ValueError, match=message):
        prepare(desed)


def test_wrong_sets(desed: Path) -> None:
    with pytest.raises(ValueError, match="--unlabelled must be one, as it lies or below --raw"):
        prepare(desed, unlabelled=Path("nowhere"))
    (desed / "audio" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no audio files"):
        prepare(desed, unlabelled=Path("empty"))
    with pytest.raises(ValueError, match="DESED needs a table"):
        prepare(desed, table=None, strong=[], weak=None, validation=None)
    (desed / "metadata" / "train" / "real.tsv").write_text(f"{HEADER}real.wav\t0\t0.1\tdog\n")
    with pytest.raises(ValueError, match=r"real.tsv, line 2: 'dog' is none"):
        prepare(desed)


def test_command(desed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All sets by flags; the network's ten classes; what can be trained depends on what is known of training clips."""
    monkeypatch.chdir(desed)
    words = ["prepare", "--dataset_type", "desed", "--raw", "audio", "--sample_rate", str(RATE)]
    strong = ["--strong", "metadata/train/synthetic/soundscapes.tsv,metadata/train/real.tsv"]
    rest = ["--weak", "metadata/train/weak.tsv", "--unlabelled", "train/unlabelled", "--table", "metadata/eval.tsv"]
    train = "Train on the times: python main.py train --dataset_type desed --classes_num 10 --loss_type"
    assert main.main([*words, *strong]) == 0
    printed = capsys.readouterr().out
    assert "3 clips\n10 classes. Train: python main.py train --dataset_type desed --classes_num 10\n" in printed
    assert f"{train} frame_bce\n" in printed
    assert main.main([*words, *strong, *rest]) == 0
    assert f"10 classes.\n{train} weak_strong_bce\n" in capsys.readouterr().out  # unlabelled clips need that loss
    assert main.main([*words, *rest]) == 0
    assert f"10 classes. {train.replace(' on the times', '')} weak_strong_bce\n" in capsys.readouterr().out
    assert main.main([*words, "--table", "metadata/eval.tsv"]) == 0
    assert "Train on the times" not in capsys.readouterr().out  # test clips alone
    assert main.main(words) == 2
    assert "needs --table, the TSV of the events to test on, or --strong" in capsys.readouterr().err


def test_what_a_folder_knows_of_its_clips(tmp_path: Path) -> None:
    """A table of events makes strong clips, also those without an event; one of labels, weak ones."""
    assert Clip("a", np.zeros(1, np.int16), []).labelling is None
    for name in ("a.wav", "b.wav"):
        write_sound(tmp_path / "raw" / name, 0.1)
    for lines, expected in (
        (f"{HEADER}a.wav\t0\t0.1\tbell\nb.wav\t\t\t\n", STRONG),
        ("filename\tlabel\na.wav\tbell\nb.wav\tdrum\n", WEAK),
    ):
        (tmp_path / "table.tsv").write_text(lines)
        prepare_folder(tmp_path / "raw", tmp_path / "folder.h5", RATE, tmp_path / "table.tsv", seed=0)
        labelling = read_store_table(tmp_path / "folder.h5").labelling
        assert labelling is not None
        assert labelling.tolist() == [expected] * 2
