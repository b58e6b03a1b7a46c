"""The checkpoint from which an interrupted run is resumed."""

from pathlib import Path
from typing import Optional

from model.checkpoint import Checkpoint, check_resumable, read_checkpoint
from settings import TRAINED_SECTIONS, Config, UserError, section
from training.callbacks import checkpoint_folder
from training.devices import is_first_process

# Sections of config.py that must not change when a run is resumed: its network, what of it learns, from which clips.
RUN_SECTIONS = (
    *TRAINED_SECTIONS, "training clips", "fine-tuning", "averaged weights", "frame training", "semi-supervised",
)  # fmt: skip


def find_resumed(settings: Config) -> Optional[Checkpoint]:
    """The checkpoint from which to resume, or None for a new run.

    Raises UserError where a new run would mix with an old one, and where the old one has another network.
    """
    folder = checkpoint_folder(settings)
    last = folder / "last.ckpt"
    if settings.resume is None:
        if is_first_process() and folder.is_dir() and any(folder.glob("*.ckpt")):
            raise UserError(
                f"{settings.run_folder} holds a run already: --resume auto resumes it, --exp_name NAME starts another."
            )
        return None
    if settings.resume == "auto" and not last.is_file():
        return None
    resumed = read_checkpoint(last if settings.resume == "auto" else Path(settings.resume))
    if resumed.settings is None or resumed.epoch is None or not resumed.resumable:
        raise UserError(f"{resumed.path} belongs to no run: to start from its weights use --resume_checkpoint.")
    now, then = settings.model_dump(), resumed.settings
    changed = [name for name in section(*RUN_SECTIONS) if name in then and then[name] != now[name]]
    if changed:
        was = ", ".join(f"{name} = {then[name]!r} (now {now[name]!r})" for name in changed)
        raise UserError(f"The run to resume has {was}: give the same settings, or another --exp_name.")
    check_resumable(resumed)
    return resumed
