"""Damaged files of every kind: each is refused with one message, or read without a change that nobody notices.

    python benchmarks/fuzz.py [--seed 0] [--count 2000] [--kinds wav,flac,ogg,mp3,store,checkpoint,table,settings]

Small files are changed (bits turned, cut off, stretches inserted, removed, repeated or zeroed; for checkpoints also
entries, for settings their text) and read as the commands read them, in a process that may take 2 GiB more and 10 s a
file. Prints for each kind how many were refused (UserError), read, and read with a warning, and what must not be:
tracebacks, hangs, too much memory, crashes, and silent changes (a checkpoint whose scores differ without a word). A
finding is named by its number: `--kinds KIND --only NUMBER` repeats it. Exit status 1 where there is a finding.
"""

import argparse
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import soundfile
import torch

from commands import check
from data.audio import read_audio
from data.clip_store import Clip, ClipStoreWriter, Event
from data_generator import load_training_data
from evaluation.event_tables import read_events
from inference import Tagger
from model import build_model
from model.checkpoint import save_safetensors, write_checkpoint
from settings import UserError, all_settings, resolve, section

RATE = 8000
SECONDS, MEMORY = 10, 2 * 2**30  # that one file may take
NANO: dict[str, Any] = {
    "sample_rate": RATE, "clip_samples": 2000, "window_size": 256, "htsat_spec_size": 64, "mel_bins": 32,
    "htsat_dim": 8, "htsat_depth": [1, 1], "htsat_num_head": [1, 2], "classes_num": 3, "performance": "manual",
}  # fmt: skip
FINDINGS = ("traceback", "hang", "memory", "crash", "silent change")


@dataclass(frozen=True)
class Kind:
    """originals: makes files in a folder. read: what is compared with what the original gives, where `compared`.

    edit: changes a file otherwise than byte by byte, for a third of the numbers.
    """

    originals: Callable[[Path], list[Path]]
    read: Callable[[Path], Any]
    compared: bool = False
    edit: Optional[Callable[[Path, np.random.Generator], None]] = None


def noise(seconds: float = 0.25) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(round(seconds * RATE)).astype(np.float32)


# --- bytes ------------------------------------------------------------------------------------------------------------


