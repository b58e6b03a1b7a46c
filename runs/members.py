"""Checkpoints to test, each with its settings, and which of them may be tested together."""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from data.clip_store import ClipTable
from data.facts import store_task
from data.labels import published_labels
from data_generator import check_classes
from evaluation.postprocess import read_postprocessing
from model import Network
from model.checkpoint import Checkpoint
from model.opening import build_with_weights, read_with_settings
from runs.ledger import file_sha256
from runs.test_plan import class_mapping
from settings import Config, UserError, section
from training.devices import is_first_process, on_gpu
from training.performance import choose, settle, speed_up

METRIC_IN_NAME = re.compile(r"-[A-Za-z_]+_(\d\.\d+)$")  # as the checkpoints of a run are named: epoch_007-mAP_0.4312
EPOCH_IN_NAME = re.compile(r"epoch_(\d+)-")  # counted from 0


@dataclass(frozen=True)
class Member:
    """A checkpoint to test, with the settings of its network.

    sha256: of the file as it was when it was read. protocol: held_out, paper, or unknown, of a foreign file.
    """

    checkpoint: Checkpoint
    settings: Config
    sha256: str
    protocol: str

    @classmethod
    def read(cls, path: str, given: dict[str, Any]) -> "Member":
        """Raises UserError where the file cannot be used or does not fit what is given."""
        checkpoint, settings = read_with_settings(path, given, store_task)
        if checkpoint.postprocessing is not None:
            read_postprocessing(checkpoint.postprocessing, checkpoint.path)
        sha256 = file_sha256(checkpoint.path)
        settings, _ = settle(settings, training=False)
        settings = settings.model_copy(update={"heatmap_dir": score_folder(checkpoint, settings, given)})
        return cls(checkpoint, settings, sha256, known_protocol(checkpoint, settings, given))

    def network(self) -> Network:
        """The network with the checkpoint's weights; what was loaded is printed."""
        network, report = build_with_weights(self.checkpoint, self.settings)
        speed_up(network, choose(self.settings, training=False))
        if is_first_process():
            print(report)
        return network

    @property
    def known_labels(self) -> list[str]:
        """The classes: the checkpoint's own, or those of the published one where it carries none, or numbers."""
        return self.checkpoint.labels or published_labels(self.settings.dataset_type, self.settings.classes_num)

    def labels(self, table: ClipTable) -> list[str]:
        """The classes: known_labels, or the names of the data in place of numbers."""
        known = self.known_labels
        return table.labels or known if known[0] == "class 0" else known

    def check_labels(self, table: ClipTable) -> None:
        """Raise UserError where the checkpoint and the data have other classes, and no class mapping."""
        known = self.known_labels
        if class_mapping(known, self.settings, table) is not None:
            return
        check_classes(table, self.settings.classes_num)
        if table.labels and known != table.labels and known[0] != "class 0":
            different = next((pair for pair in zip(known, table.labels, strict=False) if pair[0] != pair[1]), None)
            raise UserError(
                f"{self.checkpoint.path} has other classes than {table.paths[0]}: the first difference is {different}. "
                f"Set --dataset_type or --dataset_path, or prepare the data with the checkpoint's order of labels."
            )

    def reported(self) -> Config:
        """The settings with the protocol as it is known, to be printed."""
        return self.settings.model_copy(update={"protocol": self.protocol})

    def named(self, name: str, given: dict[str, Any]) -> "Member":
        """With another default of test_file, so that tests of different kinds leave one another's files alone."""
        split = self.settings.test_split
        if "test_file" in given or self.settings.test_file != split:
            return self
        name += "" if split == "test" else f"_{split}"
        return replace(self, settings=self.settings.model_copy(update={"test_file": name}))


def known_protocol(checkpoint: Checkpoint, settings: Config, given: dict[str, Any]) -> str:
    """The protocol behind a checkpoint: its own, or the given one; else paper for a published HTS-AT, or unknown."""
    if "protocol" in given or "protocol" in (checkpoint.settings or {}):
        return str(settings.protocol)
    return "paper" if checkpoint.kind == "published HTS-AT" else "unknown"


def score_folder(checkpoint: Checkpoint, settings: Config, given: dict[str, Any]) -> str:
    """heatmap_dir; of a file that belongs to no run <workspace>/runs/<its name>/scores, unless a place is given.

    Otherwise it would be the folder of the run that exp_name happens to name.
    """
    belongs = "exp_name" in (checkpoint.settings or {})
    chosen = bool(given.keys() & {"heatmap_dir", "exp_name"})
    if belongs or chosen or Path(settings.heatmap_dir) != settings.run_folder / "scores":
        return str(settings.heatmap_dir)
    return str(Path(settings.workspace) / "runs" / checkpoint.path.stem / "scores")


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """`name a against b` for each setting that both have, and have differently."""
    both = [name for name in names if name in ours and name in theirs]
    return [f"{name} {ours[name]} against {theirs[name]}" for name in both if ours[name] != theirs[name]]


