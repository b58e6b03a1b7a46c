"""python main.py normalize: mean and deviation of the log-mel spectrograms of one's own training clips."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.progress import track

from data.facts import NORMALIZATION, measured_as, store_facts, write_normalization
from data.files import check_writable
from data_generator import load_training_data
from model import build_model
from model.registry import ENCODERS, read_options
from runs.measure import device_of
from sed_model import build_wrapper
from settings import UserError, resolve
from training.performance import settle

NEEDED = ("mean", "deviation")  # options of encoders whose normalization is a choice
ONCE_EACH: dict[str, Any] = {"balanced_data": False, "epoch_clips": 0, "labelling_shares": [], "balanced_by": "clips"}


def run(given: dict[str, Any], augmented: bool = False) -> None:
    """Measure the training clips, each once, and write the figures beside the store, where train finds them.

    augmented: after the augmentation of the waveforms that the settings ask for. Frames that fill up short clips count,
    as the network is given them. Raises UserError for an encoder whose normalization is fixed.
    """
    settings = resolve(given, facts=store_facts)
    row = ENCODERS[settings.encoder]
    if not set(NEEDED) <= row.options.keys():
        others = [name for name, other in ENCODERS.items() if set(NEEDED) <= other.options.keys()]
        raise UserError(
            f"encoder = {settings.encoder} has a normalization of its own. normalize is for those with the "
            f"options mean and deviation: {', '.join(others)}."
        )
    check_writable(f"dataset_path = {settings.dataset_path}", Path(settings.dataset_path) / NORMALIZATION)
    settings, _ = settle(settings.model_copy(update=ONCE_EACH), training=False)
    frontend = str(read_options(settings.encoder, settings.encoder_options).get("frontend", settings.encoder))
    data = load_training_data(settings, ("train",))
    device = device_of(settings)
    wrapper = build_wrapper(build_model(settings), settings, data.tables["train"].labels).to(device).eval()
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    total = torch.zeros(3, dtype=torch.float64)  # cells, their sum and the sum of their squares
    with torch.inference_mode():
        for batch in track(data.train_dataloader(), description="Measuring"):
            batch = {name: part.to(device) if torch.is_tensor(part) else part for name, part in batch.items()}
            waveform = wrapper.sound(batch)
            if augmented:
                waveform = wrapper.augmented_sound(waveform, batch)[0]
            cells = wrapper.sed_model.log_mel(waveform).double()
            total += torch.stack([torch.tensor(cells.numel()), cells.sum().cpu(), cells.square().sum().cpu()])
    count, first, second = total.tolist()
    mean = first / count
    deviation = math.sqrt(max(second / count - mean**2, 0.0))
    if not deviation > 0:
        raise UserError(f"All training clips of {settings.dataset_path} are silent: there is nothing to normalize by.")
    how = measured_as(settings, frontend, data.tables["train"])
    path = write_normalization(settings.dataset_path, how, mean=mean, deviation=deviation, augmented=augmented)
    print(f"{frontend}: mean {mean:.7g}, deviation {deviation:.7g} of {len(data.tables['train'])} training clips.")
    print(f"Written: {path}. train takes them for these clips, unless encoder_options have mean and deviation.")
