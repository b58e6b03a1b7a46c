"""A Tagger on each device of a Ray cluster, as actors of Ray Data (an optional package)."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np

from inference.loading import load_tagger
from inference.tagger import Tagged, Tagger
from settings import UserError, requested

FILES_AT_ONCE = 64  # that a worker is given together: after its death these are tagged again
MOST_PARTS = 10_000  # into which the list of files is divided
ANSWER_SECONDS = 10.0  # in which a cluster takes a connection
INSTALL = "pip install 'ray[data]'"


@contextmanager
def ray_tagger(address: str, given: Mapping[str, Any], tagger: Tagger, runtime: str) -> "Iterator[RayTagger]":
    """Workers of a cluster that tag files as `tagger` does; `local`: of this machine's own, which ends with the block.

    given, runtime: what load_tagger takes, for the Tagger of each worker: all machines find the project, the checkpoint
    and the files under the same paths. Raises UserError where Ray is not installed, and where no cluster answers.
    """
    before = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to others
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise UserError(f"--ray {address} needs Ray Data, and {error.name} is not installed: {INSTALL}.") from None
    _check_address(address)
    try:
        # What workers print stays on their machines: results and errors come back.
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # Ray's own has no class where a node does not start in time
        raise _unreachable(address, error) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # which Ray replaces by one of its own
    path = given["resume_checkpoint"]
    place = os.path.abspath(path) if Path(path).is_file() else path  # else a known name
    load = partial(load_tagger, {**given, "resume_checkpoint": place}, "predict", runtime)
    settings, accelerator = tagger.settings, requested("accelerator", dict(given))
    try:
        with redirect_stdout(_OwnOutput(sys.stdout)):
            yield RayTagger(ray, load, tuple(tagger.labels), tagger.batch_size, settings.devices, accelerator)
    finally:
        with redirect_stdout(sys.stderr):  # what Ray has kept to itself so far
            ray.shutdown()


class _OwnOutput:
    """Standard output for this thread; what other threads print, as Ray's of a worker that died, is no result."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.owner = stream, threading.current_thread()

    def write(self, text: str) -> int:
        own = threading.current_thread() is self.owner
        return (self.stream if own else sys.stderr).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _check_address(address: str) -> None:
    """Raise UserError where nothing listens at HOST:PORT, after seconds: Ray itself tries for many minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(
        f"--ray {address}: no cluster can be reached ({reason}). Give local, or the address of one that runs, as "
        f"`ray start --head` prints it."
    )


class _Worker:
    """A Tagger in a process of its own."""

    def __init__(self, load: Callable[[], Tagger], batch_size: Optional[int], frame_embeddings: bool, threads: int):
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.tagger = load()
        self.tagger.batch_size = batch_size
        self.frame_embeddings = frame_embeddings

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        """number (N,) and path (N,) of files -> their numbers, and Tagged or UserError of each."""
        paths = [os.fsdecode(path) for path in batch["path"]]
        tagging = self.tagger.tag_files(paths, frame_embeddings=self.frame_embeddings)
        for number, (_, found) in zip(batch["number"], tagging, strict=True):
            result = found if isinstance(found, UserError) else replace(found, labels=())
            yield {"number": [number], "found": [result]}


@dataclass(frozen=True)
class RayTagger:
    """Tags files as a Tagger does, by one worker a device.

    load: makes the Tagger of a worker. labels: its classes. batch_size: as Tagger's. devices: how many workers; 0: one
    a GPU, or without GPUs one a machine. accelerator: the setting.
    """

    ray: Any
    load: Callable[[], Tagger]
    labels: tuple[str, ...]
    batch_size: Optional[int]
    devices: int
    accelerator: str

    def tag_files(
        self,
        paths: Iterable[str | Path],
        *,
        frame_embeddings: bool = False,
        progress: Optional[Callable[[float], None]] = None,
    ) -> Generator[tuple[str | Path, Tagged | UserError], None, None]:
        """See Tagger.tag_files. The files of a worker that died are tagged by another. Scores differ by rounding alone.

        Raises UserError where there are fewer devices than workers, or a worker cannot load its Tagger.
        """
        given = list(paths)
        if not given:
            return
        data = self.ray.data
        workers, needs, threads = self._workers()
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # Absolute, for processes in other folders; bytes, for names that are no UTF-8.
        rows = [{"number": n, "path": os.fsencode(os.path.abspath(path))} for n, path in enumerate(given)]
        results = data.from_items(
            rows, override_num_blocks=min(MOST_PARTS, -(-len(rows) // FILES_AT_ONCE))
        ).map_batches(
            _Worker, batch_size=FILES_AT_ONCE, compute=data.ActorPoolStrategy(size=min(workers, len(rows))),
            fn_constructor_args=(self.load, self.batch_size, frame_embeddings, threads), **needs,
        )  # fmt: skip
        try:
            for row in results.iter_rows():
                path, found = given[row["number"]], row["found"]
                if isinstance(found, UserError):
                    yield path, UserError(str(found).replace(os.path.abspath(path), str(path)))
                    continue
                if progress is not None:
                    progress(found.duration)
                yield path, replace(found, labels=self.labels)
        except self.ray.exceptions.RayError as error:
            _, mistake, text = str(error).rpartition("UserError: ")
            if not mistake:
                raise
            raise UserError(f"A worker of Ray: {text.strip()}") from None

    def _workers(self) -> tuple[int, dict[str, Any], int]:
        """How many workers, what each needs of Ray, and its threads (0: PyTorch's own choice)."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        if gpus and self.accelerator != "cpu":
            if self.devices > gpus:
                raise UserError(f"--devices {self.devices}: the cluster has {gpus} GPUs.")
            return self.devices or gpus, {"num_gpus": 1}, 0
        cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        if self.accelerator == "gpu" or not cores:
            raise UserError(f"--ray: the cluster has {sum(cores)} CPU cores and {gpus} GPUs: none that can be used.")
        workers = self.devices or len(cores)
        share = min(cores) // -(-workers // len(cores))  # of the smallest machine, for each of its workers
        if share < 1:
            raise UserError(f"--devices {workers}: the cluster has machines of {min(cores)} CPU cores, one a worker.")
        return workers, {"num_cpus": share}, share
