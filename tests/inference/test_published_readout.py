"""The published read-out of frame_mn06 on 23 s, from the waveform to the events."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.postprocess import choose_postprocessing
from inference import Tagger
from tests.evaluation.test_published import FOLDER, load_golden

CLASSES, LAST = 60, 22.82  # of the golden events; seconds up to which the median of 9 sees no padding


@pytest.mark.slow
def test_events_are_the_golden_ones(tmp_path: Path) -> None:
    """Up to the end of the recording, near which the published code filters scores of the padding."""
    draw, golden = load_golden(FOLDER / "draw_frame.py"), np.load(FOLDER / "frame_mn06_23s.npz")
    shapes = json.loads((FOLDER / "state_dict_shapes_frame.json").read_text())["frame_mn06"]
    drawn = {key: torch.from_numpy(value) for key, value in draw.draw_parameters(shapes).items()}
    torch.save(drawn, tmp_path / "frame_mn06.pt")
    given = {"encoder": "frame_mn06", "dataset_type": "audioset-strong", "fl_postprocessing": "published_sed"}
    tagger = Tagger.from_checkpoint(tmp_path / "frame_mn06.pt", "cpu", given=given)
    waveform = load_golden(FOLDER / "golden.py").draw_waveforms(1, 23, 16000, 31)[0]
    tagged = tagger.tag(waveform, 16000)
    assert tagged.framewise.shape == (575, 447)
    expected = golden["raw_every_10th_of_every_16th_class"]
    np.testing.assert_allclose(tagged.framewise[::10, ::16].T, expected[:, :58], atol=1e-4)
    for threshold in (0.1, 0.2, 0.5):
        settings = tagger.settings.model_copy(update={"fl_threshold": [threshold]})
        found = tagged.events(choose_postprocessing(None, tagger.labels, settings))
        assert (found.offset > found.onset).all()
        numbers = found.event_label.map(tagger.labels.index)
        ours = np.stack([numbers, found.onset, found.offset], axis=1)
        theirs = golden[f"events_{threshold}_first_60_classes"].astype(np.float64)
        near = [each[(each[:, 0] < CLASSES) & (each[:, 2] < LAST)].round(2) for each in (ours, theirs)]
        assert len(near[1]) > 100
        np.testing.assert_array_equal(near[0], near[1])
