"""Plan of a test: class mapping, post-processing, shares of a split, and attributes of the score file."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from data.clip_store import STRONG, UNLABELLED, ClipTable, labelling
from data.labels import AUDIOSET_CLASSES, audioset_mids
from data_generator import SEDDataModule
from evaluation.mapping import ClassMapping, load_mapping
from evaluation.postprocess import PostProcessing, read_postprocessing
from evaluation.scores import shard_path
from model.checkpoint import Checkpoint, tensor_bytes
from sed_model import Evaluation
from settings import Config, UserError, section
from training.devices import is_first_process


@dataclass(frozen=True)
class TestPlan:
    """What a test scores. name: of its files; share: (N,) clips of the split; attributes: of the score file."""

    name: str
    split_clips: int
    share: np.ndarray
    mapping: Optional[ClassMapping]
    attributes: dict[str, str | int | float]

    @property
    def complete(self) -> bool:
        return len(self.share) == self.split_clips


def class_mapping(known: Sequence[str], settings: Config, table: ClipTable) -> Optional[ClassMapping]:
    """From a network's classes `known` to those of the data, or None where they are not AudioSet's and the data's.

    Raises UserError where fl_audioset_mapping does not lead from one to the other.
    """
    if len(known) != AUDIOSET_CLASSES or not table.labels or len(table.labels) == len(known):
        return None
    return load_mapping(settings.fl_audioset_mapping, known, audioset_mids()).in_order(table.labels)


def plan_test(
    module: Evaluation,
    settings: Config,
    data: SEDDataModule,
    checkpoints: Sequence[Checkpoint],
    hashes: Sequence[str],
    known: Sequence[str],
) -> TestPlan:
    """Give `module` its class mapping, and `data` the share of the clips that test_shard names.

    hashes: SHA-256 of the checkpoints' files; known: their classes. Raises UserError where test_shard is none.
    """
    table = data.tables[settings.test_split] = annotated_clips(settings, data.tables[settings.test_split])
    mapping = class_mapping(known, settings, table)
    if mapping is not None:
        module.mapping, module.labels = mapping.apply, list(mapping.labels)
    number, count = _shard(settings.test_shard, len(table))
    share = np.arange(number - 1, len(table), count)
    name = settings.test_file if count == 1 else shard_path(Path(f"{settings.test_file}.h5"), number, count).stem
    attributes: dict[str, str | int | float] = {
        "dataset_type": settings.dataset_type,
        "split": reported_split(settings),
        "run_id": run_id(hashes, settings, table),
        "split_clips": len(table),
        "clip_store": str(table.paths[0]),
        **{name: getattr(settings, name) for name in section("front-end")},
    }
    attributes["weights"] = weights_id(checkpoints)
    post = stored_postprocessing(checkpoints, module.labels, mapping)
    if post is not None:
        attributes["postprocessing"] = json.dumps(post.as_dict())
    if count > 1:
        data.tables[settings.test_split] = table.select(share)
    return TestPlan(name, len(table), share, mapping, attributes)


def annotated_clips(settings: Config, table: ClipTable) -> ClipTable:
    """The clips of a table with ground truth; the number of the others is printed.

    With fl_local, where some clips have event times, clips without times count as unannotated too: every event found in
    them would be a false alarm. Raises UserError where no clip is left.
    """
    kinds = labelling(table)
    times = settings.fl_local and bool((kinds == STRONG).any())
    known = kinds == STRONG if times else kinds != UNLABELLED
    what = "event times" if times else "labels"
    lacking = f"{(~known).sum()} of {len(table)} clips for {settings.test_split} have no {what}"
    if not known.any():
        raise UserError(f"{lacking} ({table.paths[0]}): a test needs ground truth.")
    if known.all():
        return table
    if is_first_process():
        print(f"{lacking}: they are left out.")
    return table.select(known)


def reported_split(settings: Config) -> str:
    """The split that a test scores; under the protocol `paper` the validation clips are the test clips."""
    shared = settings.protocol == "paper" and settings.test_split == "validation"
    return "test" if shared else settings.test_split


def _shard(test_shard: Sequence[int], clips: int) -> tuple[int, int]:
    """Which share of how many. Raises UserError for what is no share."""
    if not test_shard:
        return 1, 1
    if len(test_shard) != 2 or not 1 <= test_shard[0] <= test_shard[1] <= clips:
        raise UserError(
            f"test_shard = {list(test_shard)} is not allowed: give the number of a share and how many there are, as "
            f"2,4, at most one for each of the {clips} clips."
        )
    return test_shard[0], test_shard[1]


def run_id(hashes: Sequence[str], settings: Config, table: ClipTable) -> str:
    """16 hexadecimal digits that the jobs of one test share: of the checkpoints, the clips and the class mapping."""
    said = [*hashes, table.fingerprint(), settings.test_split]
    said += [settings.fl_audioset_mapping, str(settings.fl_local), str(settings.tta_shifts)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def weights_id(checkpoints: Sequence[Checkpoint]) -> str:
    """16 hexadecimal digits of the weights alone: what `calibrate` adds to a file leaves them as they are."""
    digest = hashlib.sha256()
    for checkpoint in checkpoints:
        for key, value in sorted(checkpoint.state_dict.items()):
            digest.update(key.encode())
            digest.update(tensor_bytes(value))
    return digest.hexdigest()[:16]


def stored_postprocessing(
    checkpoints: Sequence[Checkpoint], labels: Sequence[str], mapping: Optional[ClassMapping]
) -> Optional[PostProcessing]:
    """The calibrated post-processing of a checkpoint, else the thresholds of the mapping, else None.

    One that was calibrated for other classes does not count, and neither does that of one member of an ensemble.
    """
    calibrated = checkpoints[0].postprocessing if len(checkpoints) == 1 else None
    if calibrated is not None:
        post = read_postprocessing(calibrated, checkpoints[0].path)
        if set(labels) <= set(post.labels):
            return post.for_labels(labels)
    if mapping is None or mapping.thresholds is None:
        return None
    source = f"thresholds of the mapping {mapping.name}"
    return PostProcessing(mapping.labels, mapping.thresholds, source=source)
