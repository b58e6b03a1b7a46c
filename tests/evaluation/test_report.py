"""The HTML report: its numbers by hand, and its file: whole, escaped, playable, without a network."""

import base64
import hashlib
import io
import json
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
import torch

import fl_evaluate
from evaluation.clips import file_names, sound_of
from evaluation.event_tables import GroundTruth
from evaluation.plots import LOGIT_EDGE, ClipView, ScoreScale, clip_figure, place_on_logit, save_png
from evaluation.postprocess import PostProcessing
from evaluation.report import Evaluated, build_report, busiest_classes, confused_seconds, frames_of_class, worst_clips
from evaluation.scores import Scores, load_scores
from evaluation.systems import truth_of_scores
from model.frontend import LogMel, Spectrogram
from tests.evaluation.examples import events, score_store

RATE, STEP, SECONDS = 8000, 0.5, 4.0
LABELS = ["<b>cat</b>", 'dog "$x$"', "猫", "owl"]  # the owl is never true
WAVEFORMS = (3000 * np.random.default_rng(0).standard_normal((6, int(SECONDS * RATE)))).astype(np.int16)


def test_confusions_by_hand() -> None:
    """a is true from 0 to 2 s; a is detected from 1 to 3, b from 1.5 to 4 (true from 3.5 on), in the first clip."""
    true = events(("x", 0.0, 2.0, "a"), ("x", 3.5, 4.0, "b"))
    truth = GroundTruth.build(true, {"x": 4.0, "y": 4.0}, ["a", "b"])
    found = truth.index(events(("x", 1.0, 3.0, "a"), ("x", 1.5, 9.0, "b"), ("y", 0.0, 0.25, "a")))
    seconds, lengths = confused_seconds(found, truth.events, truth.durations, 2)
    assert lengths.tolist() == [2.0, 0.5, 1.5 + 4.0]
    assert seconds.tolist() == [[1.0, 0.5], [0.0, 0.5], [1.0 + 0.25, 1.5]]
    assert confused_seconds(truth.index(events()), truth.events, truth.durations, 2)[0].sum() == 0


def test_each_clip_has_a_picture_of_its_own() -> None:
    clips = ["one/same.wav", "two/same.wav", "b.wav", "x/B.flac", "a\x1b.wav", "é" * 300 + ".wav", "../../up.wav"]
    names = file_names([*clips, "x/c.wav", "x_c.wav", "x/c.wav"])
    assert names[:3] == ["one_same.wav", "two_same.wav", "b.wav"]
    assert len({name.casefold() for name in names}) == len(names)
    assert all(len(f"{name}.png.partial".encode()) < 255 and name.isprintable() for name in names)
    assert not any("/" in name for name in names)


def test_frames_belong_to_a_class_by_their_middle() -> None:
    """Frames of 0.5 s; the class is true from 0.25 to 1.2 s (middles 0.25 and 0.75), and the clip ends after 2 s."""
    truth = GroundTruth.build(events(("x", 0.25, 1.2, "a")), {"x": 2.0}, ["a", "b"])
    scores, post = np.arange(16.0).reshape(1, 8, 2), PostProcessing(("a", "b"))
    evaluated = Evaluated(truth, truth.index(events()), [], post, scores, STEP)
    positive, negative = frames_of_class(evaluated, 0)
    assert (positive.tolist(), negative.tolist()) == ([0.0, 2.0], [4.0, 6.0])
    assert [len(part) for part in frames_of_class(evaluated, 1)] == [0, 4]


def test_the_worst_clips_come_first() -> None:
    names = ["0", "1", "2", "3"]
    truth = GroundTruth.build(events(*((n, 1.0, 2.0, "a") for n in names)), dict.fromkeys(names, 4.0), ["a", "b"])
    false = [("2", 0.0, 1.0, "b"), ("2", 2.0, 3.0, "b"), ("3", 1.0, 2.0, "b")]
    found = truth.index(events(("0", 1.0, 2.0, "a"), ("3", 1.0, 2.0, "a"), *false))
    worst = worst_clips(found, truth, 10)
    counts = [(each.clip, each.found, each.missed, each.false) for each in worst]
    assert counts == [(2, 0, 1, 2), (1, 0, 1, 0), (3, 1, 0, 1)]
    assert worst_clips(found, truth, 1) == worst[:1]


def test_the_classes_that_are_shown_have_the_most_events() -> None:
    labels = [f"c{k:02}" for k in range(40)]
    true = [("x", 2.0 * n, 2.0 * n + 1, labels[k]) for k in range(5, 40) for n in range(1 + (k >= 12))]
    shown = busiest_classes(GroundTruth.build(events(*true), {"x": 9.0}, labels))
    assert len(shown) == 30
    assert set(range(12, 40)) <= set(shown)
    assert shown == sorted(shown)


