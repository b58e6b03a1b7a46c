"""python main.py compare: train and test several encoders on the same data, and compare accuracy and cost."""

import hashlib
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data.facts import store_facts
from data.files import check_writable, read_json, sole_writer, write_json, write_text
from evaluation.bootstrap import (
    FEWEST_RESAMPLES,
    RESAMPLES,
    Comparison,
    MeanStatistic,
    bootstrap,
    clip_statistic,
    paired_bootstrap,
)
from evaluation.metrics import MAIN_METRIC, Interval, clip_metrics
from evaluation.plots import Point, cost_figure, save_png
from evaluation.scores import Scores, load_scores
from model import build_model
from model.registry import ENCODERS, encoder_titles
from runs.experiments import experiment_hash, run_command
from runs.measure import Repeated, count_flops, one_device, synthetic_batch, time_inference, time_training
from runs.records import device_name
from settings import Config, UserError, all_settings, check_values, close_names, fewest, resolve, section, split_list
from training.callbacks import SECONDS, read_curves
from training.performance import settle

SET_HERE = ("encoder", "random_seed", "exp_name", "resume", "heatmap_dir", "test_file", "test_shard")
FOR_TESTS = ("workspace", "dataset_path", "results_path", "debug", "batch_size")  # what test takes of the flags, beside
INTERRUPTED = (130, 143)  # exit statuses after SIGINT and SIGTERM
COST = "cost.json"  # file in the folder of a run


@dataclass(frozen=True)
class Cost:
    """What a network takes on one device. multiply_adds: of a clip forwards; memory: bytes, the peak of training."""

    parameters: int
    multiply_adds: float
    training_clips_per_second: float
    inference_clips_per_second: float
    memory: int
    batch_size: int
    precision: str
    device: str
    steps: int


@dataclass(frozen=True)
class Run:
    """The training of an encoder with one seed. given: its flags, as text or values."""

    seed: int
    given: Mapping[str, Any]
    settings: Config

    @cached_property
    def name(self) -> str:
        s = self.settings
        return f"compare_{s.dataset_type}_{s.encoder}_seed{self.seed}_{experiment_hash(s)}"

    @property
    def folder(self) -> Path:
        return Path(self.settings.workspace) / "runs" / self.name

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best.ckpt"

    @property
    def scores(self) -> Path:
        """The score file of its test; beside it lie the metrics as JSON."""
        return self.folder / "scores" / f"{self.settings.test_split}.h5"

    def tested(self) -> bool:
        """Whether its best checkpoint has been tested, in the way that is asked for."""
        metrics = self.scores.with_suffix(".json")
        if not (metrics.is_file() and self.scores.is_file() and self.best.is_file()):
            return False
        newer = metrics.stat().st_mtime >= self.best.stat().st_mtime
        return newer and read_json(metrics, dict).get("tta_shifts") == self.settings.tta_shifts

    def seconds(self) -> float:
        """Of its training with validation, by its logs."""
        return sum(read_curves(self.folder / "logs").get(SECONDS, {}).values())


