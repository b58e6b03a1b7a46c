"""From a checkpoint and audio of any length to clip scores, frame scores and embeddings. The only inference path."""

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from data.audio import mono_waveform, stream_audio
from data.levels import SILENT, TOO_LOUD, Remark
from inference.onnx_runtime import load_onnx
from inference.reading import read_ahead
from inference.windows import OverlapAverage, Window, cut_windows, into_bins, pool_sound
from model import Network
from model.checkpoint import LoadReport
from model.layers.onednn import use_onednn
from model.opening import open_network
from settings import Config, UserError

if TYPE_CHECKING:
    import pandas as pd

    from evaluation.postprocess import PostProcessing

Precision = Literal["auto", "32", "bf16-mixed", "16-mixed", "tf32"]
Name = TypeVar("Name")
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
TF32: Precision = "tf32"  # of products and convolutions on a GPU, float32 else
WINDOWS_AT_ONCE = {"cpu": 4, "cuda": 32}
READERS = {"cpu": 1, "cuda": 4}  # threads that read files; on the CPU the network needs the cores itself
BATCHES_AHEAD = {"cuda": 1}  # batches queued on the device while the scores of an earlier one are awaited


class Runtime(Protocol):
    """What a Tagger scores windows with: a network, or the runtime of an exported one."""

    frames: int  # T of a window, 0: no time axis

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, samples) -> (B, K) of the clips, (B, T, K) of the frames, embeddings (B, D)."""


@dataclass(frozen=True)
class Tagged:
    """The scores of one recording: K classes, T frames of seconds_per_frame that cover it (0: no time axis)."""

    clipwise: np.ndarray  # (K,) probabilities
    framewise: np.ndarray  # (T, K) probabilities, frame t begins at t * seconds_per_frame
    embedding: np.ndarray  # (C,), the mean over the windows
    seconds_per_frame: float
    duration: float  # seconds; the last frame is half as long as the others to one and a half times
    labels: tuple[str, ...] = ()
    frame_embeddings: Optional[np.ndarray] = None  # (T, C), where they were asked for
    remarks: tuple[Remark, ...] = ()  # what is odd about the sound

    @property
    def silent(self) -> bool:
        """Whether the mix to mono is silent: no samples above -60 dB, an offset alone, or channels that cancel."""
        return any(remark.kind in SILENT for remark in self.remarks)

    def top(self, count: int, labels: Optional[Sequence[str]] = None) -> list[tuple[str, float]]:
        """The `count` classes with the highest clip scores, best first."""
        best = np.argsort(-self.clipwise, kind="stable")[:count]
        return [((labels or self.labels)[k], float(self.clipwise[k])) for k in best]

    def select_classes(self, labels: Sequence[str]) -> "Tagged":
        """The same with some of the classes, in this order."""
        place = [self.labels.index(label) for label in labels]
        return replace(
            self, labels=tuple(labels), clipwise=self.clipwise[place], framewise=np.take(self.framewise, place, axis=1)
        )

    def times(self) -> np.ndarray:
        """(T, 2) seconds: where each frame begins and ends; the last one with the sound."""
        begins = np.arange(len(self.framewise)) * self.seconds_per_frame
        return np.stack([begins, np.append(begins[1:], self.duration)[: len(begins)]], axis=1)

    def events(self, processing: "Optional[PostProcessing]" = None, name: str = "") -> "pd.DataFrame":
        """A table of events: filename (`name`), onset, offset (seconds), event_label, by class and time.

        processing: thresholds and filters, such as Tagger.postprocessing; None: a threshold of 0.5 alone. Raises
        UserError for an encoder without a time axis.
        """
        from evaluation.postprocess import PostProcessing  # here: it brings pandas, which tags alone do not need

        if len(self.framewise) == 0:
            raise UserError("The encoder has no time axis: it gives tags, but no events.")
        chosen = processing or PostProcessing(self.labels)
        return chosen.decode(
            self.framewise[None], names=[name], durations=np.array([self.duration]),
            seconds_per_frame=self.seconds_per_frame,
        )  # fmt: skip

    def in_bins(self, seconds_per_bin: float, by: Literal["mean", "max"] = "mean") -> "Tagged":
        """The same with frames of seconds_per_bin: the mean of the scores over each, or the highest."""

        def binned(frames: np.ndarray, how: Literal["mean", "max"]) -> np.ndarray:
            return into_bins(
                frames, seconds_per_frame=self.seconds_per_frame, duration=self.duration,
                seconds_per_bin=seconds_per_bin, by=how,
            )  # fmt: skip

        embeddings = None if self.frame_embeddings is None else binned(self.frame_embeddings, "mean")
        return replace(
            self,
            framewise=binned(self.framewise, by),
            frame_embeddings=embeddings,
            seconds_per_frame=seconds_per_bin,
        )


class Recording:
    """The scores of one recording, window after window: sums over the windows, and frames on one time axis."""

    def __init__(self, settings: Config, remarks: Sequence[Remark] = ()) -> None:
        """remarks: on the sound, complete when the last window is cut."""
        self.settings, self.remarks = settings, remarks
        self.frames = OverlapAverage(settings.clip_samples)
        self.clipwise, self.embedding = np.zeros(0), np.zeros(0)
        self.steps, self.windows, self.samples = 0, 0, 0
        self.waiting = 0  # windows that are cut and not yet scored
        self.cut = False  # whether the last window is cut
        self.error: Optional[UserError] = None

    def add(self, window: Window, clipwise: np.ndarray, frames: np.ndarray, embedding: np.ndarray) -> None:
        """The scores of the next window: (K,), (steps, K) and, beside them, (steps, C) if wanted; (C,)."""
        self.waiting -= 1
        if self.error is not None:
            return
        if window.recording is not None and self.settings.short_clips == "pad":
            share = (window.recording - window.start) / self.settings.clip_samples
            clipwise = pool_sound(clipwise, frames, share, softmax=self.settings.loss_type == "clip_ce")
        if len(frames):
            self.steps = len(frames)
            self.frames.add(frames, window.start, window.recording)
        clipwise, embedding = clipwise.astype(np.float64), embedding.astype(np.float64)
        if self.windows == 0:
            self.clipwise, self.embedding = clipwise, embedding
        else:
            highest = self.settings.clip_pooling == "max"
            self.clipwise = np.maximum(self.clipwise, clipwise) if highest else self.clipwise + clipwise
            self.embedding = self.embedding + embedding
        self.windows += 1
        self.samples = window.recording or window.start + self.settings.clip_samples

    def result(self, labels: Sequence[str]) -> "Tagged | UserError":
        """The scores of the recording, or its error."""
        if self.error is not None:
            return self.error
        classes = len(self.clipwise)
        frames = self.frames.result() if self.steps else np.zeros((0, classes), np.float32)
        self.frames = OverlapAverage(self.settings.clip_samples)  # of a long recording the scores need not stay twice
        rate, window = self.settings.sample_rate, self.settings.clip_samples
        count = 1 if self.settings.clip_pooling == "max" else self.windows
        return Tagged(
            clipwise=(self.clipwise / count).astype(np.float32),
            framewise=frames[:, :classes],
            embedding=(self.embedding / self.windows).astype(np.float32),
            seconds_per_frame=window / rate / self.steps if self.steps else 0.0,
            duration=self.samples / rate,
            labels=tuple(labels),
            frame_embeddings=frames[:, classes:] if frames.shape[1] > classes else None,
            remarks=tuple(self.remarks),
        )


class Tagger:
    """A network with its labels and front-end.

    A recording is cut into windows of the length the network was trained on (clip_samples), which overlap by
    window_overlap; the last one ends with the recording, and one that is shorter than a window is filled up as the
    network's own training clips were (short_clips). Of a padded one, the clip scores are those of the steps that hold
    sound. Frame scores are averaged at their absolute times, those in the middle of a window counting more. The clip
    scores of several windows become one by clip_pooling: the highest says whether a class occurs anywhere, as a clip's
    label does; the mean, for single_label networks, what there is most of.
    Audio is read as it is needed: of a long file only scores are kept.
    """

    def __init__(
        self,
        network: Runtime,
        settings: Config,
        labels: Sequence[str],
        report: Optional[LoadReport] = None,
        *,
        precision: Precision = "auto",
        postprocessing: Optional[Mapping[str, Any]] = None,
    ) -> None:
        """precision: auto takes the setting's. postprocessing: what `calibrate` put into the checkpoint."""
        self.network, self.settings, self.labels, self.report = network, settings, list(labels), report
        if isinstance(network, nn.Module):
            network.eval()
        self.precision = settings.precision if precision == "auto" else precision
        self.calibrated = postprocessing
        self.batch_size: Optional[int] = None  # windows in one step; None: what suits the device

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str = "auto",
        precision: Precision = "auto",
        given: Optional[Mapping[str, Any]] = None,
    ) -> "Tagger":
        """Load a checkpoint. path: a file, or a name of assets/checkpoints.json, which stands for a published file.

        A file that ends in .onnx, as `export` writes it, is run by onnxruntime on the CPU, without torch's graph.
        device: auto (CUDA where there is one), cpu, cuda, cuda:1, ... A checkpoint that carries no settings (a
        published one) takes them from config.py and `given`, as in {"dataset_type": "audioset"}. Raises UserError
        where the file is missing or does not fit.
        """
        if Path(path).suffix == ".onnx":
            loaded = load_onnx(path, dict(given or {}))
            tagger = cls(loaded.network, loaded.settings, loaded.labels, postprocessing=loaded.postprocessing)
        else:
            found = open_network(path, given)
            tagger = cls(
                found.network,
                found.settings,
                found.labels,
                found.report,
                precision=precision,
                postprocessing=found.checkpoint.postprocessing,
            )
        if tagger.calibrated is not None:
            from evaluation.postprocess import read_postprocessing

            read_postprocessing(tagger.calibrated, path)
        return tagger.to(device)

    def to(self, device: str) -> "Tagger":
        """Move the network to a device: auto, cpu, cuda, ... Raises UserError where there is no such device."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"This machine shows no GPU for device {device}: use cpu or auto.")
        if isinstance(self.network, nn.Module):
            try:
                self.network.to(device)
            except RuntimeError as error:  # an unknown name, a number that no GPU has, a GPU without room
                reason = str(error).partition("\n")[0]
                raise UserError(f"The device {device} cannot be used ({reason}): use cpu or auto.") from None
            if device == "cpu":
                use_onednn(self.network)
        return self

    @torch.inference_mode()
    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, clip_samples) on the device -> as Runtime.probabilities, in the Tagger's precision."""
        with self._arithmetic():
            return self.network.probabilities(waveform)

    def encoder(self) -> Network:
        """The network. Raises UserError where an exported file is run in its place."""
        if not isinstance(self.network, Network):
            raise UserError("An exported network gives no embeddings of frames: load the checkpoint itself.")
        return self.network

    @property
    def has_frames(self) -> bool:
        """Whether the encoder has a time axis: without one there are tags, but no frame scores and no events."""
        return self.network.frames > 0

    @property
    def device(self) -> torch.device:
        """Where the network is. The runtime of an exported network takes its batches from the CPU."""
        if isinstance(self.network, nn.Module):
            return next(self.network.parameters()).device
        return torch.device("cpu")

    @property
    def postprocessing(self) -> "PostProcessing":
        """Thresholds and filters that turn frame scores into events: calibrated with the checkpoint, or 0.5 alone."""
        from evaluation.postprocess import PostProcessing

        default = PostProcessing(tuple(self.labels))
        stored = default if self.calibrated is None else PostProcessing.from_dict(self.calibrated)
        if set(self.labels) <= set(stored.labels):
            return stored.for_labels(self.labels)
        warnings.warn(
            f"The post-processing of the checkpoint ({stored.source}) is for other classes than the network's, "
            f"{', '.join(stored.labels[:3])}, ...: it does not count here, the threshold is 0.5.",
            stacklevel=2,
        )
        return default

    def tag_file(self, path: str | Path, *, frame_embeddings: bool = False) -> Tagged:
        """Tag an audio file of any length, rate and number of channels. Raises UserError where it is unreadable.

        Warns of what is odd about the sound, as silence, clipping, or an end that could not be read.
        """
        ((_, found),) = self.tag_files([path], frame_embeddings=frame_embeddings)
        tagged = _raised(found)
        for remark in tagged.remarks:
            warnings.warn(f"{path}: {remark.text}", stacklevel=2)
        return tagged

    def tag(self, waveform: Any, sample_rate: Optional[int] = None, *, frame_embeddings: bool = False) -> Tagged:
        """Tag (samples,) or (channels, samples) audio: float in [-1, 1] or int16, an array or a tensor.

        sample_rate: of the waveform in Hz; None: settings.sample_rate. Warns of samples far beyond full scale; other
        remarks stand in the result. Raises UserError for empty or non-finite audio.
        """
        ((_, found),) = self.tag_waveforms([waveform], sample_rate, frame_embeddings=frame_embeddings)
        tagged = _raised(found)
        for remark in tagged.remarks:
            if remark.kind == TOO_LOUD:
                warnings.warn(f"The waveform: {remark.text}", stacklevel=2)
        return tagged

    def tag_files(
        self,
        paths: Iterable[str | Path],
        *,
        frame_embeddings: bool = False,
        progress: Optional[Callable[[float], None]] = None,
    ) -> Generator[tuple[str | Path, Tagged | UserError], None, None]:
        """Tag files one after another, in order; windows of several share a batch. A bad file gives its error.

        Threads read ahead while the network computes, from some files at a time; they end with the iterator, when its
        last file is tagged or it is closed. progress: called with the seconds of sound that each batch has added.
        """
        rate = self.settings.sample_rate
        found = ((path, list[Remark]()) for path in paths)
        sounds = ((path, remarks, stream_audio(path, rate, remarks=remarks)) for path, remarks in found)
        return self._tag_all(sounds, frame_embeddings, progress, READERS.get(self.device.type, 1))

    def tag_waveforms(
        self, waveforms: Iterable[Any], sample_rate: Optional[int] = None, *, frame_embeddings: bool = False
    ) -> Iterator[tuple[int, Tagged | UserError]]:
        """Tag arrays as `tag` takes them, in order, numbered from 0."""
        rate = self.settings.sample_rate
        found = ((k, list[Remark](), waveform) for k, waveform in enumerate(waveforms))
        sounds = ((k, remarks, _one_block(waveform, sample_rate, rate, remarks)) for k, remarks, waveform in found)
        return self._tag_all(sounds, frame_embeddings, None)

    def _tag_all(
        self,
        sounds: Iterable[tuple[Name, list[Remark], Generator[np.ndarray, None, None]]],
        frame_embeddings: bool,
        progress: Optional[Callable[[float], None]],
        readers: int = 0,
    ) -> Generator[tuple[Name, Tagged | UserError], None, None]:
        size = self.batch_size or WINDOWS_AT_ONCE.get(self.device.type, 4)
        depth = BATCHES_AHEAD.get(self.device.type, 0)
        batch: list[tuple[Recording, Window]] = []
        begun: deque[_Begun] = deque()
        open_ones: deque[tuple[Name, Recording]] = deque()  # in the order of `sounds`
        with closing(read_ahead(sounds, lambda sound: self._windows(sound[2]), readers=readers, most=size)) as ahead:
            for (name, remarks, _), windows in ahead:
                recording = Recording(self.settings, remarks)
                open_ones.append((name, recording))
                for window in _until_error(windows, recording):
                    if recording.error is not None:
                        break
                    batch.append((recording, window))
                    recording.waiting += 1
                    if len(batch) == size:
                        begun.append(self._begin(batch, frame_embeddings))
                        batch = []
                    while len(begun) > depth:
                        self._finish(begun.popleft(), frame_embeddings, progress)
                recording.cut = True
                while open_ones and open_ones[0][1].cut and open_ones[0][1].waiting == 0:
                    done, recording = open_ones.popleft()
                    yield done, recording.result(self.labels)
        if batch:
            begun.append(self._begin(batch, frame_embeddings))
        for each in begun:
            self._finish(each, frame_embeddings, progress)
        for name, recording in open_ones:
            yield name, recording.result(self.labels)

    def _windows(self, blocks: Generator[np.ndarray, None, None]) -> Generator[Window, None, None]:
        """The windows of a recording. Raises UserError where it cannot be read."""
        settings = self.settings
        with closing(blocks):
            yield from cut_windows(
                blocks, window=settings.clip_samples, overlap=settings.window_overlap,
                short_clips=settings.short_clips, last_window=settings.last_window,
            )  # fmt: skip

    @torch.inference_mode()
    def _begin(self, batch: list[tuple[Recording, Window]], frame_embeddings: bool) -> "_Begun":
        """Let the device score windows of one or several recordings; a GPU works on when this returns."""
        cuda = self.device.type == "cuda"
        waveform = torch.empty(len(batch), len(batch[0][1].samples), pin_memory=cuda)
        np.stack([window.samples for _, window in batch], out=waveform.numpy())
        waveform = waveform.to(self.device, non_blocking=cuda)
        with self._arithmetic():
            if frame_embeddings:
                network = self.encoder()
                outputs = network(waveform)
                clipwise, embedding = network.class_probabilities(outputs.clip_logits), outputs.embedding
                framewise = torch.cat([network.class_probabilities(outputs.frame_logits), outputs.frames], dim=2)
            else:
                clipwise, framewise, embedding = self.network.probabilities(waveform)
        columns = [part.float().to("cpu", non_blocking=cuda) for part in (clipwise, framewise, embedding)]
        copied = None
        if cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))
        return _Begun(batch, columns, copied)

    def _finish(self, begun: "_Begun", frame_embeddings: bool, progress: Optional[Callable[[float], None]]) -> None:
        """Wait for the scores of a batch, and hand each recording its own."""
        batch = begun.batch
        if begun.copied is not None:
            begun.copied.synchronize()
        columns = [column.numpy() for column in begun.columns]
        if not all(np.isfinite(column).all() for column in columns):
            if len(batch) > 1:  # whose are they? Each by itself: 8-bit networks scale the windows of a batch together
                for one in batch:
                    self._finish(self._begin([one], frame_embeddings), frame_embeddings, progress)
                return
            recording, window = batch[0]
            recording.error = self._not_finite(window)
        for (recording, window), *scores in zip(batch, *columns, strict=True):
            before = recording.samples
            recording.add(window, *scores)
            if progress is not None:
                progress((recording.samples - before) / self.settings.sample_rate)

    def _not_finite(self, window: Window) -> UserError:
        """The error of a recording that the network has no numbers for."""
        return UserError(
            f"The network's scores are not finite in precision {self.precision}, for samples of up to "
            f"{np.abs(window.samples).max():g} (full scale is 1)"
            + (": use precision 32." if self.precision in HALF else ": they are too loud to be sound.")
        )

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The precision in which the network computes. float32 means float32: no TF32 in cuDNN's convolutions."""
        if self.precision in HALF:
            with torch.autocast(self.device.type, dtype=HALF[self.precision]):
                yield
        elif self.device.type == "cuda":
            tf32, products = self.precision == TF32, torch.backends.cuda.matmul
            before, products.allow_tf32 = products.allow_tf32, tf32
            try:
                with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=tf32):
                    yield
            finally:
                products.allow_tf32 = before
        else:
            yield


@dataclass(frozen=True)
class _Begun:
    """A batch that the device has: its scores (B, ...) on the CPU, whole once `copied` has happened."""

    batch: list[tuple[Recording, Window]]
    columns: list[Tensor]
    copied: Optional[torch.cuda.Event]


def _until_error(windows: Iterator[Window], recording: Recording) -> Iterator[Window]:
    """The windows of a recording; where it cannot be read, its error is noted and there are no more."""
    try:
        yield from windows
    except UserError as error:
        recording.error = error


def _one_block(
    waveform: Any, sample_rate: Optional[int], wanted_rate: int, remarks: list[Remark]
) -> Generator[np.ndarray, None, None]:
    yield mono_waveform(waveform, sample_rate or wanted_rate, wanted_rate, remarks)


def _raised(found: Tagged | UserError) -> Tagged:
    if isinstance(found, UserError):
        raise found
    return found
