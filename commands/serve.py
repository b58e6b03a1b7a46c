"""python main.py serve: a web page on this machine that tags sound files and recordings. It keeps nothing."""

import asyncio
import base64
import contextlib
import io
import ipaddress
import json
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from data.audio import read_audio
from data.levels import Remark
from inference import Tagged, Tagger
from inference.loading import event_processing, load_tagger
from inference.outputs import event_rows
from inference.pictures import sound_of_file
from settings import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

    from evaluation.postprocess import PostProcessing

INSTALL = "pip install fastapi uvicorn"
PAGE = Path(__file__).with_name("serve.html")
MOST_CLASSES = 10  # with a strip of their own on the page, beside those with events
UPLOAD_SECONDS = 120  # after which an upload that does not end is given up
GRACE_SECONDS = 5.0  # that an upload may pause, or be slow in the beginning
SLOW_SECONDS = 0.5  # after which a slow upload gives way to another one, where there are too many
LEAST_RATE = 10_000  # bytes a second: a slower upload is given up
CHECK_SECONDS = 0.5  # between two looks at an upload
MOST_UPLOADS = 16  # at once
HEAD_SECONDS = 10.0  # after which a connection without a whole request is closed
ANSWER_SECONDS = 60.0  # after which an answer that is not taken is given up
BODY = "application/octet-stream"  # other sites' pages cannot send this kind without asking first, which is refused
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Permissions-Policy": "microphone=(self)",
}


class RefusedError(Exception):
    """A request that is not answered: an HTTP status, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and how many may wait while one is computed."""

    most_megabytes: float
    most_seconds: float
    most_waiting: int

    def __post_init__(self) -> None:
        if not (0 < self.most_megabytes < np.inf and 0 < self.most_seconds < np.inf and self.most_waiting >= 0):
            raise UserError(
                f"most_megabytes = {self.most_megabytes}, most_seconds = {self.most_seconds} and most_waiting = "
                f"{self.most_waiting} are not allowed: the first two lie above 0, the last is 0 or more."
            )

    @property
    def most_bytes(self) -> int:
        return round(self.most_megabytes * 1e6)


def run(given: dict[str, Any], host: str, port: int, **limits: Any) -> None:
    """Serve the page on http://host:port until Ctrl-C.

    Raises UserError where FastAPI or uvicorn is missing, where the address is taken, and for values that are not
    allowed.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise UserError(f"The page needs FastAPI and uvicorn ({error}): {INSTALL}") from None
    chosen = Limits(**limits)
    with listening_socket(host, port) as listening:
        app = build_app(load_tagger(given, "serve"), chosen, host)
        shown = f"[{host}]" if ":" in host else host
        print(f"Open http://{shown}:{listening.getsockname()[1]} in a browser. Ctrl-C ends.", file=sys.stderr)
        if host not in ("127.0.0.1", "localhost", "::1"):
            print("Whoever reaches this address can use the page: it asks for no password.", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once the last answer is given
            config = uvicorn.Config(app, log_level="warning", server_header=False, http=closing_protocol())
            uvicorn.Server(config).run(sockets=[listening])


def closing_protocol() -> "type[asyncio.Protocol]":
    """uvicorn's HTTP, which waits for requests and for readers without end, with a limit for both."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class ClosingProtocol(H11Protocol):
        """Closes a connection that has not sent a whole request, or does not take its answer, after some seconds."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._close_after(HEAD_SECONDS)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._close_after(None)  # a request has come; its body is `receive`'s
            elif self.timer is None:
                self._close_after(HEAD_SECONDS)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._close_after(ANSWER_SECONDS)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._close_after(None)

        def connection_lost(self, exc: Exception | None) -> None:
            self._close_after(None)
            super().connection_lost(exc)

        def _close_after(self, seconds: float | None) -> None:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    return ClosingProtocol


def listening_socket(host: str, port: int) -> socket.socket:
    """The address is taken before the checkpoint is loaded. Raises UserError where that fails. port 0: a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"{host} port {port} cannot be served ({error}): give another --port or --host.") from None


