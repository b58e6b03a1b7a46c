"""Kill commands at random moments, run them again, and compare what they leave with what an unbroken run leaves.

python benchmarks/kill.py [--commands train,predict] [--times 40] [--seed 0]

Everything is generated: 16 sounds of half a second and a network of some thousand parameters. Each command runs in a
process that is forked from this one, which has imported all that is slow. Half of the kills (SIGKILL) come at a random
time, the others before a random one of the files that the command opens to write, renames or removes. Then the same
command runs again, in the same folder. It must end with status 0, and leave the same files with the same content as
an unbroken run: weights, stores and metrics bit for bit, scores of predict to 1e-5; logs and dates do not count.
Prints one row a command; exit status 1 where one differs.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import h5py
import numpy as np
import soundfile
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main as project

RATE, SAMPLES, CLIPS = 8000, 4000, 16
SIZES = [
    "--htsat_dim", "8", "--htsat_depth", "1,1", "--htsat_num_head", "1,2", "--htsat_spec_size", "64",
    "--mel_bins", "32", "--htsat_window_size", "2", "--clip_samples", "4000", "--window_size", "256", "--fmax", "4000",
]  # fmt: skip
MACHINE = ["--accelerator", "cpu"]
DATA = ["--dataset_type", "folder"]
RUN, BEST = "workspace/runs/run", "workspace/runs/run/checkpoints/best.ckpt"
USED = ["--resume_checkpoint", BEST, *MACHINE]
COMMANDS: dict[str, list[str]] = {
    "prepare": [*DATA, "--raw", "raw", "--table", "events.tsv", "--sample_rate", str(RATE)],
    "compress": DATA,
    "train": [
        *DATA, "--exp_name", "run", "--loss_type", "frame_bce", "--max_epoch", "3", "--batch_size", "4", *SIZES,
        *MACHINE, "--checkpoint_every_steps", "1", "--resume", "auto",
    ],
    "weight_average": [*DATA, "--wa_folder", RUN],
    "export": [*USED, "--formats", "safetensors,onnx"],
    "predict": [
        "raw", *USED, "--jsonl", "out/t.jsonl", "--csv", "out/t.csv", "--scores", "out/s.h5",
        "--embeddings", "out/e.npz", "--audacity", "out/labels",
    ],
    "teach": USED,
    "test": [*USED, "--fl_local", "True"],
    "calibrate": USED,
}  # fmt: skip
NEEDS = {name: ["prepare"] if name in ("compress", "train") else ["prepare", "train"] for name in COMMANDS}
NEEDS["prepare"] = []
# What differs from run to run: folder.json is what prepare said, the curves are those of the logs.
PASSING = ("logs", "curves.png", "provenance.json", "folder.json")
IN_A_LINE = ("date", "device")


def sounds(folder: Path) -> None:
    """16 recordings with an event each, and their table."""
    rng = np.random.default_rng(0)
    (folder / "raw").mkdir(parents=True)
    lines = ["filename\tonset\toffset\tevent_label\tsplit"]
    for number in range(CLIPS):
        t = np.arange(SAMPLES) / RATE
        begin, label = 0.05 + 0.01 * number, ("low", "high")[number % 2]
        inside = (t >= begin) & (t < begin + 0.2)
        wave = 0.01 * rng.standard_normal(SAMPLES) + 0.4 * inside * np.sin(2 * np.pi * (300, 1500)[number % 2] * t)
        soundfile.write(folder / "raw" / f"r{number}.wav", wave, RATE)
        split = ("train", "train", "validation", "validation", "test", "test", "train", "train")[number % 8]
        lines.append(f"r{number}.wav\t{begin:.3f}\t{begin + 0.2:.3f}\t{label}\t{split}")
    (folder / "events.tsv").write_text("\n".join(lines) + "\n")


def start(name: str, folder: Path, kill_at: Optional[int] = None, count_into: Optional[Path] = None) -> int:
    """Begin a command in a process of its own; returns its number. kill_at: the event that kills it."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        os.chdir(folder)
        log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        events, me, here = 0, os.getpid(), str(folder)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal events
            writes = event in ("os.rename", "os.remove")
            if event == "open" and isinstance(arguments[0], (str, bytes)) and isinstance(arguments[2], int):
                path = os.path.abspath(os.fsdecode(arguments[0]))
                writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)) and path.startswith(here)
            if writes and os.getpid() == me:
                events += 1
                if events == kill_at:
                    os.kill(me, signal.SIGKILL)

        sys.addaudithook(hook)
        sys.argv = ["main.py", name, *COMMANDS[name]]
        status = project.main(sys.argv[1:])
        if count_into is not None:
            count_into.write_text(str(events))
        sys.stdout.flush()
        os._exit(status)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def wait(process: int) -> int:
    """The exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(folder: Path) -> dict[str, Path]:
    """The files of a folder by their names, without those that differ from run to run."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p for p in files if not set(p.relative_to(folder).parts) & set(PASSING)}


