"""The HTML report: its numbers by hand, and its file: whole, escaped, playable, without a network."""

import base64
import io
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

import fl_evaluate
from evaluation.event_tables import EventSet, GroundTruth
from evaluation.plots import LOGIT_EDGE, ClipView, ScoreScale, clip_figure, place_on_logit, save_png
from evaluation.postprocess import PostProcessing, truth_table
from evaluation.report import Evaluated, busiest_classes, confused_seconds, frames_of_class, worst_clips
from evaluation.scores import EventList, Scores

RATE = 8000
STEP = 0.5
SECONDS = 4.0
LABELS = ["<b>cat</b>", 'dog "$x$"', "猫", "owl"]  # the owl is never true
FRONTEND = {"sample_rate": RATE, "window_size": 512, "hop_size": 80, "mel_bins": 32, "fmin": 50.0, "fmax": 4000.0}


def event_set(*rows: tuple[int, int, float, float]) -> EventSet:
    columns = list(zip(*rows, strict=True)) if rows else [()] * 4
    clip, label, onset, offset = (np.array(column) for column in columns)
    return EventSet(clip.astype(int), label.astype(int), onset.astype(float), offset.astype(float))


def ground_truth(clips: int, *rows: tuple[int, int, float, float], labels: list[str]) -> GroundTruth:
    events: list[EventList] = [[row[1:] for row in rows if row[0] == clip] for clip in range(clips)]
    names = [f"{clip}.wav" for clip in range(clips)]
    return GroundTruth.build(truth_table(names, events, labels), dict.fromkeys(names, SECONDS), labels)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_confusions_by_hand() -> None:
    """a is true from 0 to 2 s; a is detected from 1 to 3, b from 1.5 to 4 (true from 3.5 on), in the first clip."""
    true = event_set((0, 0, 0.0, 2.0), (0, 1, 3.5, 4.0))
    found = event_set((0, 0, 1.0, 3.0), (0, 1, 1.5, 9.0), (1, 0, 0.0, 0.25))
    seconds, lengths = confused_seconds(found, true, np.array([4.0, 4.0]), 2)
    assert lengths.tolist() == [2.0, 0.5, 1.5 + 4.0]
    assert seconds.tolist() == [[1.0, 0.5], [0.0, 0.5], [1.0 + 0.25, 1.5]]


def test_confusions_of_nothing() -> None:
    seconds, lengths = confused_seconds(event_set(), event_set((0, 0, 1.0, 2.0)), np.array([4.0]), 2)
    assert (seconds.sum(), lengths.tolist()) == (0.0, [1.0, 0.0, 3.0])


def test_frames_belong_to_a_class_by_their_middle() -> None:
    """Frames of 0.5 s; the class is true from 0.25 to 1.2 s (middles 0.25 and 0.75), and the clip ends after 2 s."""
    truth = ground_truth(1, (0, 0, 0.25, 1.2), labels=["a", "b"])
    truth = GroundTruth(truth.names, np.array([2.0]), truth.labels, truth.table)
    scores = np.arange(16.0).reshape(1, 8, 2)
    post = PostProcessing(("a", "b"))
    evaluated = Evaluated(truth, event_set(), [], post, scores, STEP)
    positive, negative = frames_of_class(evaluated, 0)
    assert (positive.tolist(), negative.tolist()) == ([0.0, 2.0], [4.0, 6.0])
    assert [len(part) for part in frames_of_class(evaluated, 1)] == [0, 4]


def test_the_worst_clips_come_first() -> None:
    truth = ground_truth(4, *((clip, 0, 1.0, 2.0) for clip in range(4)), labels=["a", "b"])
    found = event_set((0, 0, 1.0, 2.0), (2, 1, 0.0, 1.0), (2, 1, 2.0, 3.0), (3, 0, 1.0, 2.0), (3, 1, 1.0, 2.0))
    worst = worst_clips(found, truth, 10)
    assert [(each.clip, each.found, each.missed, each.false) for each in worst] == [
        (2, 0, 1, 2),
        (1, 0, 1, 0),
        (3, 1, 0, 1),
    ]
    assert worst_clips(found, truth, 1) == worst[:1]


def test_the_classes_that_are_shown_have_the_most_events() -> None:
    labels = [f"c{k:02}" for k in range(40)]
    rows = [(0, label, float(n), n + 0.5) for label in range(5, 40) for n in range(1 + (label >= 12))]
    shown = busiest_classes(ground_truth(1, *rows, labels=labels))
    assert len(shown) == 30
    assert set(range(12, 40)) <= set(shown)
    assert shown == sorted(shown)