@dataclass
class System:
    """One encoder: its runs, one a seed, and what they led to. failed: what went wrong; empty: nothing."""

    encoder: str
    runs: list[Run]
    failed: str = ""
    values: list[float] = field(default_factory=list)  # the metric of each seed
    interval: Optional[Interval] = None  # of their mean
    to_first: Optional[Comparison] = None  # this system minus the first
    cost: Optional[Cost] = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> Optional[float]:
        """Sample standard deviation over the seeds; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def seconds(self) -> float:
        """Of a training, the mean over the seeds."""
        return statistics.fmean(run.seconds() for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        return {
            "encoder": self.encoder,
            "runs": {run.seed: str(run.folder) for run in self.runs},
            "failed": self.failed,
            "values": self.values,
            "mean": self.mean if self.values else None,
            "deviation": self.deviation,
            "interval": asdict(self.interval) if self.interval else None,
            "minus_first": asdict(self.to_first) if self.to_first else None,
            "training_seconds": self.seconds if self.values else None,
            "cost": asdict(self.cost) if self.cost else None,
        }


def run(
    given: dict[str, Any], *, encoders: str, seeds: str = "1,2,3", flags_of: Sequence[str] = (), steps: int = 10
) -> None:
    """Train and test each encoder with each seed, in processes of their own, and write table and figure.

    encoders: names of the registry, as htsat,ast. flags_of: settings of one encoder each, as words that begin with its
    name. steps: of each measurement of speed, 0: none. The same command resumes: what is tested already is not trained
    again. An encoder that fails does not stop the others. Raises UserError for what cannot be compared, at once, and at
    the end where an encoder failed.
    """
    systems = plan_systems(given, encoders, seeds, flags_of or ())
    if steps < 0:
        raise UserError(f"--steps {steps} is not allowed: give 1 or more, or 0 for no measurement.")
    settings = systems[0].runs[0].settings
    everything = hashlib.sha256(" ".join(run.name for system in systems for run in system.runs).encode()).hexdigest()
    name = f"comparison_{settings.dataset_type}_{everything[:8]}"
    paths = {end: Path(settings.workspace) / "runs" / f"{name}.{end}" for end in ("json", "md", "png")}
    check_writable(f"workspace = {settings.workspace}", *paths.values())
    with sole_writer(*paths.values()):
        print_plan(systems)
        for number in range(len(systems[0].runs)):  # a seed of all, then the next: all are there early
            for system in systems:
                if not system.failed:
                    system.failed = train_and_test(system.runs[number])
        whole = [system for system in systems if not system.failed]
        for system in whole:
            if steps:
                system.cost = measure(system.runs[0], steps)
        if whole:
            judge(whole, settings)
            write(whole, systems, settings, paths)
    failed = [f"{system.encoder}: {system.failed}" for system in systems if system.failed]
    if failed:
        raise UserError(f"{'; '.join(failed)}. See the errors above. The same command trains again what failed.")


def plan_systems(given: Mapping[str, Any], encoders: str, seeds: str, flags_of: Sequence[str]) -> list[System]:
    """The systems to compare, whose networks can be built. Raises UserError where something does not fit."""
    names, numbers = split_list(encoders), chosen_seeds(seeds)
    unknown = [name for name in names if name not in ENCODERS]
    if unknown or not names or len(set(names)) < len(names):
        close = close_names(unknown[0], ENCODERS) if unknown else []
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"--encoders {encoders} is not allowed: give each of {', '.join(ENCODERS)} once at most.{hint}")
    own = dict(own_flags(text) for text in flags_of)
    if set(own) - set(names) or len(own) < len(flags_of):
        raise UserError(f"--flags_of is for the encoders {', '.join(names)}, once for each; given: {', '.join(own)}.")
    for name in SET_HERE:
        if any(name in flags for flags in (given, *own.values())):
            raise UserError(f"compare sets {name} itself, for each run: leave --{name} out.")
    systems = []
    for name in names:
        flags = flags_for(name, given, own.get(name, {}))
        runs = [planned(name, flags, seed) for seed in numbers]
        with torch.device("meta"):
            build_model(runs[0].settings)
        systems.append(System(name, runs))
    check_same_task(systems)
    return systems


def chosen_seeds(text: str) -> list[int]:
    """Numbers as in 1,2,3. Raises UserError for others."""
    words = split_list(text)
    if not words or len(set(words)) < len(words) or not all(word.isdecimal() for word in words):
        raise UserError(f"--seeds {text} is not allowed: give different whole numbers, as 1,2,3.")
    return [int(word) for word in words]


def own_flags(text: str) -> tuple[str, dict[str, Any]]:
    """'ast --max_epoch 5' -> the encoder and its settings. Raises UserError for other words."""
    try:
        name, *words = shlex.split(text)
    except ValueError:
        name, words = "", []
    flags = words[::2]
    if not words or len(words) % 2 or not all(flag.startswith("--") for flag in flags):
        raise UserError(
            f"--flags_of {text!r} is not allowed: give an encoder and its flags in quotes, as 'ast --learning_rate "
            f"1e-5 --encoder_options depth=6'."
        )
    return name, check_values({flag.removeprefix("--"): value for flag, value in zip(flags, words[1::2], strict=True)})


def flags_for(encoder: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of one encoder: those of all, without the settings of other encoders, and its own."""
    known = all_settings()
    flags = {name: value for name, value in given.items() if known[name].encoder in ("", encoder)}
    options = [known["encoder_options"].check(each.get("encoder_options", {})) for each in (flags, own)]
    return {**flags, **own, **({"encoder_options": {**options[0], **options[1]}} if any(options) else {})}


def planned(encoder: str, flags: Mapping[str, Any], seed: int) -> Run:
    given = {**flags, "encoder": encoder, "random_seed": seed}
    return Run(seed, given, resolve(given, facts=store_facts))


