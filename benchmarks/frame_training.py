"""What training on event times gains: clip labels, frames, finer steps, taught students; and each encoder from scratch.

    python benchmarks/frame_training.py [--workspace FOLDER] [--systems A,B] [--seeds 1,2,3] [--threads N]
    python benchmarks/frame_training.py --systems esc10 --esc10 FOLDER [--seeds 1]    # every encoder, the same steps

Each system is trained with each seed on the demo's soundscapes, calibrated for collar F1 on the validation split, and
tested; all by the commands that a user has. The last checkpoint counts, so that all have as many steps. A student is
taught by networks of other systems. The systems named few_ know the events of a quarter of the training clips, and of
the others nothing. The systems named esc10_ hear soundscapes of ESC-10's recordings: folds 1 to 3 make the training and
validation clips, fold 4 the test clips. What is there already is not run again: an interrupted benchmark goes on.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np
from rich.console import Console
from rich.table import Table

from data.clip_store import UNLABELLED

ROOT = Path(__file__).resolve().parents[1]
STEPS = (
    "--loss_type frame_bce --batch_size 16 --max_epoch 16 --lr_scheduler_epoch 10,13,16 --lr_rate 0.02,0.1,0.2 "
    "--spec_augment False --save_top_k 1"
)
HTSAT = "--htsat_size tiny"
TRANSFORMER = "dim=192,depth=4,heads=3"
ENCODERS = {  # reduced sizes
    "htsat": HTSAT,
    "atst-f": f"--encoder atst-f --encoder_options {TRANSFORMER}",
    "beats": f"--encoder beats --encoder_options {TRANSFORMER}",
    "fpasst": f"--encoder fpasst --encoder_options {TRANSFORMER}",
    "m2d": "--encoder m2d --encoder_options dim=96,depth=4,heads=3",
    "asit": f"--encoder asit --encoder_options {TRANSFORMER}",
    "frame_mn06": "--encoder frame_mn06",
    "frame_mn10": "--encoder frame_mn10",
}


@dataclass(frozen=True)
class System:
    """One way to train. data: a key of Bench.prepare. teachers: system and seed of each.

    settled: tested with the statistics of BatchNorm measured anew; the published momentum is too slow for 300 steps.
    """

    flags: str
    data: str = "demo"
    teachers: tuple[tuple[str, int], ...] = ()
    settled: bool = False


SHORT = "--batch_size 8 --max_epoch 8 --lr_scheduler_epoch 5,7,8"  # as many steps, of half as many clips
FINE, FEW = [tuple((system, seed) for seed in (1, 2, 3)) for system in ("frames_78ms", "few_frames")]
SYSTEMS = {
    "clips": System(f"{HTSAT} --loss_type clip_bce"),
    "frames": System(HTSAT),
    "frames_156ms": System(f"{HTSAT} --htsat_readout_stage 3"),
    "frames_78ms": System(f"{HTSAT} --htsat_readout_stage 2"),
    "frames_stride2": System(f"{HTSAT} --htsat_time_stride 2"),
    "frames_gru": System(f"{HTSAT} --htsat_readout_stage 3 --sequence_head gru --sequence_dim 128"),
    "student": System(HTSAT, teachers=FINE),
    "few_frames": System(HTSAT, data="few"),
    "few_student": System(HTSAT, data="few", teachers=FEW),
    "atst-f": System(ENCODERS["atst-f"]),
    "mn06": System(f"{ENCODERS['frame_mn06']} {SHORT}", settled=True),
    "mn06_student": System(
        f"{ENCODERS['frame_mn06']} {SHORT}", teachers=(("frames_78ms", 1), ("atst-f", 1)), settled=True
    ),
    **{f"esc10_{name}": System(f"{flags} --learning_rate 1e-2", data="esc10") for name, flags in ENCODERS.items()},
}
GROUPS = {"esc10": [name for name in SYSTEMS if name.startswith("esc10_")]}
METRICS = ("collar F1", "PSDS1", "psds1_macro", "PSDS2", "segment F1", "clip mAP", "training s")


class Bench:
    """The runs below a workspace, by the commands of the repository."""

    def __init__(self, workspace: Path, threads: int, esc10: Optional[Path]) -> None:
        self.workspace, self.environment = workspace, {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.esc10 = esc10

    def prepare(self, data: str) -> list[str]:
        """Make the data where they are not there: the flags that name them.

        demo: its soundscapes; few: the same with the labels of three quarters of the training clips taken away; esc10:
        soundscapes of the recordings in --esc10.
        """
        folder = self.workspace / "data"
        if data == "esc10":
            if not (folder / "soundscapes" / "soundscapes.h5").is_file():
                bank = folder / "esc-50" / "esc-50.h5"
                if not bank.is_file():
                    self.run("main.py", "prepare", "--dataset_type", "esc-50", "--raw", str(self.esc10))
                self.run("main.py", "prepare", "--dataset_type", "soundscapes", "--raw", str(bank),
                         "--bank_folds", "1,2,3//4", "--clips", "200")  # fmt: skip
            return ["--dataset_type", "soundscapes"]
        demo = folder / "demo" / "demo.h5"
        if not demo.is_file():
            self.run("main.py", "prepare")
        if data == "demo":
            return []
        few = folder / "few"
        if not few.is_dir():
            partial = few.with_name("few.partial")
            partial.mkdir(exist_ok=True)
            shutil.copy(demo, partial / "demo.h5")
            hide_labels(partial / "demo.h5", known=0.25)
            partial.rename(few)
        return ["--dataset_path", str(few)]

    def run(self, script: str, *words: str) -> None:
        """Raises RuntimeError, with what it printed, where a command fails."""
        command = [sys.executable, str(ROOT / script), *words, "--workspace", str(self.workspace)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

    def last(self, system: str, seed: int) -> Path:
        return self.workspace / "runs" / f"{system}_s{seed}" / "checkpoints" / "last.ckpt"

    def measure(self, system: str, seed: int) -> dict[str, float]:
        """The metrics of one run, which is made where it is not there, and the seconds of its training."""
        scores = self.workspace / "runs" / f"{system}_s{seed}" / "scores"
        if not (scores / "test_detection.json").is_file():
            print(f"{system}, seed {seed} ...", flush=True)
            name, checkpoint, way = f"{system}_s{seed}", str(self.last(system, seed)), SYSTEMS[system]
            flags = [*STEPS.split(), *way.flags.split(), *self.prepare(way.data)]
            if way.teachers:
                flags += ["--teacher_path", str(self.teach(system))]
            start = time.monotonic()
            self.run("main.py", "train", *flags, "--exp_name", name, "--random_seed", str(seed), "--resume", "auto")
            seconds = time.monotonic() - start
            if way.settled:
                mean = str(self.last(system, seed).with_name("settled.ckpt"))
                anew = ("--wa_folder", checkpoint, "--wa_model_path", mean, "--wa_reestimate_bn", "True")
                self.run("main.py", "weight_average", *anew)
                checkpoint = mean
            self.run("main.py", "calibrate", "--resume_checkpoint", checkpoint, "--calibrate_for", "collar_f1")
            self.run("main.py", "test", "--resume_checkpoint", checkpoint, "--fl_local", "True")
            (scores / "seconds.json").write_text(json.dumps(seconds))
            self.run("fl_evaluate.py", "--exp_name", name)
        content = json.loads((scores / "test_detection.json").read_text())
        found = {metric["name"]: metric["macro"] for metric in content["metrics"]}
        return {**found, "training s": json.loads((scores / "seconds.json").read_text())}

    def teach(self, system: str) -> Path:
        """The file with the frame logits of a system's teachers together on all training clips."""
        path = self.workspace / "teachers" / f"{system}.h5"
        if not path.is_file():
            teachers = SYSTEMS[system].teachers
            for teacher, seed in teachers:
                self.measure(teacher, seed)
            members = ",".join(str(self.last(teacher, seed)) for teacher, seed in teachers)
            self.run("main.py", "teach", "--esm_model_pathes", members, "--output", str(path))
        return path