def mutate(whole: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes; half of them in the first 200 bytes, where headers are."""
    content = bytearray(whole)
    for _ in range(int(rng.integers(1, 5))):
        if not content:
            break
        place = int(rng.integers(min(len(content), 200) if rng.random() < 0.5 else len(content)))
        length = int(rng.integers(1, 1 + min(64, len(content))))
        match int(rng.integers(7)):
            case 0:
                content[place] ^= 1 << int(rng.integers(8))
            case 1:
                content[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
            case 2:
                del content[place:]
            case 3:
                content[place:place] = rng.bytes(length)
            case 4:
                del content[place : place + length]
            case 5:
                content[place:place] = content[place : place + length]
            case _:
                content[place : place + length] = bytes(length)
    return bytes(content)


# --- kinds ------------------------------------------------------------------------------------------------------------


def sounds(ending: str, **options: Any) -> Kind:
    def originals(folder: Path) -> list[Path]:
        path = folder / f"a.{ending}"
        soundfile.write(path, noise(), RATE, **options)
        return [path]

    return Kind(originals, lambda path: len(read_audio(path, RATE)))


def checkpoints(folder: Path) -> list[Path]:
    """A run's, a safetensors file, and a state dict of others with NumPy's numbers, in protocol 4."""
    torch.manual_seed(0)
    settings = resolve(NANO)
    weights = build_model(settings).state_dict()
    about: dict[str, Any] = {"settings": settings.model_dump(), "labels": ["a", "b", "c"]}
    about["frontend"] = {name: getattr(settings, name) for name in section("front-end")}
    about["postprocessing"] = {"labels": ["a", "b", "c"], "thresholds": [0.5] * 3, "source": "calibrated"}
    own = {f"sed_model.{key}": value for key, value in weights.items()}
    write_checkpoint(folder / "a.ckpt", {"state_dict": own, "epoch": 1, "complete_epochs": 2, **about})
    save_safetensors(folder / "a.safetensors", weights, **about)
    foreign = {"state_dict": {f"module.{key}": value for key, value in weights.items()}, "best": np.float64(0.4)}
    torch.save(foreign, folder / "a.pt", pickle_protocol=4)
    return [folder / "a.ckpt", folder / "a.safetensors", folder / "a.pt"]


def scores(path: Path) -> list[float]:
    given = NANO if path.suffix == ".pt" else None
    tagger = Tagger.from_checkpoint(path, device="cpu", given=given)
    return [*tagger.tag(noise()).clipwise.tolist(), *tagger.postprocessing.thresholds]


JUNK: list[Any] = [
    None, -1, 0, 2**40, 1e30, float("nan"), "x", "", b"x", [], [1], {}, {"a": 1}, True, [[[]]] * 3, "a" * 10**5,
    torch.zeros(3), torch.tensor(float("nan")),
]  # fmt: skip


def edit_entries(path: Path, rng: np.random.Generator) -> None:
    """Put something else in place of an entry, of a value in one, or of a weight; other thresholds are no damage."""
    if path.suffix == ".safetensors":
        path.write_bytes(mutate(path.read_bytes(), rng))
        return
    content = torch.load(path, weights_only=True)
    entry = str(rng.choice(list(content)))
    inside = content[entry]
    junk = JUNK[int(rng.integers(len(JUNK)))]
    if entry == "state_dict":
        key = str(rng.choice(list(inside)))
        changes = [lambda v: v + 1, lambda v: v.double(), lambda v: v.flatten()[:1], lambda v: junk, lambda v: -v]
        inside[key] = changes[int(rng.integers(len(changes)))](inside[key])
    elif isinstance(inside, dict) and entry != "postprocessing" and rng.random() < 0.8:
        inside[str(rng.choice(list(inside)))] = junk
    elif isinstance(inside, list) and rng.random() < 0.5:
        inside.append(junk)
    else:
        content[entry] = junk
    torch.save(content, path)


def tables(folder: Path) -> list[Path]:
    rows = [("filename", "onset", "offset", "event_label"), *((f"{k}.wav", k / 4, k + 1, "dog") for k in range(6))]
    for ending, separator in (("tsv", "\t"), ("csv", ",")):
        (folder / f"a.{ending}").write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))
    return [folder / "a.tsv", folder / "a.csv"]


def stores(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    about: dict[str, Any] = {"dataset_type": "folder", "task": "multilabel"}
    with ClipStoreWriter(
        folder / "a.h5", clip_samples=2000, sample_rate=RATE, labels=["a", "b", "c"], **about
    ) as writer:
        for number in range(9):
            sound = rng.integers(-9000, 9000, 2000 - number, dtype=np.int16)
            label, split = number % 3, ("train", "validation", "test")[number // 3]
            writer.add(Clip(f"{number}.wav", sound, [label], split=split, events=[Event(label, 0.05, 0.2)]))
    return [folder / "a.h5"]


def read_store(path: Path) -> int:
    """`check`, and the clips of training where it finds no problem."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        shutil.copy(path, Path(folder) / "folder.h5")
        given = {**NANO, "dataset_type": "folder", "dataset_path": folder, "batch_size": 3, "loss_type": "frame_bce"}
        check.run(given, processes=1)
        data = load_training_data(resolve(given), ("train", "validation"))
        loaders = [data.train_dataloader(), *data.val_dataloader()]
        return sum(len(batch["waveform"]) for loader in loaders for batch in loader)


def flags(folder: Path) -> list[Path]:
    """A file a setting, with its value as text."""
    values = resolve(NANO).model_dump()
    paths = [folder / f"{name}.txt" for name in values]
    for path in paths:
        path.write_text(str(values[path.stem]))
    return paths


def read_flag(path: Path) -> Any:
    name = path.stem.partition("-")[0]
    settings = resolve({**NANO, name: path.read_text(errors="surrogateescape")})
    if all_settings()[name].section.startswith(("encoder", "front-end", "sizes", "network", "clips")):
        build_model(settings)
    return getattr(settings, name)


KINDS: dict[str, Kind] = {
    "wav": sounds("wav"),
    "flac": sounds("flac"),
    "ogg": sounds("ogg"),
    "mp3": sounds("mp3"),
    "checkpoint": Kind(checkpoints, scores, compared=True, edit=edit_entries),
    "store": Kind(stores, read_store),
    "table": Kind(tables, lambda path: len(read_events(path))),
    "settings": Kind(flags, read_flag),
}


# --- the process that reads -------------------------------------------------------------------------------------------


class HangError(BaseException):
    """A file took more than SECONDS."""


def _alarm(*_: Any) -> None:
    raise HangError


def outcome(kind: Kind, path: Path, original: Any) -> tuple[str, str]:
    """What reading a file came to, and the error."""
    signal.alarm(SECONDS)
    said = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stderr(said), redirect_stdout(io.StringIO()):
            warnings.simplefilter("always")
            found = kind.read(path)
    except (UserError, SystemExit) as error:  # check ends with a status
        return "refused", str(error)
    except HangError:
        return "hang", traceback.format_exc(limit=-3)
    except MemoryError:
        return "memory", traceback.format_exc(limit=-3)
    except BaseException as error:
        return "memory" if "allocate memory" in str(error) else "traceback", traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
    if caught or said.getvalue():
        return "warned", str(caught[0].message) if caught else said.getvalue()
    if kind.compared and found != original:
        return "silent change", f"{found} in place of {original}"
    return "read", ""


def read_all(name: str, seed: int, numbers: list[int], folder: Path, connection: Any) -> None:
    """Make and read the files of these numbers; sends (number, outcome, error) for each."""
    torch.set_num_threads(1)
    kind = KINDS[name]
    originals = kind.originals(folder)
    with redirect_stdout(io.StringIO()):
        expected = {path: kind.read(path) for path in originals}
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _alarm)
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        original = originals[number % len(originals)]
        path = original.with_stem(f"{original.stem}-{number}")
        path.write_bytes(original.read_bytes())
        if kind.edit is not None and number % 3 == 0:
            kind.edit(path, rng)
        else:
            path.write_bytes(mutate(path.read_bytes(), rng))
        connection.send((number, *outcome(kind, path, expected[original])))
        path.unlink()
    connection.close()