def check_same_task(systems: Sequence[System]) -> None:
    """Raise UserError where systems would be tested on different clips."""
    first = systems[0].runs[0].settings
    for system in systems[1:]:
        other = system.runs[0].settings
        for name in ("dataset_type", "dataset_path", "workspace", "task", "esc_fold", "protocol", "test_split"):
            if getattr(other, name) != getattr(first, name):
                raise UserError(f"--flags_of: {name} must be the same for all encoders, which have the same clips.")


def clip_seconds(settings: Config) -> float:
    """Of the network's input."""
    return settings.clip_samples / settings.sample_rate


def print_plan(systems: Sequence[System]) -> None:
    table = Table(title="Runs to compare", title_justify="left")
    for column in ("encoder", "seconds", "epochs", "batch", "learning rate", "options", "to do"):
        table.add_column(column)
    for system in systems:
        s = system.runs[0].settings
        left = [str(run.seed) for run in system.runs if not run.tested()]
        options = ", ".join(f"{name}={value}" for name, value in s.encoder_options.items())
        to_do = f"seeds {', '.join(left)}" if left else "nothing"
        sizes = (f"{clip_seconds(s):g}", str(s.max_epoch), str(s.batch_size), f"{s.learning_rate:g}")
        table.add_row(system.encoder, *sizes, options, to_do)
    Console().print(table)
    if len({clip_seconds(system.runs[0].settings) for system in systems}) > 1:
        print(
            "warning: the encoders are given clips of different lengths. clip_samples counts at each encoder's own "
            "rate: give it with --flags_of."
        )


def train_and_test(run: Run) -> str:
    """Train a run or the rest of it, and test its best checkpoint; returns what went wrong, or an empty text.

    Raises KeyboardInterrupt where a command was interrupted by SIGINT or SIGTERM.
    """
    if run.tested():
        print(f"{run.name} is complete.")
        return ""
    named = [*section("machine", "test"), *FOR_TESTS]
    flags = {name: value for name, value in run.given.items() if name in named}
    commands = {
        "train": {**run.given, "exp_name": run.name, "resume": "auto"},
        "test": {**flags, "resume_checkpoint": run.best},
    }
    for command, given in commands.items():
        status = run_command(command, given)
        if status in INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            return f"{command} of {run.name} ended with exit status {status}"
    return ""


def measure(run: Run, steps: int) -> Optional[Cost]:
    """Speed, memory and arithmetic of a run's network, with a batch in memory; kept beside the run.

    None, with the reason printed, where it cannot be measured.
    """
    path = run.folder / COST
    recorded = resolve(fewest(read_json(run.folder / "config.json", dict)))
    settings = one_device(settle(recorded, training=True)[0])
    how: dict[str, Any] = {
        "device": device_name(settings), "steps": steps, "batch_size": settings.batch_size
    }  # fmt: skip
    known = read_json(path, dict) if path.is_file() else {}
    if known.keys() == Cost.__dataclass_fields__.keys() and all(known[name] == value for name, value in how.items()):
        return Cost(**known)
    print(f"Measuring {run.settings.encoder} ...", flush=True)
    batches = Repeated(synthetic_batch(settings, settings.batch_size), steps)
    on_cpu = settings.model_copy(update={"accelerator": "cpu", "precision": "32"})  # where each layer can be counted
    try:
        training = time_training(settings, batches)
        inference = time_inference(settings, batches)
        flops = count_flops(on_cpu, training=False)
    except UserError as error:
        print(f"warning: {run.settings.encoder} is not measured: {error}")
        return None
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(settings).parameters())
    cost = Cost(
        parameters=parameters,
        multiply_adds=flops / 2,
        training_clips_per_second=training.clips_per_second,
        inference_clips_per_second=inference.clips_per_second,
        memory=training.memory,
        precision=settings.precision,
        **how,
    )
    write_json(path, asdict(cost))
    return cost


