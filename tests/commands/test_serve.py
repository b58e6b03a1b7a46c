"""python main.py serve: what the page answers, what it refuses, and that nothing of a request stays."""

import asyncio
import base64
import io
import re
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import matplotlib.image
import numpy as np
import pytest
import soundfile
import uvicorn
from torch import Tensor

import main
from commands import serve
from evaluation.postprocess import PostProcessing
from inference import Tagger
from settings import resolve
from tests.helpers import refused
from tests.levels import LABELS, RATE, STEP, FramelessTagger, Levels, levels_tagger, stretches

if TYPE_CHECKING:
    from fastapi import FastAPI

ADDRESS = "http://127.0.0.1:8000"
LIMITS = serve.Limits(most_megabytes=0.5, most_seconds=30, most_waiting=2)
SOUND = stretches((3, 0), (3, 0.7), (2, 0), (1, -0.6), (6, 0))
BYTES = {"Content-Type": serve.BODY}
Capture = pytest.CaptureFixture[str]


class Gated(Levels):
    """Waits for `gate`, and counts how many passes run at once."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.inside, self.most_inside = 0, 0

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        assert self.gate.wait(timeout=60)
        self.inside -= 1
        return super().probabilities(waveform)


class Client:
    """Requests to the application, one after another, without a network."""

    def __init__(self, app: "FastAPI") -> None:
        self.app = app

    def request(self, method: str, path: str, **given: Any) -> httpx.Response:
        async def answer() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=ADDRESS) as client:
                return await client.request(method, path, **given)

        return asyncio.run(answer())

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.request("GET", path, headers=headers)

    def post(self, content: Any, **headers: str) -> httpx.Response:
        return self.request("POST", "/tag", content=content, headers={**BYTES, **headers})


@pytest.fixture
def network() -> Gated:
    return Gated()


@pytest.fixture
def tagger(network: Gated) -> Tagger:
    return Tagger(network, resolve({"sample_rate": RATE, "window_size": 256}), LABELS)


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where uploads are kept while they are tagged."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def client(tagger: Tagger, uploads: Path) -> Client:
    return Client(serve.build_app(tagger, LIMITS))


def encoded(samples: np.ndarray, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=kind, subtype=subtype)
    return file.getvalue()


def test_the_page_needs_nothing_from_elsewhere(client: Client) -> None:
    first, second = client.get("/"), client.get("/")
    assert first.status_code == 200
    policy = first.headers["content-security-policy"]
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)
    assert nonce is not None
    assert "default-src 'none'" in policy
    assert first.text.count(f'nonce="{nonce[1]}"') == 2  # the style and the script
    assert nonce[1] not in second.text
    addresses = set(re.findall(r"https?://[^\s\"'`<>]+", first.text))
    assert addresses == {"http://www.w3.org/2000/svg", "http://127.0.0.1", "http://localhost."}  # a name, and a message
    assert not re.findall(r"(?:src|href)=\"(?!data:,)", first.text)
    assert first.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/serve.html", "/../main.py", "/tag"])
def test_there_is_nothing_else(client: Client, path: str) -> None:
    assert client.get(path).status_code in (404, 405)


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_file_is_tagged_as_tagger_does(client: Client, tagger: Tagger, uploads: Path, kind: str) -> None:
    response = client.post(encoded(SOUND, kind), Origin=ADDRESS)
    assert response.status_code == 200
    found, expected = response.json(), tagger.tag(soundfile.read(io.BytesIO(encoded(SOUND)), dtype="float32")[0])
    assert found["duration"] == 15
    assert found["tags"] == [[label, pytest.approx(score, abs=1e-4)] for label, score in expected.top(2)]
    table = expected.events().sort_values("onset")
    events = [(event["label"], event["onset"], event["offset"]) for event in found["events"]]
    assert events == list(zip(table.event_label, table.onset.round(4), table.offset.round(4), strict=True))
    assert [label for label, *_ in events] == ["up", "down"]
    for one in found["classes"]:
        assert one["threshold"] == 0.5
        np.testing.assert_allclose(one["scores"], expected.framewise[:, LABELS.index(one["label"])], atol=1e-4)
    assert found["seconds_per_frame"] == expected.seconds_per_frame
    assert list(uploads.iterdir()) == []


def test_without_a_time_axis_there_are_tags_and_a_spectrogram(uploads: Path) -> None:
    frameless = levels_tagger(kind=FramelessTagger, window_size=256)
    found = Client(serve.build_app(frameless, LIMITS)).post(encoded(SOUND)).json()
    assert [label for label, _ in found["tags"]] == ["up", "down"]
    assert (found["classes"], found["events"], found["seconds_per_frame"]) == ([], [], 0)
    assert found["spectrogram"]["png"].startswith("data:image/png")


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("OGG", "OPUS")])
def test_other_formats(client: Client, kind: str, subtype: str) -> None:
    response = client.post(encoded(0.3 * np.sin(np.arange(4 * RATE) * 0.4), kind, subtype))
    assert response.status_code == 200
    assert response.json()["duration"] == pytest.approx(4, abs=0.2)


def test_the_spectrogram_is_a_picture(client: Client) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(5 * RATE) / RATE)
    found = client.post(encoded(tone)).json()["spectrogram"]
    head, _, data = found["png"].partition(",")
    assert head == "data:image/png;base64"
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png")
    assert pixels.shape[:2] == (64, 500)  # bands, and hops of 10 ms
    brightest = 1 - (pixels[:, 250, :3].sum(axis=1).argmax() + 0.5) / 64
    assert brightest == pytest.approx(dict(found["ticks"])[1000], abs=1 / 64)
    assert found["low_db"] < found["high_db"]


@pytest.mark.parametrize("seconds", [0.01, 12])
def test_silence(seconds: float, client: Client) -> None:
    found = client.post(encoded(np.zeros(round(seconds * RATE)))).json()
    assert found["duration"] == pytest.approx(seconds)
    assert (found["events"], len(found["tags"])) == ([], 2)
    assert "silent" in found["remarks"][0]


def test_smoothed_scores_are_shown(tagger: Tagger, uploads: Path) -> None:
    processing = PostProcessing(LABELS, thresholds=(0.5, 0.3), median_filter=(3, 1), interpolation=2)
    tagger.calibrated = processing.as_dict()
    found = Client(serve.build_app(tagger, LIMITS)).post(encoded(SOUND)).json()
    assert found["seconds_per_frame"] == pytest.approx(STEP / 2)
    assert [len(one["scores"]) for one in found["classes"]] == [96, 96]
    assert {one["label"]: one["threshold"] for one in found["classes"]} == {"up": 0.5, "down": 0.3}


async def unannounced() -> AsyncIterator[bytes]:
    for _ in range(600):
        yield bytes(1000)


REFUSED: dict[str, tuple[Callable[[], Any], int, str]] = {
    "no sound": (lambda: b"<html>hello</html>", 415, "audio"),
    "nothing": (lambda: b"", 415, "audio"),
    "cut header": (lambda: encoded(SOUND)[:30], 415, "The file"),
    "NaN": (lambda: encoded(np.append(SOUND, np.nan), subtype="FLOAT"), 415, "NaN"),
    "no mean": (lambda: encoded(np.full(RATE, 3e38, np.float32), subtype="FLOAT"), 422, "too loud"),
    "a page": (lambda: b"<html>no sound</html>" * 100, 415, "The file is no audio"),
    "another container": (lambda: b"\0\0\0\x18ftypM4A " + bytes(500), 415, "The file is MP4"),
    "too long": (lambda: encoded(np.zeros(31 * RATE), "FLAC"), 422, "30 s"),
    "a long silence": (lambda: encoded(np.zeros(1800 * RATE), "FLAC"), 422, "30 s"),
    "too large": (lambda: bytes(500_001), 413, "0.5 MB"),
    "too large, unannounced": (unannounced, 413, "0.5 MB"),
}


@pytest.mark.parametrize("which", list(REFUSED))
def test_what_is_refused(client: Client, uploads: Path, which: str) -> None:
    content, status, message = REFUSED[which]
    response = client.post(content())
    assert response.status_code == status
    assert message in response.json()["detail"]
    assert str(uploads) not in response.text
    assert list(uploads.iterdir()) == []
    assert client.post(encoded(SOUND)).status_code == 200


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("Content-Type", "multipart/form-data; boundary=x", 400),
        ("Content-Type", "text/plain", 400),
        ("Origin", "http://elsewhere.example", 403),
        ("Origin", "null", 403),
        ("Origin", "http://127.0.0.1:9000", 403),
        ("Origin", "http://[::1", 403),
        ("Content-Length", "9" * 5000, 413),
        ("Content-Length", "many", 413),
        ("Host", "elsewhere.example:8000", 403),
        ("Host", "", 403),
    ],
)
def test_what_other_sites_can_send(client: Client, name: str, value: str, status: int) -> None:
    response = client.post(encoded(SOUND), **{name: value})
    assert response.status_code == status
    assert response.json()["detail"]


@pytest.mark.parametrize(("path", "host"), [("/", "127.0.0.1.elsewhere.example"), ("/about", "elsewhere.example")])
def test_a_foreign_host_does_not_even_see_the_page(client: Client, path: str, host: str) -> None:
    assert client.get(path, Host=host).status_code == 403


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.1.5", "Studio.local:80"]
)
def test_hosts_that_are_served(host: str) -> None:
    serve.check_sender(host, None, "studio.local")
    serve.check_sender(host, f"http://{host}", "studio.local")


@pytest.mark.parametrize(
    "host", ["", "elsewhere.example", "localhost.elsewhere.example", "[::1", "a@b:c:d", "127.0.0.1x"]
)
def test_hosts_that_are_not(host: str) -> None:
    with pytest.raises(serve.RefusedError) as refused:
        serve.check_sender(host, None, "127.0.0.1")
    assert refused.value.status == 403


def test_the_queue_is_bounded_and_one_is_tagged_at_a_time(tagger: Tagger, network: Gated, uploads: Path) -> None:
    app = serve.build_app(tagger, LIMITS)

    async def many() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=ADDRESS, timeout=60) as client:
            network.gate.clear()
            content = encoded(SOUND)
            tasks = [asyncio.create_task(client.post("/tag", content=content, headers=BYTES)) for _ in range(5)]
            statuses = []
            for done in asyncio.as_completed(tasks):
                statuses.append((await done).status_code)
                if len(statuses) == 2:  # those that found no place are answered while the others wait
                    network.gate.set()
            return [*statuses, (await client.post("/tag", content=content, headers=BYTES)).status_code]

    assert asyncio.run(many()) == [503, 503, 200, 200, 200, 200]
    assert network.most_inside == 1
    assert list(uploads.iterdir()) == []


def test_an_upload_that_does_not_end_is_given_up(
    client: Client, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endless(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(serve, "UPLOAD_SECONDS", 0.01)
    monkeypatch.setattr(serve, "receive", endless)
    assert client.post(b"").status_code == 408
    assert list(uploads.iterdir()) == []


def test_a_slow_upload_gives_way(tagger: Tagger, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MOST_UPLOADS", 1)
    monkeypatch.setattr(serve, "SLOW_SECONDS", -1.0)
    app = serve.build_app(tagger, LIMITS)

    async def both() -> list[int]:
        begun, never = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            begun.set()
            yield b"R"
            await never.wait()

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=ADDRESS, timeout=60) as client:
            first = asyncio.create_task(client.post("/tag", content=slow(), headers=BYTES))
            await begun.wait()
            second = await client.post("/tag", content=encoded(SOUND), headers=BYTES)
            return [(await first).status_code, second.status_code]

    assert asyncio.run(both()) == [408, 200]
    assert list(uploads.iterdir()) == []


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "])
def test_half_a_request_is_closed(sent: bytes, tagger: Tagger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.05)

    async def answer() -> bytes:
        with serve.listening_socket("127.0.0.1", 0) as listening:
            config = uvicorn.Config(serve.build_app(tagger, LIMITS), log_level="error", http=serve.closing_protocol())
            server = uvicorn.Server(config)
            running = asyncio.create_task(server.serve(sockets=[listening]))
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(sent)
            content = await asyncio.wait_for(reader.read(), 60)
            writer.close()
            server.should_exit = True
            await running
            return content

    assert asyncio.run(answer()) == b""


def test_an_upload_that_breaks_off_frees_its_place(tagger: Tagger, uploads: Path) -> None:
    app = serve.build_app(tagger, serve.Limits(most_megabytes=1, most_seconds=15, most_waiting=0))
    sent: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"RIFF", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return events.pop(0)

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", serve.BODY.encode()), (b"content-length", b"1000")]
    scope: Any = {
        "type": "http", "method": "POST", "path": "/tag", "headers": headers, "query_string": b"",
        "http_version": "1.1", "scheme": "http", "root_path": "",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert [event["status"] for event in sent if "status" in event] == [400]
    assert list(uploads.iterdir()) == []
    assert Client(app).post(encoded(SOUND)).status_code == 200


@pytest.fixture
def served(tagger: Tagger, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `serve` hands to uvicorn."""
    handed: dict[str, Any] = {}
    monkeypatch.setattr(serve, "load_tagger", lambda given, command: tagger)

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        handed.update(app=server.config.app, address=sockets[0].getsockname())
        raise KeyboardInterrupt  # as uvicorn does after Ctrl-C

    monkeypatch.setattr(uvicorn.Server, "run", run)
    return handed


@pytest.mark.parametrize(("words", "host"), [([], "127.0.0.1"), (["--host", "0.0.0.0"], "0.0.0.0")])
def test_only_this_machine_by_default(words: list[str], host: str, served: dict[str, Any], capsys: Capture) -> None:
    assert main.main(["serve", *words, "--port", "0", "--most_seconds", "5"]) == 0
    assert served["address"][0] == host
    printed = capsys.readouterr().err
    assert f"http://{host}:{served['address'][1]} " in printed
    assert ("no password" in printed) == bool(words)
    assert Client(served["app"]).get("/about").json() == {
        "checkpoint": "", "classes": 2, "sample_rate": RATE, "most_bytes": 100_000_000, "most_seconds": 5,
    }  # fmt: skip


def test_a_port_that_is_taken(served: dict[str, Any], capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"127.0.0.1 port {port}" in refused(capsys, "serve", "--port", str(port))
    assert not served


@pytest.mark.parametrize("module", ["fastapi", "uvicorn"])
def test_what_to_install(module: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install fastapi uvicorn" in refused(capsys, "serve")