def check_alike(member: Member, first: Member) -> None:
    """Raise UserError where the scores of two checkpoints cannot be averaged, or where the mean could not be trusted.

    A member that was trained or chosen on clips that test the other would raise the ensemble's score.
    """
    ours, theirs = member.reported().model_dump(), first.reported().model_dump()
    shared = (*(name for name in section("data set", "split", "clips") if name != "clip_samples"), "classes_num")
    different = differing(ours, theirs, shared)
    seconds = [each["clip_samples"] / each["sample_rate"] for each in (ours, theirs)]
    if seconds[0] != seconds[1]:  # each member has the clip at its own rate
        different.append(f"clips of {seconds[0]:g} s against {seconds[1]:g} s (clip_samples)")
    if different:
        raise UserError(
            f"{member.checkpoint.path} and {first.checkpoint.path} have {', '.join(different)}: their scores cannot "
            f"be averaged, or one of them may know clips that the other is tested on. Give members that agree; of a "
            f"file that does not say what it was trained on, give it with --protocol, --esc_fold, ..."
        )
    known, other = first.known_labels, member.known_labels
    if known != other and "class 0" not in (known[0], other[0]):
        raise UserError(
            f"{member.checkpoint.path} and {first.checkpoint.path} have different labels: their scores cannot be "
            f"averaged."
        )


def fit_together(networks: Sequence[nn.Module], settings: Config) -> bool:
    """Whether the weights of all networks take at most half of a GPU's free memory; in main memory they are anyway."""
    if not on_gpu(settings):
        return True
    size = sum(t.numel() * t.element_size() for network in networks for t in network.state_dict().values())
    return size <= torch.cuda.mem_get_info()[0] / 2


def find_checkpoints(
    where: str, top_k: int = 0, *, target: Optional[Path] = None, epochs: Sequence[int] = ()
) -> list[Path]:
    """The checkpoints of a run's folder, of a folder, a single one, or those that a glob like runs/*/best.ckpt names.

    Where there are those of single epochs, their second names best.ckpt and last.ckpt do not count, and no file counts
    twice. target: a file that is left out, as an earlier average in its place. top_k: only so many, those with the
    highest metric in their names; 0: all. epochs: the first and the last that count, from 1; empty: all. Raises
    UserError where there are none, or too few.
    """
    if Path(where).is_file():
        found = [Path(where)]
    elif glob.has_magic(where) and not Path(where).exists():
        found = sorted(Path(name) for name in glob.glob(where))
    else:
        folder = Path(where)
        folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
        found = sorted(folder.glob("epoch_*.ckpt")) or sorted([*folder.glob("*.ckpt"), *folder.glob("*.safetensors")])
    with_epochs = {path.parent for path in found if path.name.startswith("epoch_")}
    found = [path for path in found if path.stem not in ("best", "last") or path.parent not in with_epochs]
    found = _without_doubles(found, target)
    if not found:
        raise UserError(
            f"There are no .ckpt files in {where}: --wa_folder, as --esm_model_pathes, takes a run's folder, a folder "
            f"of checkpoints, one of them or a glob."
        )
    if epochs:
        found = _of_epochs(found, where, epochs)
    if not top_k:
        return found
    metrics = {path: float(match[1]) for path in found if (match := METRIC_IN_NAME.search(path.stem))}
    if len(metrics) < top_k:
        raise UserError(
            f"{where} has {len(metrics)} checkpoints with a metric in their name, wa_top_k = {top_k} asks for more: "
            f"lower wa_top_k, or train with a higher save_top_k."
        )
    return sorted(sorted(metrics, key=lambda path: metrics[path])[-top_k:])


def _of_epochs(paths: Sequence[Path], where: str, epochs: Sequence[int]) -> list[Path]:
    """Those of a range of epochs, all of which must be there."""
    if len(epochs) != 2 or epochs[0] > epochs[1]:
        raise UserError(f"wa_epochs = {list(epochs)} is not allowed: give the first and the last epoch, as 6,25.")
    numbers = {int(match[1]) + 1: path for path in paths if (match := EPOCH_IN_NAME.match(path.name))}
    wanted = range(epochs[0], epochs[1] + 1)
    missing = [number for number in wanted if number not in numbers]
    if missing:
        raise UserError(
            f"{where} has no checkpoint of epoch {missing[0]}, which wa_epochs = {list(epochs)} asks for; it has "
            f"{', '.join(map(str, sorted(numbers))) or 'none with an epoch in its name'}. A training keeps all epochs "
            f"with save_top_k as high as max_epoch."
        )
    return [numbers[number] for number in wanted]


def _without_doubles(paths: Sequence[Path], target: Optional[Path]) -> list[Path]:
    """Each file once, by its first name, and without `target`."""
    seen = [target] if target is not None and target.is_file() else []
    kept = []
    for path in paths:
        if not any(path.samefile(other) for other in seen):
            seen.append(path)
            kept.append(path)
    return kept


def member_paths(given: Sequence[str]) -> list[str]:
    """Checkpoints to be scored together: files and known names as they are, of a folder or a glob all that it holds."""
    found: list[str] = []
    for path in given:
        several = Path(path).is_dir() or glob.has_magic(path)
        found += map(str, find_checkpoints(path)) if several else [path]
    return found
