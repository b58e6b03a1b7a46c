"""python main.py teach: write a teacher's frame logits of the clips of a data set, for other networks to learn from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl
from torch import Tensor

from data.clip_store import SPLITS, UNREADABLE
from data.files import check_writable, sole_writer
from data.pseudo_labels import TeacherWriter
from data_generator import SEDDataModule, load_test_data
from evaluation.mapping import ClassMapping
from model import Network
from runs.members import Member, check_alike, fit_together, member_paths
from runs.records import device_name
from runs.test_plan import class_mapping
from sed_model import Batch, Ensemble_SEDWrapper, at_rate_of, mean_on_finest
from settings import Config, UserError, place_flags, requested, resolve
from training.trainer import build_trainer
from utils import int16_to_float32

Part = tuple[Config, SEDDataModule]  # a split: the settings that read it, and its clips
SUREST = 1e-4  # an ensemble's probabilities are kept so far from 0 and 1, where logits are infinite


def run(given: dict[str, Any], teach_split: str, output: Optional[str] = None) -> None:
    """Write the frame logits of --resume_checkpoint, or of the ensemble --esm_model_pathes A,B,..., into one file.

    teach_split: train, validation, test or all. output: the file, else <workspace>/teachers/<exp_name>.h5, named after
    the first checkpoint; one that is there already is replaced when the new one is whole. Raises UserError where there
    is no checkpoint, where the members of an ensemble do not fit together, and where the file cannot be written. A
    network of AudioSet's classes teaches data of others by fl_audioset_mapping.
    """
    members = read_members(given)
    settings = members[0].settings.model_copy(update={"devices": 1})
    path = Path(output or Path(settings.workspace) / "teachers" / f"{settings.exp_name}.h5")
    check_writable(f"--output {path}", path)
    parts = [open_part(split, settings, members) for split in chosen_splits(teach_split, settings)]
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    networks = [member.network() for member in members]
    steps = finest_steps(networks, members)
    labels, mapping = taught_classes(members[0], parts[0])
    print(f"Teaching with {len(networks)} network(s), {steps} steps a clip, on {device_name(settings)}")
    source = ", ".join(f"{member.checkpoint.path.name} sha256:{member.sha256}" for member in members)
    seconds = settings.clip_samples / settings.sample_rate
    teacher = TeacherWriter(path, labels=labels, steps=steps, clip_seconds=seconds, source=source)
    with sole_writer(path), teacher as writer:
        together = fit_together(networks, settings) if settings.esm_together is None else settings.esm_together
        module = Teacher(networks, settings, labels, writer, together=together or len(networks) == 1)
        module.mapping = None if mapping is None else mapping.apply
        for part, data in parts:
            build_trainer(part, steps_per_epoch=None).test(module, data, verbose=False)
    print(
        f"{path}: {writer.clips} clips ({teach_split}), {len(labels)} classes x {steps} steps of "
        f"{seconds / steps:.4g} s, {path.stat().st_size / 2**20:.1f} MiB\n"
        f"Learn from it: python main.py train --dataset_type {settings.dataset_type}{place_flags(settings)} "
        f"--loss_type frame_bce --teacher_path {path}"
    )
    if module.unread:
        print(f"{module.unread} clips could not be read and are left out: `python main.py check` names them.")


def read_members(given: dict[str, Any]) -> list[Member]:
    """The teachers. Raises UserError without a checkpoint, or where they could not be tested as one ensemble."""
    single, several = requested("resume_checkpoint", given), member_paths(requested("esm_model_pathes", given))
    if bool(single) == bool(several):
        raise UserError(
            f"teach needs a checkpoint, --resume_checkpoint PATH, or those of an ensemble, --esm_model_pathes "
            f"A.ckpt,B.ckpt,...{'; both are given' if single else ''}. After a training, "
            f"{resolve().run_folder / 'checkpoints' / 'best.ckpt'} is one."
        )
    members = [Member.read(path, given) for path in several or [single]]
    for member in members[1:]:
        check_alike(member, members[0])
    return members


def chosen_splits(teach_split: str, settings: Config) -> list[str]:
    """The splits to go through; for all, those of protocol paper are two: it validates on the test clips."""
    if teach_split != "all":
        return [teach_split]
    return [split for split in SPLITS if split != "validation" or settings.protocol == "held_out"]


def open_part(split: str, settings: Config, members: Sequence[Member]) -> Part:
    """The clips of a split, as a test reads them: each once, in order, and none in place of another.

    Raises UserError where the data is missing, or has other classes than a member.
    """
    part = settings.model_copy(update={"test_split": split})
    data = load_test_data(part)
    for member in members:
        member.check_labels(data.tables[part.test_split])
    return part, data


def taught_classes(member: Member, part: Part) -> tuple[list[str], Optional[ClassMapping]]:
    """The classes that are written: the network's own, or those of the data with the mapping that leads to them."""
    settings, data = part
    table = data.tables[settings.test_split]
    mapping = class_mapping(member.known_labels, settings, table)
    return (member.labels(table), None) if mapping is None else (list(mapping.labels), mapping)


def finest_steps(networks: Sequence[Network], members: Sequence[Member]) -> int:
    """Steps of the member with the most. Raises UserError for one without a time axis."""
    for network, member in zip(networks, members, strict=True):
        if network.frames == 0:
            raise UserError(
                f"{member.checkpoint.path} has encoder = {member.settings.encoder}, which has no time axis: it "
                f"cannot teach frames."
            )
    return max(network.frames for network in networks)


class Teacher(Ensemble_SEDWrapper):
    """Networks whose frame logits of each tested clip go into a file."""

    def __init__(
        self,
        networks: Sequence[Network],
        settings: Config,
        labels: Sequence[str],
        writer: TeacherWriter,
        *,
        together: bool,
    ) -> None:
        super().__init__(networks, settings, labels, together=together)
        self.writer, self.unread = writer, 0

    def frame_logits(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """(B, samples) -> (B, K, steps): logits whose sigmoids are the probabilities, of one network its own.

        Several's probabilities are averaged as esm_test does, on the time axis of the most frames.
        """
        network = self.networks[0]
        if len(self.networks) == 1 and not network.softmax:
            return network(at_rate_of(network, waveform, sample_rate)).frame_logits.float().transpose(1, 2)
        frames = [self.member_scores(network, waveform, sample_rate)[1].float() for network in self.networks]
        return mean_on_finest(frames).clamp(SUREST, 1 - SUREST).logit().transpose(1, 2)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        waveform = int16_to_float32(batch["waveform"])
        logits = self.frame_logits(waveform, self.sample_rate_of(batch)).cpu().numpy()
        if self.mapping is not None:  # it takes the largest of some scores, and so of their logits
            logits = self.mapping(logits.transpose(0, 2, 1)).transpose(0, 2, 1)
        read = (batch["index"] != UNREADABLE).cpu().numpy()
        self.unread += int((~read).sum())
        names = [name for name, was_read in zip(batch["audio_name"], read, strict=True) if was_read]
        self.writer.add(names, logits[read])

    def on_test_epoch_end(self) -> None:
        """Nothing is measured."""