def test_scores_have_a_place_on_their_scale() -> None:
    probabilities = np.array([0.0, 0.5, 1.0])
    scale = ScoreScale.of(probabilities)
    assert scale.logit
    assert scale.place(0.5) == 0
    assert scale.place(probabilities).tolist() == pytest.approx([scale.low, 0, scale.high])
    assert scale.high == pytest.approx(-np.log(LOGIT_EDGE), rel=1e-6)
    assert place_on_logit(np.array([0.9])) == pytest.approx(np.log(9))
    other = ScoreScale.of(np.array([-3.0, 7.0]))
    assert (other.logit, other.low, other.high) == (False, -3.0, 7.0)
    assert other.place(-3.0) == -3.0


# --- figures ---------------------------------------------------------------------------------------------------------


def view(**more: object) -> ClipView:
    scores = np.full((8, 4), 0.1)
    scores[2:5, 1] = 0.9
    given = {
        "duration": SECONDS, "labels": LABELS, "scores": scores, "seconds_per_frame": STEP, "thresholds": (0.5,) * 4,
        "truth": [(2, 1.0, 2.0)], "found": [(1, 1.0, 2.5)],
    }  # fmt: skip
    return ClipView(**{**given, **more})  # type: ignore[arg-type]


def test_the_legend_promises_truth_only_where_it_is_known() -> None:
    for more, names in (({}, 1), ({"truth": []}, 1), ({"truth": [], "truth_known": False}, 0)):
        (legend,) = clip_figure(view(**more)).legends
        assert [text.get_text() for text in legend.get_texts()].count("true") == names


