"""python main.py weight_average: the mean of several checkpoints' weights, as one checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from data.files import check_writable, sole_writer
from data_generator import SEDDataModule, load_training_data
from evaluation.metrics import Metric
from model.checkpoint import Checkpoint, network_class, read_checkpoint, write_checkpoint
from model.foreign import PREFIX
from model.network import Network
from model.opening import open_network
from runs.card import recorded_data, write_card
from runs.ledger import file_sha256
from runs.members import Member, differing, find_checkpoints
from runs.test_plan import reported_split
from runs.testing import test_member
from sed_model import at_rate_of
from settings import TRAINED_SECTIONS, Config, UserError, resolve, section
from training.devices import is_first_process
from utils import int16_to_float32


def run(given: dict[str, Any]) -> None:
    """Average the checkpoints that wa_folder names into wa_model_path, and test the average with wa_test.

    Of several processes the first one averages; the others are started by its test, and only take part in that. The
    files of the test have the name of the average, unless test_file is given.
    """
    settings = resolve(given)
    target = average_path(settings)
    if is_first_process():
        check_writable(f"wa_model_path = {target}", target, target.with_suffix(".md"))
        with sole_writer(target, target.with_suffix(".md")):
            where, epochs = settings.wa_folder or str(settings.run_folder), settings.wa_epochs
            paths = find_checkpoints(where, settings.wa_top_k, target=target, epochs=epochs)
            write_average(paths, target, given, reestimate=settings.wa_reestimate_bn)
            card = write_average_card(target, paths)
    if settings.wa_test:
        member = Member.read(str(target), given).named(target.stem, given)
        metrics = test_member(member)
        if metrics and not (settings.debug or settings.test_shard):  # measured on all clips, in the first process
            card = write_average_card(target, paths, metrics, measured_on(member))
    if is_first_process():
        print(f"Model card: {card}")


def average_path(settings: Config) -> Path:
    """The file that an average goes into: wa_model_path, or where it is not set, one in the folder of the run."""
    chosen, name = Path(settings.wa_model_path), "weight_average.ckpt"
    folder = Path(settings.wa_folder or settings.run_folder)
    if chosen != settings.run_folder / name or not folder.is_dir():
        return chosen
    return (folder.parent if folder.name == "checkpoints" else folder) / name


def write_average(paths: Sequence[Path], target: Path, given: dict[str, Any], *, reestimate: bool) -> None:
    """Write the mean of checkpoints as a checkpoint. reestimate: with the statistics of BatchNorm measured anew.

    Raises UserError for a target that is no .ckpt, and where the files do not belong together.
    """
    if target.suffix == ".safetensors":
        raise UserError(
            f"wa_model_path = {target} is not allowed: an average is a .ckpt file, which keeps what it is the mean of. "
            f"`python main.py export` makes safetensors of it."
        )
    content = average_checkpoints(paths)
    if reestimate:
        content["state_dict"].update(estimate_statistics(paths[0], content["state_dict"], given))
    write_checkpoint(target, content)
    print(f"{target}: the mean of {len(paths)} checkpoints\n" + "\n".join(f"  {path}" for path in paths))


def write_average_card(target: Path, paths: Sequence[Path], metrics: Sequence[Metric] = (), measured: str = "") -> Path:
    """Write the model card of an average beside it, with the data that the runs of `paths` have recorded."""
    content = read_checkpoint(target)
    data = recorded_data(paths, content.settings)
    file = Path(target.name)
    return write_card(
        target.with_suffix(".md"), vars(content), file=file, metrics=metrics, measured=measured, data=data
    )


def measured_on(member: Member) -> str:
    """A sentence for the card: which clips the metrics come from."""
    settings = member.settings
    clips = f"Measured on the {reported_split(settings)} clips of {settings.dataset_type}"
    chosen = member.protocol == "paper" and reported_split(settings) == "test"
    return clips + (", on which the averaged checkpoints were chosen as well, as published." if chosen else ".")


def average_checkpoints(paths: Sequence[Path]) -> dict[str, Any]:
    """Mean of float tensors (summed in float64); integer buffers are the first file's.

    Returns the content of a checkpoint; its sources say of each file path and SHA-256. Raises UserError where the
    files differ in keys, shapes, labels, front-end or in what decides which clips may test them.
    """
    first = read_checkpoint(paths[0])
    sources = [f"{paths[0]} sha256:{file_sha256(paths[0])}"]
    total = {key: value.double() if value.is_floating_point() else value for key, value in first.state_dict.items()}
    data = first.data
    for path in paths[1:]:
        other = read_checkpoint(path)
        data = data if other.data == data else None
        sources.append(f"{path} sha256:{file_sha256(path)}")
        check_alike(other, first)
        for key, value in other.state_dict.items():
            if value.is_floating_point():
                total[key] += value.double()
    prefix = _prefix(first)
    mean = {
        prefix + key: (value / len(paths)).to(first.state_dict[key].dtype) if value.is_floating_point() else value
        for key, value in total.items()
    }
    return {
        "state_dict": mean,
        "settings": first.settings,
        "labels": first.labels,
        "frontend": first.frontend,
        "sources": sources,
        **({"data": data} if data else {}),
    }


def _prefix(checkpoint: Checkpoint) -> str:
    """Of the keys in a file: that of this project, but none where it would make a bare state dict a published one."""
    return PREFIX if checkpoint.settings is not None or checkpoint.kind == "published HTS-AT" else ""


def check_alike(other: Checkpoint, first: Checkpoint) -> None:
    """Raise UserError, with the names of what differs, where the weights of two checkpoints cannot be averaged.

    With another fold or protocol, one of them was trained or chosen on clips that test the other.
    """
    pair = f"{other.path} and {first.path}"
    ours, theirs = other.settings, first.settings
    if (ours is None) != (theirs is None):
        silent, known = (other, first) if ours is None else (first, other)
        raise UserError(
            f"{silent.path} does not record how it was trained, and {known.path} does: they cannot be averaged, since "
            f"one may have been trained on clips that test the other."
        )
    different = differing(ours or {}, theirs or {}, section(*TRAINED_SECTIONS))
    different += differing(other.frontend or {}, first.frontend or {}, section("front-end"))
    if different:
        raise UserError(f"{pair} have {', '.join(dict.fromkeys(different))}: they cannot be averaged.")
    if {k: v.shape for k, v in other.state_dict.items()} != {k: v.shape for k, v in first.state_dict.items()}:
        raise UserError(f"{pair} hold different networks: they cannot be averaged.")
    if other.labels != first.labels:
        raise UserError(f"{pair} have different labels: they cannot be averaged.")
    for key, value in other.state_dict.items():
        # As rounding leaves them, windows and filterbanks that are meant to be the same differ by less.
        if key.startswith(network_class(first.encoder).frontend) and not torch.allclose(
            value, first.state_dict[key], rtol=1e-3, atol=1e-5
        ):
            raise UserError(f"{pair} have different front-ends ({key}): they cannot be averaged.")


def estimate_statistics(path: Path, weights: Mapping[str, Tensor], given: dict[str, Any]) -> dict[str, Tensor]:
    """Mean and variance of each BatchNorm with averaged weights, measured over a checkpoint's training clips.

    Izmailov et al. 2018, arXiv 1803.05407, section 3.3. weights and what is returned have the keys of a checkpoint.
    Raises UserError for an encoder without BatchNorm.
    """
    opened = open_network(path, given)
    settings, network, prefix = opened.settings, opened.network, _prefix(opened.checkpoint)
    norms = {id(module) for module in network.modules() if isinstance(module, _BatchNorm)}
    if not norms:
        raise UserError(f"wa_reestimate_bn: encoder = {settings.encoder} has no BatchNorm. Leave it out.")
    own = network.state_dict()
    network.load_state_dict({key: weights.get(prefix + key, value) for key, value in own.items()})
    data = load_training_data(settings, ("train",))
    below_all = norms <= {id(module) for module in network.layers()[0]}
    update_bn(_waveforms(data, network), _Frontend(network) if below_all else network)
    statistics = {k: v for k, v in network.state_dict().items() if k.endswith(("running_mean", "running_var"))}
    return {prefix + key: value for key, value in statistics.items()}


def _waveforms(data: SEDDataModule, network: Network) -> Iterator[Tensor]:
    for batch in data.train_dataloader():
        rate = int(batch.get("sample_rate", network.sample_rate))
        yield at_rate_of(network, int16_to_float32(batch["waveform"]), rate)


class _Frontend(nn.Module):
    """What of a network has statistics, where only its front-end has some: for torch's update_bn."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, waveform: Tensor) -> Tensor:
        return self.network.features(waveform)