def test_scores_have_a_place_on_their_scale() -> None:
    probabilities = np.array([0.0, 0.5, 1.0])
    scale = ScoreScale.of(probabilities)
    assert scale.logit
    assert scale.place(probabilities).tolist() == pytest.approx([scale.low, 0, scale.high])
    assert scale.high == pytest.approx(-np.log(LOGIT_EDGE), rel=1e-6)
    assert place_on_logit(np.array([0.9])) == pytest.approx(np.log(9))
    other = ScoreScale.of(np.array([-3.0, 7.0]))
    assert (other.logit, other.low, other.high, other.place(-3.0)) == (False, -3.0, 7.0, -3.0)


def test_the_spectrogram_is_that_of_the_front_end() -> None:
    """The numbers of HTS-AT's front-end at 32 kHz; a clip shorter than a window is padded."""
    waveform = np.random.default_rng(0).standard_normal(32000).astype(np.float32) / 10
    sound, mel = sound_of(waveform, 32000), LogMel(32000, 1024, 64, 50, 14000)
    expected = mel(Spectrogram(1024, 320)(torch.from_numpy(waveform)[None]))[0]
    np.testing.assert_allclose(sound.logmel, expected, atol=1e-3)
    np.testing.assert_allclose(sound.band_hz, mel.melW.argmax(dim=0) * 32000 / 1024)
    assert sound_of(waveform[:100], 16000).logmel.shape[1] == 64


SCORES = np.full((8, 4), 0.1)
SCORES[2:5, 1] = 0.9
VIEW = ClipView(SECONDS, LABELS, SCORES, STEP, (0.5,) * 4, truth=[(2, 1.0, 2.0)], found=[(1, 1.0, 2.5)])


@pytest.mark.parametrize(("known", "entries"), [(True, ["true"]), (False, [])])
def test_the_legend_has_truth_only_where_it_is_known(known: bool, entries: list[str]) -> None:
    (legend,) = clip_figure(replace(VIEW, truth=[], truth_known=known)).legends
    assert [text.get_text() for text in legend.get_texts()] == [*entries, "detected", "score", "threshold"]


def test_every_axis_of_a_clip_has_a_name(tmp_path: Path) -> None:
    figure = clip_figure(VIEW)
    true, found = figure.axes
    assert [axis.get_title(loc="left").split(":")[0] for axis in figure.axes] == ["猫", 'dog "$x$"']
    assert all("score" in axis.get_ylabel() for axis in figure.axes)
    assert (found.get_xlabel(), found.get_xlim()) == ("time (s)", (0, SECONDS))
    assert (len(true.patches), len(found.patches)) == (2, 2)  # one event and the scores in each
    save_png(clip_figure(replace(VIEW, labels=list("abcd"))), tmp_path / "new" / "clip.png")
    (picture,) = (tmp_path / "new").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_which_classes_of_a_clip_are_shown() -> None:
    assert VIEW.shown == [2, 1]
    assert replace(VIEW, truth=[], found=[]).shown == [1]  # the highest score
    many = replace(VIEW, scores=np.zeros((8, 20)), truth=[(k, 0, 1) for k in range(20)])
    assert many.shown == list(range(8))


# --- the file --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The tags and the text of a page, whose tags must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, tag: str, attribute: str = "src") -> list[str]:
        return [str(attributes.get(attribute, "")) for name, attributes in self.tags if name == tag]