def same(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Whether two values of a file are equal, numbers up to a tolerance."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], tolerance) for key in one)
    if isinstance(one, (torch.Tensor, np.ndarray)):
        one, other = np.asarray(one), np.asarray(other)
        if one.dtype.kind == "O":
            return one.shape == other.shape and all(map(np.array_equal, one, other))
        if one.dtype.kind in "fc":
            return one.shape == other.shape and bool(np.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True))
        return bool(np.array_equal(one, other))
    return bool(one == other)


def read_ckpt(path: Path) -> Any:
    content = torch.load(path, weights_only=True)
    kept = ("state_dict", "labels", "postprocessing", "complete_epochs", "global_step", "data")
    return {name: content[name] for name in kept if name in content}


def read_hdf5(path: Path) -> Any:
    with h5py.File(path) as file:
        return {
            **{key: file[key][:] for key in file},
            **{f"@{k}": np.asarray(v).tolist() for k, v in file.attrs.items()},
        }


def read_ledger(path: Path) -> Any:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {json.dumps({k: v for k, v in line.items() if k not in IN_A_LINE}, sort_keys=True): 1 for line in lines}


def read_text(path: Path) -> Any:
    """Words, and numbers apart."""
    text = path.read_text()
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    return {"words": re.sub(number, "#", text), "numbers": np.array([float(n) for n in re.findall(number, text)])}


READERS: dict[str, Callable[[Path], Any]] = {
    ".ckpt": read_ckpt, ".h5": read_hdf5, ".jsonl": read_text, ".csv": read_text,
    ".npz": lambda path: dict(np.load(path)),
}  # fmt: skip


def differences(found: Path, wanted: Path) -> list[str]:
    """Names of the files that are there in one folder alone, or differ."""
    ours, theirs = contents(found), contents(wanted)
    wrong = [f"{name} in one alone" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        read = READERS.get(Path(name).suffix, Path.read_bytes)
        read = read_ledger if name.endswith("results.jsonl") else read
        if not same(read(ours[name]), read(theirs[name]), 1e-5 if name.startswith("out/") else 0.0):
            wrong.append(f"{name} differs")
    return wrong


def try_command(name: str, work: Path, base: Path, times: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Kill a command, and run it again. Returns a row of the table, and what went wrong."""
    unbroken, counted = work / f"{name}_unbroken", work / f"{name}.count"
    shutil.copytree(base, unbroken, symlinks=True)
    began = time.monotonic()
    if wait(start(name, unbroken, count_into=counted)):
        return [name, "", "", "", ""], [f"the unbroken run failed: {work / unbroken.name}.log"]
    seconds, events = time.monotonic() - began, int(counted.read_text())
    killed, right, wrong = 0, 0, []
    for number in range(times):
        folder = work / f"{name}_{number}"
        shutil.copytree(base, folder, symlinks=True)
        by_time = number % 2 == 0
        moment = float(rng.uniform(0, seconds))
        event = int(rng.integers(1, events + 1))
        process = start(name, folder, kill_at=None if by_time else event)
        if by_time:
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
        killed += wait(process) == -signal.SIGKILL
        status = wait(start(name, folder))
        found = [f"exit status {status}"] if status else differences(folder, unbroken)
        if found:
            when = f"{moment:.2f} s" if by_time else f"event {event} of {events}"
            wrong.append(f"{name} killed at {when} (try {number}): {'; '.join(found)}")
        else:
            right += 1
            shutil.rmtree(folder)
    return [name, f"{seconds:.1f}", str(events), f"{killed} of {times}", f"{right} of {times}"], wrong


def run(names: list[str], times: int, seed: int, work: Path) -> int:
    torch.set_num_threads(1)
    for name in COMMANDS:
        __import__(f"commands.{name}")
    bases: dict[tuple[str, ...], Path] = {}

    def base_of(needs: list[str]) -> Path:
        """A folder in which the commands that a command needs have run."""
        key = tuple(needs)
        if key not in bases:
            bases[key] = work / f"base_{'_'.join(needs) or 'raw'}"
            if needs:
                shutil.copytree(base_of(needs[:-1]), bases[key])
                status = wait(start(needs[-1], bases[key]))
                assert status == 0, (work / f"{bases[key].name}.log").read_text()
            else:
                sounds(bases[key])
        return bases[key]

    table = Table(title=f"Killed and run again, seed {seed}", title_justify="left")
    for column in ("command", "seconds", "file events", "killed in time", "as an unbroken run"):
        table.add_column(column, justify="left" if column == "command" else "right")
    problems: list[str] = []
    for name in names:
        row, wrong = try_command(name, work, base_of(NEEDS[name]), times, np.random.default_rng(seed))
        table.add_row(*row)
        problems += wrong
        print(" ".join(row), flush=True)
    Console(width=100).print(table)
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", default=",".join(COMMANDS), help="which, separated by commas")
    parser.add_argument("--times", type=int, default=40, help="kills of each command [40]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FOLDER", help="work here, and keep what went wrong")
    arguments = parser.parse_args()
    names = arguments.commands.split(",")
    if wrong := [name for name in names if name not in COMMANDS]:
        parser.error(f"--commands {', '.join(wrong)}: give some of {', '.join(COMMANDS)}")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(arguments.keep or temporary).absolute()
        place.mkdir(parents=True, exist_ok=True)
        sys.exit(run(names, arguments.times, arguments.seed, place))
