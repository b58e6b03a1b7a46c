"""What training on event times gains on the demo's soundscapes: clip labels, frames, finer steps, a taught student.

    python benchmarks/frame_training.py [--workspace FOLDER] [--systems A,B] [--seeds 1,2,3] [--threads N]

Each system is trained with each seed by the demo's recipe (make demo), calibrated for collar F1 on the validation
split, and tested; all by the commands that a user has. The last checkpoint counts, so that all have as many steps. A
student is taught by three networks of another system (TEACHERS). The systems named few_ know the events of a quarter of
the training clips, and of the others nothing. What is there already is not run again: an interrupted benchmark goes on.
It takes about four minutes a run on a free core.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np
from rich.console import Console
from rich.table import Table

from data.clip_store import UNLABELLED

ROOT = Path(__file__).resolve().parents[1]
RECIPE = (
    "--htsat_dim 32 --htsat_depth 1,1,2,1 --htsat_num_head 2,4,8,16 --batch_size 16 --max_epoch 16 "
    "--lr_scheduler_epoch 10,13,16 --lr_rate 0.02,0.1,0.2 --spec_augment False --save_top_k 1"
)
SYSTEMS = {
    "clips": "--loss_type clip_bce",
    "frames": "--loss_type frame_bce",
    "frames_156ms": "--loss_type frame_bce --htsat_readout_stage 3",
    "frames_78ms": "--loss_type frame_bce --htsat_readout_stage 2",
    "frames_stride2": "--loss_type frame_bce --htsat_time_stride 2",
    "frames_gru": "--loss_type frame_bce --htsat_readout_stage 3 --sequence_head gru --sequence_dim 128",
    "student": "--loss_type frame_bce",
    "few_frames": "--loss_type frame_bce --dataset_path {few}",
    "few_student": "--loss_type frame_bce --dataset_path {few}",
}
TEACHERS = {"student": "frames_78ms", "few_student": "few_frames"}  # student: the system whose seeds 1 to 3 teach it
METRICS = ("collar F1", "PSDS1", "psds1_macro", "PSDS2", "segment F1", "clip mAP")


class Bench:
    """The runs below a workspace, by the commands of the repository."""

    def __init__(self, workspace: Path, threads: int) -> None:
        self.workspace, self.environment = workspace, {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.few = workspace / "data" / "few"

    def prepare(self) -> None:
        """The demo's soundscapes, and the same with the labels of three quarters of the training clips taken away."""
        demo = self.workspace / "data" / "demo" / "demo.h5"
        if not demo.is_file():
            self.run("main.py", "prepare")
        if not self.few.is_dir():
            partial = self.few.with_name("few.partial")
            partial.mkdir(exist_ok=True)
            shutil.copy(demo, partial / "demo.h5")
            hide_labels(partial / "demo.h5", known=0.25)
            partial.rename(self.few)

    def run(self, script: str, *words: str) -> None:
        """Raises RuntimeError, with what it printed, where a command fails."""
        command = [sys.executable, str(ROOT / script), *words, "--workspace", str(self.workspace)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

    def last(self, system: str, seed: int) -> Path:
        return self.workspace / "runs" / f"{system}_s{seed}" / "checkpoints" / "last.ckpt"

    def detection(self, system: str, seed: int) -> Path:
        return self.workspace / "runs" / f"{system}_s{seed}" / "scores" / "test_detection.json"

    def measure(self, system: str, seed: int) -> dict[str, float]:
        """The metrics of one run, which is made where it is not there."""
        if not self.detection(system, seed).is_file():
            print(f"{system}, seed {seed} ...", flush=True)
            name, checkpoint = f"{system}_s{seed}", str(self.last(system, seed))
            flags = SYSTEMS[system].format(few=self.few).split()
            if system in TEACHERS:
                flags += ["--teacher_path", str(self.teach(TEACHERS[system]))]
            self.run("main.py", "train", *RECIPE.split(), *flags, "--exp_name", name, "--random_seed", str(seed),
                     "--resume", "auto")  # fmt: skip
            self.run("main.py", "calibrate", "--resume_checkpoint", checkpoint, "--calibrate_for", "collar_f1")
            self.run("main.py", "test", "--resume_checkpoint", checkpoint, "--fl_local", "True")
            self.run("fl_evaluate.py", "--exp_name", name)
        content = json.loads(self.detection(system, seed).read_text())
        return {metric["name"]: metric["macro"] for metric in content["metrics"]}

    def teach(self, system: str) -> Path:
        """The file with the frame logits of three networks together on all training clips."""
        path = self.workspace / "teachers" / f"{system}.h5"
        if not path.is_file():
            for seed in (1, 2, 3):
                self.measure(system, seed)
            members = ",".join(str(self.last(system, seed)) for seed in (1, 2, 3))
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
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which, of " + ", ".join(SYSTEMS), metavar="LIST")
    parser.add_argument("--seeds", default="1,2,3", metavar="LIST")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each command [all cores]")
    arguments = parser.parse_args()
    bench = Bench(arguments.workspace.resolve(), arguments.threads)
    bench.prepare()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    systems = arguments.systems.split(",")
    print_table({system: [bench.measure(system, seed) for seed in seeds] for system in systems}, seeds)


if __name__ == "__main__":
    main()