def build_app(tagger: Tagger, limits: Limits, host: str = "127.0.0.1") -> "FastAPI":
    """The page (/), checkpoint and limits (/about), and tagging (POST /tag: the bytes of a file -> JSON, see `answer`).

    One sound is tagged at a time. host: the name under which the page is served, beside localhost and IP addresses.
    """
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import HTMLResponse, JSONResponse

    worker = ThreadPoolExecutor(max_workers=1)
    queue, uploads = Queue(limits.most_waiting), Uploads(MOST_UPLOADS)
    processing = event_processing(tagger)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.shutdown()

    app = FastAPI(title="HTS-AT", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.middleware("http")
    async def guard(request: Request, forward: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            check_sender(request.headers.get("host", ""), request.headers.get("origin"), host)
            response = await forward(request)
        except RefusedError as refused:
            response = JSONResponse({"detail": refused.reason}, refused.status)
            if refused.status == 408:  # what is still to come is not read
                response.headers["Connection"] = "close"
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    async def page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; "
            f"media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        content = PAGE.read_text(encoding="utf-8").replace("{{ nonce }}", nonce)
        return HTMLResponse(content, headers={"Content-Security-Policy": policy})

    @app.get("/about")
    async def about() -> JSONResponse:
        report = tagger.report
        return JSONResponse(
            {
                "checkpoint": "" if report is None else Path(report.path).name,
                "classes": len(tagger.labels),
                "sample_rate": tagger.settings.sample_rate,
                "most_bytes": limits.most_bytes,
                "most_seconds": limits.most_seconds,
            }
        )

    @app.post("/tag")
    async def tag(request: Request) -> Response:
        queue.check()
        with tempfile.TemporaryDirectory(prefix="htsat_") as folder:
            path = Path(folder) / "upload"
            await uploads.run(lambda upload: receive(request, path, limits, upload))
            with queue:
                loop = asyncio.get_running_loop()
                content = await loop.run_in_executor(worker, tag_upload, tagger, processing, path, limits)
        return Response(content, media_type="application/json")

    return app


class Upload:
    """The progress of an upload, in the seconds of the event loop's clock."""

    def __init__(self) -> None:
        self.size, self.begin = 0, asyncio.get_running_loop().time()
        self.last = self.begin

    def add(self, size: int) -> None:
        self.size, self.last = self.size + size, asyncio.get_running_loop().time()

    def too_slow(self, grace: float = GRACE_SECONDS) -> bool:
        """Whether it pauses, or is slow, for longer than it may."""
        now = asyncio.get_running_loop().time()
        seconds = now - self.begin
        return (
            seconds > UPLOAD_SECONDS
            or now - self.last > grace
            or (seconds > grace and self.size < LEAST_RATE * seconds)
        )


class Uploads:
    """The uploads at one time: at most so many, of which slow ones are given up, and give way to others before."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open: dict[asyncio.Future[None], Upload] = {}

    async def run(self, write: Callable[[Upload], Coroutine[Any, Any, None]]) -> None:
        """Await an upload. Raises RefusedError where it is too slow, or has no room."""
        if len(self.open) >= self.most:
            self._make_room()
        upload = Upload()
        task = asyncio.ensure_future(write(upload))
        self.open[task] = upload
        try:
            while not task.done() and not upload.too_slow():
                await asyncio.wait({task}, timeout=CHECK_SECONDS)
        finally:
            del self.open[task]
            task.cancel()
            await asyncio.wait({task})
        if task.cancelled():
            raise RefusedError(
                408, f"The upload is slower than {LEAST_RATE / 1000:g} kB/s, or takes over {UPLOAD_SECONDS} s."
            )
        task.result()

    def _make_room(self) -> None:
        slow = [task for task, upload in self.open.items() if upload.too_slow(SLOW_SECONDS)]
        if not slow:
            raise RefusedError(503, "Too many sounds are being uploaded: try again in a while.")
        slow[0].cancel()


class Queue:
    """At most 1 + most_waiting sounds at once, which are tagged one by one."""

    def __init__(self, most_waiting: int) -> None:
        self.places = 1 + most_waiting

    def check(self) -> None:
        """Raises RefusedError where there is no place."""
        if self.places == 0:
            raise RefusedError(503, "Too many sounds are waiting: try again in a while.")

    def __enter__(self) -> None:
        self.check()
        self.places -= 1

    def __exit__(self, *error: object) -> None:
        self.places += 1


def check_sender(host: str, origin: str | None, served: str) -> None:
    """Refuse requests that another site makes a browser send here.

    A site whose name comes to mean this machine (DNS rebinding) shows its name in the Host header: only localhost, IP
    addresses and the name that is served may stand there. A page of another site shows in the Origin header.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name not in ("localhost", served.lower()):
            ipaddress.ip_address(name)
    except ValueError:
        raise RefusedError(403, f"The host {host!r} is not served here: open the address that serve printed.") from None
    if origin is not None and origin.partition("://")[2] != host:
        raise RefusedError(403, f"Requests from {origin} are not answered.")


async def receive(request: "Request", path: Path, limits: Limits, upload: Upload) -> None:
    """Write a request's body into `path`, as far as the limit goes. upload: counts each block."""
    from starlette.requests import ClientDisconnect

    if request.headers.get("content-type") != BODY:
        raise RefusedError(400, f"Send the bytes of the sound file with Content-Type: {BODY}.")
    too_large = RefusedError(413, f"The file is larger than the {limits.most_megabytes:g} MB that are taken here.")
    announced = request.headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,15}", announced) or int(announced) > limits.most_bytes:
        raise too_large
    size = 0
    try:
        with path.open("wb") as file:
            async for block in request.stream():
                size += len(block)
                upload.add(len(block))
                if size > limits.most_bytes:
                    raise too_large
                file.write(block)
    except ClientDisconnect:
        raise RefusedError(400, "The upload broke off.") from None


def tag_upload(tagger: Tagger, processing: "PostProcessing", path: Path, limits: Limits) -> bytes:
    """Tag a file; returns `answer`. Raises RefusedError for a file that is no sound or too long."""
    rate, remarks = tagger.settings.sample_rate, list[Remark]()
    try:
        waveform = read_audio(path, rate, seconds=limits.most_seconds + 1, remarks=remarks)
    except UserError as error:
        raise RefusedError(415, str(error).replace(str(path), "The file")) from None
    if len(waveform) > limits.most_seconds * rate:
        raise RefusedError(422, f"The sound is longer than the {limits.most_seconds:g} s that are taken here.")
    try:
        tagged = tagger.tag(waveform)
    except UserError as error:
        raise RefusedError(422, str(error)) from None
    sound = sound_of_file(path, tagger.settings, tagged.duration)
    content = answer(tagged, processing) | {"spectrogram": picture(sound.logmel, sound.band_hz)}
    content["remarks"] = [remark.text for remark in remarks]
    return json.dumps(content, allow_nan=False).encode()


def answer(tagged: Tagged, processing: "PostProcessing") -> dict[str, Any]:
    """{duration, seconds_per_frame, tags, classes, events}: seconds, and scores between 0 and 1.

    tags: the best classes, [label, clip score]; classes: these and all with events, with threshold and smoothed frame
    scores; events: in the order of time, with score and threshold. Without a time axis seconds_per_frame is 0, and
    there are only tags.
    """
    tags = tagged.top(MOST_CLASSES)
    content: dict[str, Any] = {
        "duration": tagged.duration, "seconds_per_frame": 0.0,
        "tags": [[label, round(score, 4)] for label, score in tags], "classes": [], "events": [],
    }  # fmt: skip
    if len(tagged.framewise) == 0:
        return content
    events = event_rows(tagged.events(processing), processing)
    scores, step = processing.smooth(
        tagged.framewise[None], durations=np.array([tagged.duration]), seconds_per_frame=tagged.seconds_per_frame
    )
    shown = dict.fromkeys([*(event.label for event in events), *(label for label, _ in tags)])
    place = {label: processing.labels.index(label) for label in shown}
    return content | {
        "seconds_per_frame": step,
        "classes": [
            {"label": label, "threshold": processing.thresholds[k], "scores": scores[0, :, k].round(4).tolist()}
            for label, k in place.items()
        ],
        "events": [
            {**event._asdict(), "onset": round(event.onset, 4), "offset": round(event.offset, 4)} for event in events
        ],
    }


def picture(logmel: np.ndarray, band_hz: np.ndarray) -> dict[str, Any]:
    """A (T, F) log-mel spectrogram in dB as a PNG (a data URL), and where Hz stand: [Hz, share of the height]."""
    from matplotlib.image import imsave

    from evaluation.plots import MEL_TICKS

    file = io.BytesIO()
    low, high = float(np.percentile(logmel, 2)), float(logmel.max())
    imsave(file, logmel.T, cmap="magma", vmin=low, vmax=max(high, low + 1), origin="lower", format="png")
    ticks = MEL_TICKS[(band_hz[0] <= MEL_TICKS) & (band_hz[-1] >= MEL_TICKS)]
    heights = (np.interp(ticks, band_hz, np.arange(len(band_hz))) + 0.5) / len(band_hz)
    return {
        "png": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}",
        "low_db": low,
        "high_db": high,
        "ticks": [[int(tick), round(float(height), 4)] for tick, height in zip(ticks, heights, strict=True)],
    }