def hide_labels(store: Path, *, known: float) -> None:
    """Leave the labels of the first `known` share of the training clips; of the rest nothing is known any more."""
    with h5py.File(store, "r+") as file:
        train = np.flatnonzero(file["split"][:] == b"train")
        hidden = train[int(len(train) * known) :]
        for name, value in (("labelling", UNLABELLED), ("target", False)):
            column = file[name][:]
            column[hidden] = value
            file[name][:] = column
        kept = ~np.isin(file["event_clip"][:], hidden)
        for name in ("event_clip", "event_class", "event_onset", "event_offset"):
            column = file[name][:][kept]
            del file[name]
            file[name] = column


def print_table(found: dict[str, list[dict[str, float]]], seeds: list[int]) -> None:
    table = Table(title=f"Mean and deviation over the seeds {', '.join(map(str, seeds))}", title_justify="left")
    for column in ("system", *METRICS):
        table.add_column(column, justify="right" if column in METRICS else "left")
    for system, runs in found.items():
        cells = []
        for metric in METRICS:
            values = [run[metric] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        table.add_row(system, *cells)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=Path("workspace/benchmarks"), metavar="FOLDER")
    parser.add_argument(
        "--systems",
        default=",".join(name for name in SYSTEMS if name not in GROUPS["esc10"]),
        help="which, of " + ", ".join([*SYSTEMS, *GROUPS]),
        metavar="LIST",
    )
    parser.add_argument("--seeds", default="1,2,3", metavar="LIST")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each command [all cores]")
    parser.add_argument(
        "--esc10", type=Path, metavar="FOLDER", help="ESC-10 in ESC-50's layout, for the systems esc10_"
    )
    arguments = parser.parse_args()
    bench = Bench(arguments.workspace.resolve(), arguments.threads, arguments.esc10)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    systems = [system for name in arguments.systems.split(",") for system in GROUPS.get(name, [name])]
    if wrong := [name for name in systems if name not in SYSTEMS]:
        parser.error(f"--systems {', '.join(wrong)}: give some of {', '.join([*SYSTEMS, *GROUPS])}")
    print_table({system: [bench.measure(system, seed) for seed in seeds] for system in systems}, seeds)


if __name__ == "__main__":
    main()