def run(name: str, seed: int, numbers: list[int]) -> Iterator[tuple[int, str, str]]:
    """The outcomes of these numbers. A process that ends or hangs is replaced, and its file is a finding."""
    left = list(numbers)
    context = multiprocessing.get_context("fork")
    while left:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=read_all, args=(name, seed, left, Path(folder), theirs))
            process.start()
            theirs.close()
            try:
                while left:
                    if not ours.poll(SECONDS + 20):
                        yield left.pop(0), "hang", "outside of Python"
                        break
                    found = ours.recv()
                    left.remove(found[0])
                    yield found
            except EOFError:
                if left:
                    yield left.pop(0), "crash", "the process ended"
            finally:
                process.kill()
                process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    findings, names = 0, options.kinds.split(",")
    if wrong := [name for name in names if name not in KINDS]:
        parser.error(f"--kinds {', '.join(wrong)}: give some of {', '.join(KINDS)}")
    for name in names:
        started, counts = time.monotonic(), Counter[str]()
        numbers = list(range(options.count)) if options.only is None else [options.only]
        for number, what, error in run(name, options.seed, numbers):
            counts[what] += 1
            if what in FINDINGS or options.only is not None:
                findings += what in FINDINGS
                print(f"{name} {number}: {what}\n{error}")
        shown = ", ".join(f"{count} {what}" for what, count in counts.most_common())
        print(f"{name}: {shown} in {time.monotonic() - started:.0f} s", flush=True)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
