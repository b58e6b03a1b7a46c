"""The page: what it answers, what it refuses, and that nothing of a request stays."""

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
import torch
import uvicorn
from torch import Tensor

import main
from commands import serve
from evaluation.postprocess import PostProcessing
from inference import Tagger
from settings import resolve

if TYPE_CHECKING:
    from fastapi import FastAPI

RATE, STEPS = 8000, 32
ADDRESS = "http://127.0.0.1:8000"
LIMITS = serve.Limits(most_megabytes=0.5, most_seconds=30, most_waiting=2)


class Levels:
    """Class 0 is the mean of what is above zero in a step, class 1 below. It waits for `gate`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.inside, self.most_inside = 0, 0

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        assert self.gate.wait(timeout=60)
        self.inside -= 1
        steps = waveform.unflatten(1, (STEPS, -1))
        frames = torch.stack([steps.clamp(min=0).mean(dim=2), (-steps).clamp(min=0).mean(dim=2)], dim=2)
        return frames.mean(dim=1), frames, frames.mean(dim=1)


class Client:
    """Requests to the application, one after another, without a network."""

    def __init__(self, app: "FastAPI") -> None:
        self.app = app

    def request(self, method: str, path: str, **given: Any) -> httpx.Response:
        async def answer() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=ADDRESS) as client:
                return await client.request(method, path, **given)

        return asyncio.run(answer())

    def get(self, path: str, **given: Any) -> httpx.Response:
        return self.request("GET", path, **given)


@pytest.fixture
def network() -> Levels:
    return Levels()


@pytest.fixture
def tagger(network: Levels) -> Tagger:
    return Tagger(network, resolve({"sample_rate": RATE, "window_size": 256}), ["up", "down"])


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


def sound(seconds: float = 15.0) -> np.ndarray:
    """Silence, 0.7 from 3 s to 6 s, and -0.6 from 8 s to 9 s."""
    time = np.arange(round(seconds * RATE)) / RATE
    up, down = (time >= 3) & (time < 6), (time >= 8) & (time < 9)
    return (0.7 * up - 0.6 * down).astype(np.float32)


def encoded(samples: np.ndarray, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=kind, subtype=subtype)
    return file.getvalue()


def post(client: Client, content: Any, **headers: str) -> httpx.Response:
    return client.request("POST", "/tag", content=content, headers={"Content-Type": serve.BODY, **headers})


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


def test_the_page_knows_the_limits(client: Client) -> None:
    assert client.get("/about").json() == {
        "checkpoint": "", "classes": 2, "sample_rate": RATE, "most_bytes": 500_000, "most_seconds": 30,
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/serve.html", "/../main.py", "/tag"])
def test_there_is_nothing_else(client: Client, path: str) -> None:
    assert client.get(path).status_code in (404, 405)


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_file_is_tagged_as_tagger_does(client: Client, tagger: Tagger, uploads: Path, kind: str) -> None:
    response = post(client, encoded(sound(), kind), Origin=ADDRESS)
    assert response.status_code == 200
    found, expected = response.json(), tagger.tag(soundfile.read(io.BytesIO(encoded(sound())), dtype="float32")[0])
    assert found["duration"] == 15
    assert [tuple(tag) for tag in found["tags"]] == [
        (label, pytest.approx(s, abs=1e-4)) for label, s in expected.top(2)
    ]
    events = [(event["label"], event["onset"], event["offset"]) for event in found["events"]]
    table = expected.events().sort_values("onset")
    assert events == list(zip(table.event_label, table.onset.round(4), table.offset.round(4), strict=True))
    assert [label for label, *_ in events] == ["up", "down"]
    for one in found["classes"]:
        assert one["threshold"] == 0.5
        column = expected.framewise[:, ["up", "down"].index(one["label"])]
        np.testing.assert_allclose(one["scores"], column, atol=1e-4)
    assert found["seconds_per_frame"] == expected.seconds_per_frame
    assert list(uploads.iterdir()) == []


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("OGG", "OPUS")])
def test_other_formats(client: Client, kind: str, subtype: str) -> None:
    response = post(client, encoded(0.3 * np.sin(np.arange(4 * RATE) * 0.4), kind, subtype))
    assert response.status_code == 200
    assert response.json()["duration"] == pytest.approx(4, abs=0.2)


def test_the_spectrogram_is_a_picture(client: Client) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(5 * RATE) / RATE)
    found = post(client, encoded(tone)).json()["spectrogram"]
    head, _, data = found["png"].partition(",")
    assert head == "data:image/png;base64"
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png")
    assert pixels.shape[:2] == (64, 500)  # bands, and hops of 10 ms
    brightest = 1 - (pixels[:, 250, :3].sum(axis=1).argmax() + 0.5) / 64
    assert brightest == pytest.approx(dict(found["ticks"])[1000], abs=1 / 64)
    assert found["low_db"] < found["high_db"]


def test_silence_and_a_very_short_sound(client: Client) -> None:
    for seconds in (0.01, 12):
        found = post(client, encoded(np.zeros(round(seconds * RATE)))).json()
        assert found["duration"] == pytest.approx(seconds)
        assert found["events"] == []
        assert len(found["tags"]) == 2


def test_smoothed_scores_are_shown(network: Levels, uploads: Path) -> None:
    calibrated = PostProcessing(("up", "down"), thresholds=(0.5, 0.3), median_filter=(3, 1), interpolation=2).as_dict()
    settings = resolve({"sample_rate": RATE, "window_size": 256})
    smooth = Tagger(network, settings, ["up", "down"], postprocessing=calibrated)
    found = post(Client(serve.build_app(smooth, LIMITS)), encoded(sound())).json()
    assert found["seconds_per_frame"] == pytest.approx(10 / STEPS / 2)
    assert [len(one["scores"]) for one in found["classes"]] == [96, 96]
    assert {one["label"]: one["threshold"] for one in found["classes"]} == {"up": 0.5, "down": 0.3}


async def unannounced() -> AsyncIterator[bytes]:
    for _ in range(600):
        yield bytes(1000)


def with_nan() -> bytes:
    samples = np.zeros(RATE, np.float32)
    samples[5] = np.nan
    return encoded(samples, subtype="FLOAT")


def too_loud() -> bytes:
    """Finite samples whose mean over a step is none."""
    return encoded(np.full(RATE, 3e38, np.float32), subtype="FLOAT")


REFUSED: dict[str, tuple[Callable[[], Any], int, str]] = {
    "no sound": (lambda: b"<html>hello</html>", 415, "cannot be read as audio"),
    "nothing": (lambda: b"", 415, "cannot be read as audio"),
    "cut header": (lambda: encoded(sound())[:30], 415, "The file"),
    "NaN": (with_nan, 415, "NaN"),
    "far beyond full scale": (too_loud, 422, "too loud to be sound"),
    "too long": (lambda: encoded(np.zeros(31 * RATE), "FLAC"), 422, "longer than the 30 s"),
    "a long silence": (lambda: encoded(np.zeros(1800 * RATE), "FLAC"), 422, "longer than the 30 s"),
    "too large": (lambda: bytes(500_001), 413, "larger than the 0.5 MB"),
    "too large, unannounced": (unannounced, 413, "larger than the 0.5 MB"),
}


@pytest.mark.parametrize("which", list(REFUSED))
def test_what_is_refused(client: Client, uploads: Path, which: str) -> None:
    content, status, message = REFUSED[which]
    response = post(client, content())
    assert response.status_code == status
    assert message in response.json()["detail"]
    assert str(uploads) not in response.text
    assert list(uploads.iterdir()) == []
    assert post(client, encoded(sound(5))).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "multipart/form-data; boundary=x"}, 400),
        ({"Content-Type": "text/plain"}, 400),
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9000"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Content-Length": "9" * 5000}, 413),
        ({"Host": "elsewhere.example:8000"}, 403),
        ({"Host": ""}, 403),
        ({"Content-Length": "many"}, 413),
    ],
)
def test_what_other_sites_can_send(client: Client, headers: dict[str, str], status: int) -> None:
    response = post(client, encoded(sound(1)), **headers)
    assert response.status_code == status
    assert response.json()["detail"]


def test_a_foreign_host_does_not_even_see_the_page(client: Client) -> None:
    assert client.get("/", headers={"Host": "127.0.0.1.elsewhere.example"}).status_code == 403
    assert client.get("/about", headers={"Host": "elsewhere.example"}).status_code == 403


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
    with pytest.raises(serve.RefusedError, match="not served here"):
        serve.check_sender(host, None, "127.0.0.1")


def test_the_queue_is_bounded_and_one_is_tagged_at_a_time(tagger: Tagger, network: Levels, uploads: Path) -> None:
    app = serve.build_app(tagger, LIMITS)

    async def many() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=ADDRESS, timeout=60) as client:
            network.gate.clear()
            content, headers = encoded(sound(5)), {"Content-Type": serve.BODY}
            tasks = [asyncio.create_task(client.post("/tag", content=content, headers=headers)) for _ in range(5)]
            statuses = []
            for done in asyncio.as_completed(tasks):
                statuses.append((await done).status_code)
                if len(statuses) == 2:  # those that found no place are answered while the others wait
                    network.gate.set()
            statuses.append((await client.post("/tag", content=content, headers=headers)).status_code)
            return statuses

    assert asyncio.run(many()) == [503, 503, 200, 200, 200, 200]
    assert network.most_inside == 1
    assert list(uploads.iterdir()) == []


def test_an_upload_that_does_not_end_is_given_up(
    tagger: Tagger, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endless(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(serve, "UPLOAD_SECONDS", 0.01)
    monkeypatch.setattr(serve, "receive", endless)
    assert post(Client(serve.build_app(tagger, LIMITS)), b"").status_code == 408
    assert list(uploads.iterdir()) == []


def test_an_upload_that_breaks_off_frees_its_place(tagger: Tagger, uploads: Path) -> None:
    app = serve.build_app(tagger, serve.Limits(most_megabytes=1, most_seconds=9, most_waiting=0))
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
    assert post(Client(app), encoded(sound(5))).status_code == 200


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


def test_only_this_machine_by_default(served: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve", "--port", "0"]) == 0
    assert served["address"][0] == "127.0.0.1"
    printed = capsys.readouterr().err
    assert f"Open http://127.0.0.1:{served['address'][1]} " in printed
    assert "no password" not in printed
    assert Client(served["app"]).get("/about").json()["most_bytes"] == 100_000_000


def test_other_addresses_bring_a_warning(served: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve", "--host", "0.0.0.0", "--port", "0", "--most_seconds", "5"]) == 0
    assert served["address"][0] == "0.0.0.0"
    assert "no password" in capsys.readouterr().err


def test_a_port_that_is_taken(served: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main.main(["serve", "--port", str(port)]) == 2
    assert f"127.0.0.1 port {port} cannot be served" in capsys.readouterr().err
    assert not served


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "65536"], "cannot be served"),
        (["--most_seconds", "0"], "above 0"),
        (["--most_megabytes", "nan"], "above 0"),
        (["--most_waiting", "-1"], "0 or more"),
    ],
)
def test_mistakes_are_told(
    words: list[str], message: str, served: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["serve", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["fastapi", "uvicorn"])
def test_what_to_install(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main.main(["serve"]) == 2
    assert "pip install fastapi uvicorn" in capsys.readouterr().err
