"""Shared by predict, listen and serve: the Tagger of a checkpoint, and the post-processing for its events."""

import sys
from typing import TYPE_CHECKING, Any

from inference.tagger import Tagger
from model.registry import known_names
from settings import UserError, requested

if TYPE_CHECKING:
    from evaluation.postprocess import PostProcessing

DEVICES = {"auto": "auto", "cpu": "cpu", "gpu": "cuda"}  # the setting accelerator -> Tagger's device


def load_tagger(given: dict[str, Any], command: str) -> Tagger:
    """The Tagger of --resume_checkpoint, which is required, on --accelerator. Prints the load report."""
    path = requested("resume_checkpoint", given)
    if path is None:
        names = ", ".join(known_names())
        raise UserError(f"{command} needs a checkpoint: --resume_checkpoint PATH, or a known name ({names})")
    tagger = Tagger.from_checkpoint(path, DEVICES[requested("accelerator", given)], given=given)
    print(tagger.report or f"{path}: run by onnxruntime", file=sys.stderr)
    return tagger


def event_processing(tagger: Tagger) -> "PostProcessing":
    """Thresholds and filters for events: the settings fl_..., else the checkpoint's, else 0.5 alone, with a line."""
    from evaluation.postprocess import DEFAULT_SOURCE, DEFAULT_THRESHOLD, choose_postprocessing

    chosen = choose_postprocessing(tagger.postprocessing, tagger.labels, tagger.settings)
    if tagger.has_frames and chosen.source.startswith(DEFAULT_SOURCE) and not tagger.settings.fl_threshold:
        print(
            f"Events: not calibrated: threshold {DEFAULT_THRESHOLD}. `python main.py calibrate` chooses one a class on "
            f"clips with event times; --fl_threshold sets it.",
            file=sys.stderr,
        )
    return chosen
