"""Checkpoints on the Hugging Face hub, which a server on this machine stands for."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
from models.checkpoints import BIN, SAFE, describe, found, save, weights

from optima_fast.errors import UserError
from optima_fast.models import pretrained


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that a download needs."""

    files: dict[str, bytes]  # "org/name/resolve/revision/file"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.strip("/").partition("?")[0]
        repository = path.partition("/resolve/")[0]
        revision = path.rpartition("/")[0]
        body, code = self.files.get(path, b""), 200
        if path not in self.files:
            code = 404
        self.send_response(code)
        if code == 404:
            error = "EntryNotFound"
            if not any(name.startswith(f"{repository}/") for name in self.files):
                error = "RepoNotFound"
            elif not any(name.startswith(f"{revision}/") for name in self.files):
                error = "RevisionNotFound"
            self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", hashlib.sha1(revision.encode()).hexdigest())
        self.send_header("ETag", f'"{hash(body):x}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    describe(tmp_path, mean=[0.5, 0.5, 0.5])
    description = (tmp_path / "open_clip_config.json").read_bytes()
    pickled, safe = (save(tmp_path / file).read_bytes() for file in (BIN, SAFE))
    files = {
        "some/coca/resolve/main/open_clip_config.json": description,
        f"some/coca/resolve/main/{BIN}": pickled,
        "some/coca/resolve/v2/open_clip_config.json": description,
        f"some/coca/resolve/v2/{SAFE}": safe,
        "some/text/resolve/main/README.md": b"",
        f"some/cut/resolve/main/{SAFE}": safe[:5000],
    }
    handler = type("Files", (Hub,), {"files": files})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def hub(**environment: str) -> Iterator[None]:
    """A fresh import of the client, which reads the environment then, while it lasts."""

    def taken() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]
        return {name: sys.modules.pop(name) for name in names}

    before = taken()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            yield
        finally:
            sys.modules["huggingface_hub"].close_session()
            taken()
            sys.modules |= before


def test_the_hub(endpoint: str, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    scale = weights()["logit_scale"].item()

    def assert_main(file: str, name: str) -> None:
        checkpoint = found(name)
        assert checkpoint.path.name == file
        assert checkpoint.mean == (0.5, 0.5, 0.5)
        assert checkpoint.load().logit_scale.item() == scale

    with hub(**environment, HF_HUB_OFFLINE="0"):
        assert_main(BIN, "hf-hub:some/coca")
        assert_main(SAFE, "hf-hub:some/coca@v2")
        for name, message in (
            ("some/coca@v3", "some/coca has no revision 'v3'"),
            ("some/other", "the Hugging Face hub has no such model"),
            ("some/text", f"hf-hub:some/text is no open_clip checkpoint: none of {SAFE}"),
            ("a b/c", "it must be hf-hub:ORG/NAME"),
            ("some/cut", "is damaged or no checkpoint"),
        ):
            with pytest.raises(UserError, match=message):
                pretrained.find(f"hf-hub:{name}")
    with hub(**environment, HF_HUB_OFFLINE="1"):
        assert_main(BIN, "hf-hub:some/coca")
        with pytest.raises(UserError, match="the hub cannot be reached and its cache here does n"):
            pretrained.find("hf-hub:some/new")


def test_no_network_is_noticed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries again for long before it gives up; the other files are not tried."""
    calls = []

    def download(
        repository: str, file: str, *, revision: str | None, local_files_only: bool
    ) -> str:
        calls.append((repository, file, revision, local_files_only))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match="HF_ENDPOINT to a mirror, or give a folder"):
        pretrained.find("hf-hub:org/name@rev")
    assert calls[0] == ("org/name", "open_clip_config.json", "rev", False)
    assert [call[3] for call in calls[1:]] == [True] * 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"\(\[Errno 28\] No space left on device\)"),
        (EOFError("connection lost"), r"\(connection lost\)"),
        (EOFError(), r"\(EOFError\)"),
    ],
)
def test_a_download_that_fails(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=f"^hf-hub:org/name: cannot download it {message}"):
        pretrained.find("hf-hub:org/name")
