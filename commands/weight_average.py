"""python main.py weight_average: the mean of several checkpoints' weights, as one checkpoint."""

import os
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import PREFIX, read_checkpoint
from settings import resolve


def run(given: dict[str, Any]) -> None:
    """Average the checkpoints epoch_*.ckpt of wa_folder (or all .ckpt files there) into wa_model_path."""
    settings = resolve(given)
    folder = Path(settings.wa_folder or settings.run_folder / "checkpoints")
    paths = sorted(folder.glob("epoch_*.ckpt")) or sorted(folder.glob("*.ckpt"))
    if not paths:
        raise ValueError(f"There are no .ckpt files in {folder}: --wa_folder names the folder of the checkpoints.")
    target = Path(settings.wa_model_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = average_checkpoints(paths)
    partial = target.with_name(target.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, target)
    print(f"{target}: the mean of {len(paths)} checkpoints\n" + "\n".join(f"  {path}" for path in paths))


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
