"""What training does to clips and targets, and AudioSet's ontology."""

import json
from pathlib import Path

import pytest
import torch

from data.labels import read_ontology
from settings import UserError
from training import augment


def test_a_replaced_stretch_brings_its_targets() -> None:
    """Clips of constant value k and class k: each sample says whose it is, and so must each step."""
    torch.manual_seed(0)
    clips, steps, samples = 6, 32, 3200
    waveform = torch.arange(6.0)[:, None].repeat(1, samples)
    mixed, targets = augment.replace_stretch(waveform, torch.eye(clips), steps, (0.2, 0.6))
    assert targets.shape == (clips, steps, clips)
    assert torch.equal(targets.sum(dim=2), torch.ones(clips, steps))
    for clip in range(clips):
        foreign = mixed[clip] == clips - 1 - clip
        assert 0.19 <= foreign.float().mean() <= 0.61
        assert foreign.int().diff().abs().sum() <= 2  # one stretch
        middle = mixed[clip][torch.arange(steps) * 100 + 50]
        assert torch.equal(targets[clip].argmax(dim=1), middle.long())


@pytest.fixture
def ontology_file(tmp_path: Path) -> Path:
    """Sounds (no class) > Speech 0 > Male speech 1, Female speech 2; Speech > abstract (no class) > Child speech 3."""
    below = {
        "/m/sounds": ["/m/09x0r"],
        "/m/09x0r": ["/m/05zppz", "/m/02zsn", "/m/abstract"],
        "/m/abstract": ["/m/0ytgt"],
        "/m/05zppz": [],
        "/m/02zsn": [],
        "/m/0ytgt": [],
    }
    path = tmp_path / "ontology.json"
    path.write_text(json.dumps([{"id": mid, "name": mid, "child_ids": children} for mid, children in below.items()]))
    return path


def test_ontology(ontology_file: Path) -> None:
    ontology = read_ontology(ontology_file)
    assert ontology.ancestors.shape == (527, 527)
    assert ontology.ancestors[[1, 2, 3], 0].all()
    assert ontology.ancestors.sum() == 3
    assert ontology.children[0] == [1, 2, 3]
    assert not ontology.children[1]


def test_labels_are_enhanced_in_half_of_the_clips(ontology_file: Path) -> None:
    ontology = read_ontology(ontology_file)
    torch.manual_seed(0)
    targets = torch.zeros(2000, 527)
    targets[:1000, 1] = 1  # male speech: its ancestor is speech
    targets[1000:, 0] = 1  # speech: one of its three children
    enhanced = augment.enhance_labels(targets, torch.from_numpy(ontology.ancestors), ontology.children)
    assert (enhanced >= targets).all()
    assert enhanced[:1000, 0].mean().item() == pytest.approx(0.5, abs=0.06)
    added = enhanced[1000:, 1:4].sum(dim=1)
    assert set(added.tolist()) == {0.0, 1.0}
    assert added.mean().item() == pytest.approx(0.5, abs=0.06)
    assert enhanced[:, 4:].sum() == 0


def test_what_is_no_ontology_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="class_map_path"):
        read_ontology(tmp_path / "missing.json")
    (tmp_path / "other.json").write_text("{}[")
    with pytest.raises(UserError, match=r"other\.json"):
        read_ontology(tmp_path / "other.json")