def test_every_axis_of_a_clip_has_a_name(tmp_path: Path) -> None:
    figure = clip_figure(view())
    true, found = figure.axes
    assert [axis.get_title(loc="left").split(":")[0] for axis in figure.axes] == ["猫", 'dog "$x$"']
    assert all("score" in axis.get_ylabel() for axis in figure.axes)
    assert found.get_xlabel() == "time (s)"
    assert found.get_xlim() == (0, SECONDS)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["true", "detected", "score", "threshold"]
    assert (len(true.patches), len(found.patches)) == (2, 2)  # one event and the scores in each
    save_png(clip_figure(view(labels=list("abcd"))), tmp_path / "new" / "clip.png")
    assert (tmp_path / "new" / "clip.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_which_classes_of_a_clip_are_shown() -> None:
    assert view().shown == [2, 1]
    assert view(truth=[], found=[]).shown == [1]  # the highest score
    many = view(labels=[str(k) for k in range(20)], scores=np.zeros((8, 20)), truth=[(k, 0, 1) for k in range(20)])
    assert many.shown == list(range(8))


# --- the file --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page says and refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def sources(self, tag: str) -> list[str]:
        return [str(attributes["src"]) for name, attributes in self.tags if name == tag]


def decoded(uri: str, kind: str) -> bytes:
    head, _, content = uri.partition(",")
    assert head == f"data:{kind};base64"
    return base64.b64decode(content, validate=True)


def waveforms(clips: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (3000 * rng.standard_normal((clips, int(SECONDS * RATE)))).astype(np.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A score file of six clips with classes that HTML could misread, and the clips' store."""
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(1)
    names = [f'"{k}" & <i>.wav' for k in range(6)]
    with h5py.File(folder / "clips.h5", "w") as store:
        store["audio_name"] = np.array([name.encode() for name in names])
        store["waveform"] = waveforms(6)
        store["target"] = np.zeros((6, 4), bool)
    events: list[EventList] = [[(clip % 3, 0.5, 2.0)] for clip in range(6)]
    framewise = rng.uniform(0, 0.6, (6, 8, 4)).astype(np.float32)
    for clip in range(5):  # the last one is missed
        framewise[clip, 1:4, clip % 3] = 0.99999
    scores = Scores(
        names=names, clipwise=framewise.max(axis=1), targets=np.eye(4, dtype=bool)[[0, 1, 2, 0, 1, 2]],
        durations=np.full(6, SECONDS), labels=LABELS, framewise=framewise, seconds_per_frame=STEP, events=events,
        attributes={"dataset_type": "demo", "split": "test", "clip_store": str(folder / "clips.h5"), **FRONTEND},
    )  # fmt: skip
    scores.save(folder / "test.h5")
    return folder


def write(folder: Path, *flags: str) -> str:
    few = ["--pictures", "0", "--resamples", "20", "--fl_threshold", "0.55"]
    assert fl_evaluate.main(["--heatmap_dir", str(folder), *few, *flags]) == 0
    return (folder / "test_report.html").read_text()


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return write(folder, "--report", "--worst", "2")


def test_the_report_has_all_its_parts(page: str) -> None:
    read = Page(page)
    assert read.open == []
    ids = [str(attributes["id"]) for name, attributes in read.tags if name == "section"]
    assert ids == ["metrics", "classes", "curves", "histograms", "confusions", "clips", "system"]
    for said in ("intersection F1", "collar F1", "PSDS1", "PSDS2", "clip mAP", "DTC = GTC = 0.7"):
        assert said in read.text
    assert len(read.sources("img")) == 2 + len(LABELS) + 2  # PSD-ROC, histograms, worst clips
    assert all(attributes.get("alt") for name, attributes in read.tags if name == "img")
    assert any(name == "meta" and attributes.get("name") == "viewport" for name, attributes in read.tags)


def test_pictures_are_whole_and_name_their_axes(page: str) -> None:
    for source in Page(page).sources("img"):
        text = " ".join(ET.fromstring(decoded(source, "image/svg+xml")).itertext())
        units = [
            ("score", "frames (%)"),
            ("per hour", "share of the events"),
            ("time (s)", "power (dB)", "(Hz, mel scale)"),
        ]
        assert any(all(name in text for name in names) for names in units)


def test_the_sound_is_that_of_the_clips(page: str) -> None:
    sounds = Page(page).sources("audio")
    assert len(sounds) == 2
    stored = waveforms(6)
    for source in sounds:
        sound, rate = soundfile.read(io.BytesIO(decoded(source, "audio/flac")), dtype="int16")
        assert (len(sound), rate) == (SECONDS * RATE, RATE)
        assert any(np.abs(sound.astype(int) - clip).max() <= 1 for clip in stored)


def test_nothing_comes_from_outside(page: str) -> None:
    read = Page(page)
    refers = [v for _, attributes in read.tags for name in ("src", "href", "poster") if (v := attributes.get(name))]
    assert refers
    assert all(v.startswith(("data:", "#")) for v in refers)
    assert not [name for name, _ in read.tags if name in ("script", "link", "iframe", "object")]
    assert "://" not in page
    assert "url(" not in page
    (policy,) = (a["content"] for _, a in read.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")


def test_names_are_escaped(page: str) -> None:
    read = Page(page)
    assert not [name for name, _ in read.tags if name in ("b", "i")]
    assert "<b>cat</b>" in read.text
    assert '" & <i>.wav' in read.text
    assert "猫" in read.text


def test_values_are_those_of_the_metrics(folder: Path, page: str) -> None:
    rows = (folder / "test_detection.tsv").read_text().splitlines()
    values = [row.split("\t")[4] for row in rows[1:] if row.split("\t")[3] == "macro"]
    text = Page(page).text
    assert len(values) == 11
    for value in values:
        assert f"{float(value):.3f}" in text


def test_the_same_scores_make_the_same_report(folder: Path, page: str) -> None:
    def without_date(text: str) -> str:
        return text.partition("<dt>date")[0]

    assert without_date(write(folder, "--report", "--worst", "2")) == without_date(page)


def test_without_the_sound_and_without_mistakes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "test.h5", tmp_path / "test.h5")
    with h5py.File(tmp_path / "test.h5", "r+") as file:
        file.attrs["clip_store"] = str(tmp_path / "gone.h5")
    text = write(tmp_path, "--report", "--worst", "1", "--fl_class_num", LABELS[2])
    assert "is not there" in capsys.readouterr().out
    assert not Page(text).sources("audio")
    assert "missed" in Page(text).text
    with h5py.File(tmp_path / "test.h5", "r+") as file:
        file["framewise"][:] = 0
        for clip in (2, 5):
            file["framewise"][clip, 1:4, 2] = 1
    assert "There are no mistakes." in Page(write(tmp_path, "--report", "--fl_class_num", LABELS[2])).text


def test_wrong_numbers_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fl_evaluate.main(["--heatmap_dir", str(folder), "--worst", "-1"]) == 2
    assert "0 or more" in capsys.readouterr().err


def test_in_a_browser(folder: Path, page: str, tmp_path: Path) -> None:
    """Chromium, where there is one, draws the page from the disk; elsewhere a parser sees that it is well-formed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        assert Page(page).open == []
        return
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    drawn = subprocess.run(
        [browser, *flags, "--virtual-time-budget=5000", "--dump-dom", (folder / "test_report.html").as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    read = Page(drawn.stdout)
    assert "<b>cat</b>" in read.text
    assert len(read.sources("img")) == len(Page(page).sources("img"))
    assert "Refused to" not in drawn.stderr
