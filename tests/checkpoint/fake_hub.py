"""A hub on this machine: huggingface_hub's own client asks it over HTTP, with its own filters and its own cache."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """One repository, `someone/tiny`, of the files in a directory. fetched, tokens: what was asked for, and shown."""

    def __init__(self, directory: Path, gated: bool = False) -> None:
        self.directory, self.gated = directory, gated
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()

    def names(self) -> list[str]:
        found = (path for path in self.directory.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.directory).as_posix() for path in found)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._serve(with_body=False)

        def do_GET(self) -> None:
            self._serve(with_body=True)

        def log_message(self, *args: object) -> None:
            pass

        def _serve(self, with_body: bool) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            path = unquote(urlsplit(self.path).path).strip("/")
            if hub.gated and "/resolve/" in path:
                return self._send(403, b"gated", {"X-Error-Code": "GatedRepo"}, with_body)
            if not path.removeprefix("api/models/").startswith("someone/tiny"):
                return self._send(404, b"none", {"X-Error-Code": "RepoNotFound"}, with_body)
            if "/resolve/" in path:
                return self._file(path.partition("/resolve/")[2].partition("/")[2], with_body)
            rest = path.removeprefix("api/models/someone/tiny").strip("/")
            if rest.startswith("revision/") and rest != "revision/main" and COMMIT not in rest:
                return self._send(404, b"none", {"X-Error-Code": "RevisionNotFound"}, with_body)
            return self._send(200, json.dumps(self._listing(rest)).encode(), {}, with_body)

        def _listing(self, rest: str) -> object:
            if not rest.startswith("tree/"):
                siblings = [{"rfilename": name} for name in hub.names()]
                return {"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}
            sizes = {name: (hub.directory / name).stat().st_size for name in hub.names()}
            return [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]

        def _file(self, name: str, with_body: bool) -> None:
            if not (hub.directory / name).is_file():
                return self._send(404, b"none", {"X-Error-Code": "EntryNotFound"}, with_body)
            content = (hub.directory / name).read_bytes()
            if with_body:
                hub.fetched.append(name)
            etag = hashlib.sha256(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, with_body)

        def _send(self, code: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(code)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    return Handler


@contextmanager
def serving(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Inside, the hub client of this process is online and knows this hub alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        huggingface_hub.close_session()