def judge(systems: Sequence[System], settings: Config) -> None:
    """Give each system the metric of its seeds, the interval of their mean, and its difference to the first.

    The clips are drawn, for all seeds of both systems alike: what differs between seeds is the deviation. Raises
    UserError where two runs were not scored on the same clips.
    """
    scores = [[load_scores(run.scores) for run in system.runs] for system in systems]
    check_same_clips([each for runs in scores for each in runs])
    seed, clips, resamples = systems[0].runs[0].seed, len(scores[0][0].names), RESAMPLES
    found = []
    for system, runs in zip(systems, scores, strict=True):
        parts = [clip_statistic(settings.task, each.clipwise, each.targets) for each in runs]
        resamples = min(resamples, *(part.affordable_resamples() // len(parts) for part in parts))
        system.values = [clip_metrics(settings.task, each.clipwise, each.targets)[0].value for each in runs]
        found.append(MeanStatistic(parts))
    resamples = max(resamples, FEWEST_RESAMPLES)
    correct = settings.task == "multilabel"
    for system, statistic in zip(systems, found, strict=True):
        system.interval = bootstrap(statistic, clips, resamples=resamples, correct_bias=correct, seed=seed)
        if system is not systems[0]:
            system.to_first = paired_bootstrap(
                statistic, found[0], clips, resamples=resamples, correct_bias=correct, seed=seed
            )


def check_same_clips(scores: Sequence[Scores]) -> None:
    first = scores[0]
    for other in scores[1:]:
        if other.names != first.names or not np.array_equal(other.targets, first.targets):
            raise UserError(
                f"{first.path} and {other.path} have different clips: some could not be read in one of the tests, or "
                f"the data have changed. Remove the folder of the older run, and give the command again."
            )


COLUMNS: dict[str, Callable[[System], str]] = {
    "encoder": lambda s: encoder_titles(s.encoder),
    "{metric} [95 % interval]": lambda s: f"{s.mean:.4f} [{s.interval}]",
    "over seeds": lambda s: "-" if s.deviation is None else f"+- {s.deviation:.4f} (n = {len(s.values)})",
    "minus the first [95 % interval], p": lambda s: difference(s.to_first),
    "parameters": lambda s: f"{s.cost.parameters:,}" if s.cost else "-",
    "multiply-adds": lambda s: f"{s.cost.multiply_adds / 1e9:.3g} G" if s.cost else "-",
    "training clips/s": lambda s: f"{s.cost.training_clips_per_second:,.1f}" if s.cost else "-",
    "inference clips/s": lambda s: f"{s.cost.inference_clips_per_second:,.1f}" if s.cost else "-",
    "memory": lambda s: f"{s.cost.memory / 2**30:.2f} GiB" if s.cost else "-",
    "training": lambda s: f"{s.seconds:,.0f} s",
}


def difference(found: Optional[Comparison]) -> str:
    return f"{found.difference:+.4f} [{found.interval}], {found.p_value:.3f}" if found else "-"


def write(systems: Sequence[System], everything: Sequence[System], settings: Config, paths: Mapping[str, Path]) -> None:
    """Print the table, and write it as JSON and Markdown, with the figure of accuracy against arithmetic."""
    metric = MAIN_METRIC[settings.task]
    columns = [column.format(metric=metric) for column in COLUMNS]
    rows = [[show(system) for show in COLUMNS.values()] for system in systems]
    title = f"{settings.dataset_type}, {settings.test_split} clips, protocol {settings.protocol}"
    notes = [
        f"{metric}: mean over the seeds; interval: bootstrap over clips. p: two-sided, paired, not adjusted for how "
        f"many are compared.",
        "Multiply-adds: of a clip forwards, matrix products, convolutions and attention; Fourier transforms not.",
        "Memory: the peak of a training step's process (CPU) or tensors (GPU). Training: with validation, mean over "
        "the seeds.",
    ]
    notes += [f"{cost.device}, batches of {cost.batch_size}, {cost.precision}" for cost in [systems[0].cost] if cost]
    table = Table(title=title, caption="\n".join(notes), title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    write_json(
        paths["json"],
        {"data": title, "metric": metric, "systems": [system.as_dict() for system in everything], "notes": notes},
    )
    lines = [columns, ["---"] * len(columns), *rows]
    text = [f"# {title}", "", *(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {note}" for note in notes), ""]
    points = [
        Point(encoder_titles(system.encoder), system.cost.multiply_adds, system.mean, system.interval)
        for system in systems
        if system.cost and system.interval
    ]
    if points:
        save_png(cost_figure(points, metric), paths["png"])
        text.append(f"![{metric} against multiply-adds]({paths['png'].name})\n")
    write_text(paths["md"], "\n".join(text))
    print(f"Written: {', '.join(str(path) for end, path in paths.items() if end != 'png' or points)}")