def decoded(uri: str, kind: str) -> bytes:
    head, _, content = uri.partition(",")
    assert head == f"data:{kind};base64"
    return base64.b64decode(content, validate=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A score file of six clips with classes that HTML could misread, and the clips' store."""
    folder = tmp_path_factory.mktemp("report")
    names = [f'"{k}" & <i>.wav' for k in range(6)]
    with h5py.File(folder / "clips.h5", "w") as store:
        store.attrs["sample_rate"] = RATE
        store["audio_name"] = np.array([name.encode() for name in names])
        store["waveform"] = WAVEFORMS
        store["target"] = np.zeros((6, 4), bool)
    framewise = np.random.default_rng(1).uniform(0, 0.6, (6, 8, 4)).astype(np.float32)
    for clip in range(5):  # the last one is missed
        framewise[clip, 1:4, clip % 3] = 0.99999
    scores = score_store(
        framewise, [[(clip % 3, 0.5, 2.0)] for clip in range(6)], labels=LABELS, step=STEP, seconds=SECONDS,
        dataset_type="demo", split="test", sample_rate=2 * RATE, clip_store=str(folder / "clips.h5"),
    )  # fmt: skip
    replace(scores, names=names).save(folder / "test.h5")  # of a network with another sample rate than the store
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    few = ["--pictures", "0", "--resamples", "20", "--fl_threshold", "0.55", "--worst", "2"]
    assert fl_evaluate.main(["--heatmap_dir", str(folder), *few, "--report"]) == 0
    return (folder / "test_report.html").read_text()


def report(scores: Scores) -> str:
    """The report without metrics, with one clip."""
    post = PostProcessing(tuple(scores.labels), (0.55,))
    return build_report(scores, truth_of_scores(scores), post, scores.decode(post), [], title="t", about=[], worst=1)


def test_the_report_has_all_its_parts(page: str) -> None:
    read = Page(page)
    assert read.values("section", "id") == [
        "metrics", "classes", "tags", "curves", "histograms", "confusions", "clips", "system",
    ]  # fmt: skip
    for name in ("intersection F1", "collar F1", "PSDS1", "PSDS2", "clip mAP", "DTC = GTC = 0.7"):
        assert name in read.text
    assert len(read.values("img")) == 2 + len(LABELS) + 2  # PSD-ROC, histograms, worst clips
    assert all(read.values("img", "alt"))
    assert "viewport" in read.values("meta", "name")
    units = [
        ("score", "frames (%)"),
        ("per hour", "share of the events"),
        ("time (s)", "power (dB)", "(Hz, mel scale)"),
    ]
    for source in read.values("img"):
        text = " ".join(ET.fromstring(decoded(source, "image/svg+xml")).itertext())
        assert any(all(name in text for name in names) for names in units)
    sounds = read.values("audio")
    assert len(sounds) == 2
    for source in sounds:
        sound, rate = soundfile.read(io.BytesIO(decoded(source, "audio/flac")), dtype="int16")
        assert (len(sound), rate) == (SECONDS * RATE, RATE)
        assert np.abs(sound.astype(int) - WAVEFORMS).max(axis=1).min() <= 1  # it is that of a clip


def test_nothing_comes_from_outside(page: str) -> None:
    read = Page(page)
    refers = [v for _, attributes in read.tags for name in ("src", "href", "poster") if (v := attributes.get(name))]
    assert refers
    assert all(v.startswith(("data:", "#")) for v in refers)
    assert not [name for name, _ in read.tags if name in ("script", "link", "iframe", "object")]
    assert "://" not in page
    assert "url(" not in page
    policies = [a["content"] for _, a in read.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert [str(policy).partition(";")[0] for policy in policies] == ["default-src 'none'"]


def test_names_are_escaped(page: str) -> None:
    read = Page(page)
    assert not [name for name, _ in read.tags if name in ("b", "i")]
    for name in ("<b>cat</b>", '" & <i>.wav', "猫"):
        assert name in read.text


def test_values_are_those_of_the_metrics(folder: Path, page: str) -> None:
    table = [row.split("\t") for row in (folder / "test_detection.tsv").read_text().splitlines()]
    values = [row[4] for row in table if row[3] == "macro"]
    assert len(values) == 14
    text = Page(page).text
    assert all(f"{float(value):.3f}" in text for value in values)


@pytest.mark.slow
def test_the_same_scores_make_the_same_report(folder: Path) -> None:
    scores = load_scores(folder / "test.h5").select_classes(LABELS[:1])
    assert report(scores) == report(scores)


def test_without_the_sound_and_without_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = load_scores(folder / "test.h5").select_classes([LABELS[2]])
    page = Page(report(replace(scores, attributes={"clip_store": "gone.h5"})))
    assert "gone.h5" in capsys.readouterr().out
    assert not page.values("audio")
    assert "1 missed" in page.text
    perfect = np.zeros_like(scores.frame_scores())
    perfect[[2, 5], 1:4] = 1
    assert "no mistakes" in Page(report(replace(scores, framewise=perfect))).text


def test_pictures_and_checkpoints(folder: Path, tmp_path: Path) -> None:
    """A picture of a clip with events, and in the report the checkpoints of the test, as they are now."""
    shutil.copy(folder / "test.h5", tmp_path / "test.h5")
    (tmp_path / "here.ckpt").write_bytes(b"weights")
    checkpoints = [str(tmp_path / "here.ckpt"), "gone.ckpt"]
    (tmp_path / "test.json").write_text(json.dumps({"checkpoints": checkpoints, "protocol": "held_out"}))
    flags = ["--pictures", "1", "--resamples", "0", "--worst", "0", "--report", str(tmp_path / "r.html")]
    assert fl_evaluate.main(["--heatmap_dir", str(tmp_path), *flags, "--fl_class_num", LABELS[0]]) == 0
    (picture,) = (tmp_path / "test_pictures").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = Page((tmp_path / "r.html").read_text()).text
    for name in (hashlib.sha256(b"weights").hexdigest(), "gone.ckpt (no longer there)", "held_out"):
        assert name in text


def test_mistakes_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fl_evaluate.main(["--heatmap_dir", str(folder), "--worst", "-1"]) == 2
    assert "--worst" in capsys.readouterr().err
    replace(load_scores(folder / "test.h5"), framewise=None, events=None).save(tmp_path / "test.h5")
    assert fl_evaluate.main(["--heatmap_dir", str(tmp_path)]) == 2
    assert f"{tmp_path / 'test.h5'} has no frame scores" in capsys.readouterr().err


@pytest.mark.slow
def test_in_a_browser(folder: Path, page: str, tmp_path: Path) -> None:
    """Chromium draws the page from the disk."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    file = (folder / "test_report.html").as_uri()
    drawn = subprocess.run(
        [browser, *flags, "--virtual-time-budget=5000", "--dump-dom", file], capture_output=True, text=True, timeout=60
    )
    read = Page(drawn.stdout)
    assert "<b>cat</b>" in read.text
    assert len(read.values("img")) == len(Page(page).values("img"))
    assert "Refused to" not in drawn.stderr
