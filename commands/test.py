"""python main.py test: evaluate a checkpoint on the test split."""

from typing import Any

from runs.testing import test_checkpoint
from settings import UserError, requested, resolve


def run(given: dict[str, Any]) -> None:
    """Print the metrics of --resume_checkpoint and write them, with the scores, into heatmap_dir."""
    path = requested("resume_checkpoint", given)
    if path is None:
        raise UserError(
            "test needs a checkpoint: --resume_checkpoint PATH, for example "
            f"{resolve().run_folder / 'checkpoints' / 'best.ckpt'} after a training."
        )
    test_checkpoint(path, given)
