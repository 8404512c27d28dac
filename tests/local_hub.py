"""A model hub on this machine: folders served over the protocol that huggingface_hub speaks.

Of the protocol: what a repository holds at a revision (``/api/models/<repo>/revision/<revision>`` and ``/tree/``), and
its files (``/<repo>/resolve/<revision>/<file>``) with the headers that the client's cache goes by.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """A hub that is up.

    Attributes:
        url: Where.
        served: Files that were fetched, as ``repo@commit/file``.
    """

    url: str = ""
    served: list[str] = field(default_factory=list)


def commit_of(folder: Path) -> str:
    """A commit id (40 hex digits) that follows from a folder's content."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name in _files(folder):
        digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def local_hub(repositories: Mapping[str, Path], *, gated: Mapping[str, str] | None = None) -> Iterator[Hub]:
    """Serve folders as repositories, each at one commit (`commit_of`) and as ``main``.

    Args:
        repositories: Folder of each.
        gated: The token that is let in, of repositories whose files are not for everybody; what they hold is.
    """
    hub = Hub()
    commits = {name: commit_of(folder) for name, folder in repositories.items()}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.describe("/".join(parts[2:4]), parts[4:])
            elif len(parts) > 4 and parts[2] == "resolve":
                self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self.answer(404)

        def describe(self, repository: str, asked: list[str]) -> None:
            revision = asked[1] if len(asked) > 1 else "main"
            if not self.known(repository, revision):
                return
            folder = repositories[repository]
            if asked[:1] == ["tree"]:
                rows = [
                    {"type": "file", "path": name, "oid": commits[repository], "size": (folder / name).stat().st_size}
                    for name in _files(folder)
                    if name.startswith("/".join(asked[2:]))
                ]
                self.answer(200, json.dumps(rows).encode())
                return
            about = {
                "id": repository,
                "modelId": repository,
                "sha": commits[repository],
                "siblings": [{"rfilename": name} for name in _files(folder)],
            }
            self.answer(200, json.dumps(about).encode())

        def file(self, repository: str, revision: str, name: str) -> None:
            if not self.known(repository, revision) or not self.let_in(repository):
                return
            if name not in _files(repositories[repository]):
                self.answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commits[repository]})
                return
            content = (repositories[repository] / name).read_bytes()
            if self.command == "GET":
                hub.served.append(f"{repository}@{commits[repository]}/{name}")
            etag = hashlib.sha256(content).hexdigest()
            self.answer(200, content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": commits[repository]})

        def known(self, repository: str, revision: str) -> bool:
            if repository not in repositories:
                self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
                return False
            if revision not in {"main", commits[repository]}:
                self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
                return False
            return True

        def let_in(self, repository: str) -> bool:
            """As the hub: 401 without a token, 403 with one of a user who did not accept the terms."""
            token, told = (gated or {}).get(repository), self.headers.get("Authorization")
            if token is None or told == f"Bearer {token}":
                return True
            self.answer(403 if told else 401, headers={"X-Error-Code": "GatedRepo"})
            return False

        def answer(self, code: int, content: bytes = b"", *, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
