"""python main.py weight_average: the mean of several checkpoints' weights, as one checkpoint."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from commands._card import write_card
from commands._evaluate import test_checkpoint
from data_generator import SEDDataModule
from model import build_model
from model.checkpoint import PREFIX, load_network, read_checkpoint
from model.htsat import HTSAT_Swin_Transformer
from settings import resolve
from utils import int16_to_float32

METRIC_IN_NAME = re.compile(r"-[A-Za-z]+_(\d\.\d+)$")  # as the checkpoints of a run are named: epoch_007-mAP_0.4312


def run(given: dict[str, Any]) -> None:
    """Average the checkpoints that wa_folder names into wa_model_path, and test the average where wa_test says so."""
    settings = resolve(given)
    paths = find_checkpoints(settings.wa_folder or str(settings.run_folder), settings.wa_top_k)
    content = average_checkpoints(paths)
    if settings.wa_reestimate_bn:
        content["state_dict"].update(estimate_statistics(paths[0], given))
    target = Path(settings.wa_model_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, target)
    print(f"{target}: the mean of {len(paths)} checkpoints\n" + "\n".join(f"  {path}" for path in paths))
    card = write_card(target.with_suffix(".md"), vars(read_checkpoint(target)), file=Path(target.name))
    print(f"Model card: {card}")
    if settings.wa_test:
        test_checkpoint(str(target), given)


def find_checkpoints(where: str, top_k: int = 0) -> list[Path]:
    """The checkpoints of a run's folder, of a folder, or those that a glob like runs/*/best.ckpt names.

    Of a run, those of single epochs count, not their second names best.ckpt and last.ckpt. top_k: only so many, those
    with the highest metric in their names; 0: all. Raises ValueError where there are none, or too few.
    """
    if glob.has_magic(where):
        found = sorted(Path(name) for name in glob.glob(where))
    else:
        folder = Path(where)
        folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
        found = sorted(folder.glob("epoch_*.ckpt")) or sorted([*folder.glob("*.ckpt"), *folder.glob("*.safetensors")])
    if not found:
        raise ValueError(
            f"There are no .ckpt files in {where}: --wa_folder names a run's folder, a folder of checkpoints or a glob."
        )
    if not top_k:
        return found
    metrics = {path: float(match[1]) for path in found if (match := METRIC_IN_NAME.search(path.stem))}
    if len(metrics) < top_k:
        raise ValueError(
            f"{where} has {len(metrics)} checkpoints with a metric in their name, wa_top_k = {top_k} asks for more: "
            f"lower wa_top_k, or train with a higher save_top_k."
        )
    return sorted(sorted(metrics, key=lambda path: metrics[path])[-top_k:])


def average_checkpoints(paths: list[Path]) -> dict[str, Any]:
    """Mean of float tensors (summed in float64); integer buffers are the first file's.

    Raises ValueError where the files differ in keys, shapes or labels.
    """
    first = read_checkpoint(paths[0])
    total = {key: value.double() if value.is_floating_point() else value for key, value in first.state_dict.items()}
    for path in paths[1:]:
        other = read_checkpoint(path)
        if {k: v.shape for k, v in other.state_dict.items()} != {k: v.shape for k, v in first.state_dict.items()}:
            raise ValueError(f"{path} and {paths[0]} hold different networks: they cannot be averaged.")
        if other.labels != first.labels:
            raise ValueError(f"{path} and {paths[0]} have different labels: they cannot be averaged.")
        for key, value in other.state_dict.items():
            if value.is_floating_point():
                total[key] += value.double()
    mean = {
        PREFIX + key: (value / len(paths)).to(first.state_dict[key].dtype) if value.is_floating_point() else value
        for key, value in total.items()
    }
    return {
        "state_dict": mean,
        "settings": first.settings,
        "labels": first.labels,
        "frontend": first.frontend,
        "sources": [path.name for path in paths],
    }


def estimate_statistics(path: Path, given: dict[str, Any]) -> dict[str, Tensor]:
    """The state of bn0 with mean and variance measured anew over the training clips of a checkpoint's data set.

    bn0 stands before all that is learned, so its statistics depend on the data alone. Keys as in a checkpoint.
    """
    checkpoint = read_checkpoint(path)
    settings = resolve(given, checkpoint=checkpoint.settings)
    data = SEDDataModule(settings, ("train",))
    network = build_model(settings)
    load_network(network, checkpoint)
    frontend = _Frontend(network)
    update_bn(_waveforms(data), frontend)
    statistics = {k: v for k, v in network.bn0.state_dict().items() if k.startswith("running_")}
    return {f"{PREFIX}bn0.{name}": value for name, value in statistics.items()}


def _waveforms(data: SEDDataModule) -> Iterator[Tensor]:
    for batch in data.train_dataloader():
        yield int16_to_float32(batch["waveform"])


class _Frontend(nn.Module):
    """What of a network has statistics, for torch's update_bn."""

    def __init__(self, network: HTSAT_Swin_Transformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, waveform: Tensor) -> Tensor:
        return self.network.forward_frontend(waveform)
