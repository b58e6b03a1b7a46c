"""python main.py predict: the sounds in audio files."""

import sys
from typing import Any

from settings import requested


def run(given: dict[str, Any], files: list[str], top_k: int = 5) -> None:
    """Print the top_k classes of each file. A file that cannot be read is reported, and the others go on.

    Raises ValueError at the end where any file failed.
    """
    path = requested("resume_checkpoint", given)
    if path is None:
        raise ValueError("predict needs a checkpoint: --resume_checkpoint PATH")
    from inference import Tagger

    device = {"auto": "auto", "cpu": "cpu", "gpu": "cuda"}[requested("accelerator", given)]
    tagger = Tagger.from_checkpoint(path, device, given)
    print(tagger.report, file=sys.stderr)
    failed = 0
    for name in files:
        try:
            tagged = tagger.tag_file(name)
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed += 1
            continue
        print(f"{name} ({tagged.duration:.2f} s)")
        for label, score in tagged.top(top_k, tagger.labels):
            print(f"  {score:.3f}  {label}")
    if failed:
        raise ValueError(f"{failed} of {len(files)} files could not be read.")
