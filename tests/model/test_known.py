"""Known names: their files are fetched whole or not at all, and what cannot be fetched says what to do by hand."""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

import main
from data import files
from model import registry
from model.checkpoint import read_checkpoint
from settings import UserError
from tests.helpers import forkserver, refused, save_network

CONTENT = bytes(range(256)) * 1000
WRONG = "0" * 64


class Handler(BaseHTTPRequestHandler):
    """Answers /NAME as NAME says; counts the requests, and what of `broken` is served whole from the third one on."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.asked[self.path] += 1
        case = self.path.split("/")[1]
        page, cut = case == "page", case == "broken" and server.asked[self.path] <= 2
        self.send_response(404 if case == "missing" else 200)
        self.send_header("Content-Type", "text/html" if page else "application/octet-stream")
        if case != "unsaid":
            self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        if case == "stalled":
            self.wfile.flush()
            server.ended.wait()
        with suppress(OSError):  # of a request for the headers alone
            self.wfile.write(server.content[: len(server.content) // 2 if cut else None])

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.asked, self.ended = CONTENT, Counter[str](), Event()
        self.address = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


def know(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, **more: Any) -> Path:
    """Make `case` the only known name, with an address of the server; returns the place of its file."""
    entry = {
        "files": [f"{case}.pt"], "address": f"{server.address}/{case}", "settings": {"dataset_type": "audioset"},
        "about": "bytes", "source": "a test", "licence": "MIT", **more,
    }  # fmt: skip
    (tmp_path / "known.json").write_text(json.dumps({"names": {case: entry}}))
    monkeypatch.setattr(registry, "KNOWN", tmp_path / "known.json")
    monkeypatch.setenv("HTSAT_CHECKPOINTS", str(tmp_path / "cache"))
    return tmp_path / "cache" / f"{case}.pt"


@pytest.mark.parametrize("case", ["whole", "unsaid"])
def test_a_file_is_fetched_once(
    case: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the size in the answer and without it; what a killed process has left is removed."""
    file = know(server, tmp_path, monkeypatch, case, sha256=hashlib.sha256(CONTENT).hexdigest())
    file.parent.mkdir()
    file.with_name(f"{file.name}.0123abcd.partial").touch()
    file.with_name(f"{file.name}.0123abcd.partial.{'0123456789abcdef' * 2}.partial").touch()
    for _ in range(2):
        assert registry.find_checkpoint(case) == (file, {"dataset_type": "audioset"})
    assert (file.read_bytes(), server.asked[f"/{case}"]) == (CONTENT, 2)  # the headers, then the file
    assert list(file.parent.iterdir()) == [file]
    assert capsys.readouterr().err.count("MIT") == 1


@pytest.mark.parametrize(
    ("case", "more", "reason"),
    [
        ("broken", {}, "128000 of 256000"),
        ("whole", {"sha256": WRONG}, WRONG),
        ("page", {}, "page"),
        ("missing", {}, "404"),
        ("stalled", {}, "timed out"),
        ("refused", {"address": "http://127.0.0.1:9/refused"}, "refused"),
    ],
)
def test_what_is_not_the_file_is_not_kept(
    case: str, more: dict[str, str], reason: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = know(server, tmp_path, monkeypatch, case, **more)
    if case == "stalled":
        monkeypatch.setattr(files, "PATIENCE", 0.2)
    with pytest.raises(UserError) as caught:
        registry.find_checkpoint(case)
    address = more.get("address", f"{server.address}/{case}")
    for named in (reason, address, file.name, str(file.parent), "HTSAT_CHECKPOINTS"):
        assert named in str(caught.value)
    assert not list(file.parent.iterdir())
    if case == "broken":  # it is begun anew
        assert registry.find_checkpoint(case)[0].read_bytes() == CONTENT


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_full_disk(when: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = know(server, tmp_path, monkeypatch, "whole")
    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(CONTENT) - 1))
    else:

        def fill(_: str, path: str, **__: object) -> None:
            Path(path).write_bytes(CONTENT[:1000])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("torch.hub.download_url_to_file", fill)
    with pytest.raises(UserError, match=rf"(?s){re.escape(str(file))}.*[Nn]o space.*HTSAT_CHECKPOINTS"):
        registry.find_checkpoint("whole")
    assert not list(file.parent.iterdir())


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    know(server, tmp_path, monkeypatch, "whole").parent.write_text("a file")
    with pytest.raises(UserError, match=r"(?s)whole\.pt.*HTSAT_CHECKPOINTS"):
        registry.find_checkpoint("whole")


def fetch(known: Path, folder: Path) -> None:
    """In a process of its own; a fork server has the environment of its start, so the folder is handed over."""
    registry.KNOWN = known
    os.environ["HTSAT_CHECKPOINTS"] = str(folder)
    assert registry.find_checkpoint("whole")[0].read_bytes() == CONTENT


@pytest.mark.slow
def test_two_processes_fetch_it_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a training on several GPUs: the second waits for the first."""
    file = know(server, tmp_path, monkeypatch, "whole")
    processes = [forkserver().Process(target=fetch, args=(registry.KNOWN, file.parent)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert server.asked["/whole"] == 2
    assert list(file.parent.iterdir()) == [file]


def test_a_misspelt_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="htsat-audioset"):
        read_checkpoint("htsat-audiset")
    assert "htsat-esc50" in refused(capsys, "predict", "--resume_checkpoint", "htsat-esc-50", "a.wav")
    with pytest.raises(UserError, match=r"best\.ckpt"):
        read_checkpoint("best.ckpt")


def test_every_entry_can_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its address has the file's name or is one of a service that gives it; its file is found where it lies."""
    monkeypatch.setenv("HTSAT_CHECKPOINTS", str(tmp_path))
    entries = json.loads(registry.KNOWN.read_text())["names"]
    services = ("drive.usercontent.google.com", "www.dropbox.com")
    for name, entry in entries.items():
        address = urlparse(entry.get("address", f"https:///{entry['files'][0]}"))
        assert address.scheme == "https", name
        assert address.hostname in services or unquote(address.path).endswith(f"/{entry['files'][0]}"), name
        assert entry["licence"], name
        for file in entry["files"]:
            (tmp_path / file).touch()
            assert registry.find_checkpoint(name) == (tmp_path / file, entry["settings"])
            (tmp_path / file).unlink()
    files = Counter(file for entry in entries.values() for file in entry["files"])
    assert set(files.values()) == {1}


@pytest.mark.slow
def test_every_command_takes_a_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each fetches the file by itself; what most of them then lack are data."""
    server.content = save_network(tmp_path / "tiny.ckpt").read_bytes()
    file = know(server, tmp_path, monkeypatch, "whole", settings={"dataset_type": "demo"})
    monkeypatch.chdir(tmp_path)
    data = ["--dataset_path", "nowhere"]
    cases: dict[str, tuple[list[str], int, str]] = {  # words, exit status, what is said
        **dict.fromkeys(("train", "test", "calibrate", "teach", "esm_test"), (data, 2, "nowhere")),
        "predict": (["absent.wav"], 1, "absent.wav"),
        "export": (["--formats", "safetensors", "--clips", "1"], 0, "workspace/runs/whole/export/export.json"),
    }
    for command, (words, status, said) in cases.items():
        flag = "--esm_model_pathes" if command == "esm_test" else "--resume_checkpoint"
        assert main.main([command, *words, "--accelerator", "cpu", flag, "whole"]) == status, command
        printed = capsys.readouterr()
        assert said in printed.out + printed.err, command
        assert file.read_bytes() == server.content, command
        file.unlink()
