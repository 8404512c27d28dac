"""A small local web page and JSON API over something that finds images: standard library only, no script in the page.

    GET  /                          page; ?q=WORDS&k=K&table=NAME searches
    POST /                          page; multipart form with an image
    GET  /api                       what is indexed
    GET  /api/search?q=WORDS&k=K&table=NAME
    POST /api/search?k=K&table=NAME&flow=real|generated     the body is the encoded image
    GET  /thumbnail/TABLE/ROW       JPEG

Nothing of a request becomes a path: images are named by table and row. A server on the loopback address answers only
requests addressed to it by a loopback name, so that no other site's page can read it.
"""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Protocol
from urllib.parse import parse_qs, quote, unquote, urlsplit

from gmail_cli.components import report
from gmail_cli.errors import GmailError, InputError, SetupError, UsageError

MOST_HITS = 100
"""Largest k."""
MOST_BYTES = 16 * 1024 * 1024
"""Largest body of a request."""
MOST_CHARACTERS = 1000
"""Longest query."""
SECONDS = 30
"""How long a connection may stay silent."""

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_FLOWS = ("real", "generated")


class Search(Protocol):
    """What the server serves."""

    @property
    def tables(self) -> Mapping[str, Mapping[str, Any]]:
        """Table -> what is known of it: count, dim, kind, ..."""

    def table(self, name: str | None) -> str:
        """The table meant by a name, or the default one."""

    def text(self, query: str, *, k: int, table: str | None = None) -> Any:
        """Hits for words."""

    def image(self, data: bytes, *, k: int, table: str | None = None, flow: Any = "real", name: str = "") -> Any:
        """Hits for an encoded image."""

    def thumbnail(self, row: int, *, table: str | None = None) -> bytes | None:
        """A JPEG of a row's image."""


class Server(ThreadingHTTPServer):
    """Serves until it is shut down.

    Args:
        search: What answers queries; called from several threads.
        title: Shown on the page.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one, see ``url``.

    Raises:
        SetupError: The address cannot be listened on.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, search: Search, *, title: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self.search, self.title, self.host = search, title, host
        self.thumbnail = functools.lru_cache(maxsize=2000)(lambda table, row: search.thumbnail(row, table=table))
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            hint = "Choose another --port (0 takes a free one) or --host."
            raise SetupError(f"cannot listen on {host} port {port}: {error}", hint=hint) from error

    @property
    def url(self) -> str:
        """Where it listens."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{shown}:{self.server_address[1]}/"

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in ("127.0.0.1", "localhost", "::1")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no news; other errors are answered before they get here."""


@dataclass(frozen=True)
class _Query:
    """A request, checked."""

    words: str = ""
    k: int = 12
    table: str | None = None
    flow: str = "real"
    image: bytes | None = None
    name: str = "image"


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SECONDS
    server_version = "gmail"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    _routes: ClassVar[dict[tuple[str, str], str]] = {
        ("GET", ""): "_page",
        ("POST", ""): "_page",
        ("GET", "api"): "_about",
        ("GET", "api/search"): "_search",
        ("POST", "api/search"): "_search",
    }

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the standard library's
        """Requests are nobody's business but the user's."""

    # -- routes ----------------------------------------------------------------------------------------------------

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path.strip("/")
        as_json = path == "api" or path.startswith("api/")
        try:
            self._check_host()
            if path.startswith("thumbnail/") and method == "GET":
                self._thumbnail(path)
                return
            route: Callable[[], None] | None = getattr(self, self._routes.get((method, path), ""), None)
            if route is None:
                known = any(path == each for _, each in self._routes)
                status = HTTPStatus.METHOD_NOT_ALLOWED if known else HTTPStatus.NOT_FOUND
                raise _RefusedError(status, f"there is nothing at {method} /{path}")
            route()
        except _RefusedError as refused:
            self._fail(refused.status, str(refused), as_json=as_json)
        except (UsageError, InputError) as error:
            self._fail(HTTPStatus.BAD_REQUEST, str(error), as_json=as_json)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True
        except GmailError as error:
            self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), as_json=as_json)

    def _page(self) -> None:
        query = self._query()
        found = self._find(query) if query.words.strip() or query.image is not None else None
        self._send(self._html(query, found=found))

    def _about(self) -> None:
        shown = ("modality", "flow", "encoder", "kind", "count", "dim", "recall_at_10")
        tables = {name: {key: entry.get(key) for key in shown} for name, entry in self.server.search.tables.items()}
        self._send_json({"title": self.server.title, "tables": tables, "most_hits": MOST_HITS})

    def _search(self) -> None:
        query = self._query()
        if not query.words.strip() and query.image is None:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "give ?q=WORDS, or POST an image")
        found = self._find(query)
        hits = [
            {"rank": rank, **hit, "thumbnail": self._thumbnail_url(found.table, hit["row"])}
            for rank, hit in enumerate(found.hits, 1)
        ]
        self._send_json({"query": query.words or None, "table": found.table, "hits": hits})

    def _thumbnail(self, path: str) -> None:
        parts = [unquote(part) for part in path.split("/")]
        if len(parts) != 3 or parts[1] not in self.server.search.tables or not parts[2].isascii():
            raise _RefusedError(HTTPStatus.NOT_FOUND, "no such image")
        if not parts[2].isdecimal() or len(parts[2]) > 12:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "no such image")
        try:
            data = self.server.thumbnail(parts[1], int(parts[2]))
        except UsageError as error:
            raise _RefusedError(HTTPStatus.NOT_FOUND, error.message) from error
        if data is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "no image of that row is at hand")
        self._send(data, kind="image/jpeg", cache="private, max-age=3600")

    # -- requests --------------------------------------------------------------------------------------------------

    def _check_host(self) -> None:
        """Against pages of other sites whose name was made to resolve to this machine."""
        host = self.headers.get("Host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.server.is_local and name.lower() not in _LOOPBACK:
            raise _RefusedError(HTTPStatus.FORBIDDEN, f"this server does not answer to {host[:100]!r}")

    def _query(self) -> _Query:
        fields = {key: values[-1] for key, values in parse_qs(urlsplit(self.path).query).items()}
        image, name = None, "image"
        if self.command == "POST":
            body = self._body()
            kind = self.headers.get("Content-Type", "")
            if kind.startswith("multipart/form-data"):
                form, image, name = _form(body, kind)
                fields |= form
            else:
                image = body
            if not image:
                raise _RefusedError(HTTPStatus.BAD_REQUEST, "no image was sent: choose a file")
        words = fields.get("q", "")
        if len(words) > MOST_CHARACTERS:
            raise _RefusedError(
                HTTPStatus.BAD_REQUEST, f"the query has {len(words)} characters, at most {MOST_CHARACTERS}"
            )
        k = fields.get("k", "12")
        if not (k.isascii() and k.isdecimal() and len(k) < 6 and 1 <= int(k) <= MOST_HITS):
            raise _RefusedError(
                HTTPStatus.BAD_REQUEST, f"k is {k[:20]!r}, a whole number of 1 to {MOST_HITS} is needed"
            )
        flow = fields.get("flow", "real")
        if flow not in _FLOWS:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"flow is {flow[:20]!r}, allowed are {' and '.join(_FLOWS)}")
        return _Query("" if image else words, int(k), fields.get("table") or None, flow, image, name)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            self.close_connection = True
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        if len(length) > 12 or int(length) > MOST_BYTES:
            self.close_connection = True  # what follows was not read
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MOST_BYTES // 2**20} MiB can be sent")
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise ConnectionResetError
        return body

    def _find(self, query: _Query) -> Any:
        search = self.server.search
        if query.image is not None:
            return search.image(query.image, k=query.k, table=query.table, flow=query.flow, name=query.name)
        return search.text(query.words, k=query.k, table=query.table)

    # -- answers ---------------------------------------------------------------------------------------------------

    def _html(self, query: _Query, *, found: Any = None, error: str = "") -> bytes:
        search = self.server.search
        asked = query.table if query.table in search.tables else None
        table: str = found.table if found else search.table(asked)
        shown = None
        if query.image is not None and found:
            shown = report.thumbnail(query.image, side=160, name=query.name)
        page = report.serve_page(
            title=self.server.title,
            tables=search.tables,
            table=table,
            words=query.words,
            k=query.k,
            flow=query.flow,
            image=shown,
            hits=None if found is None else [(hit, self._thumbnail_url(table, hit["row"])) for hit in found.hits],
            error=error,
            most_hits=MOST_HITS,
        )
        return page.encode()

    @staticmethod
    def _thumbnail_url(table: str, row: int) -> str:
        return f"/thumbnail/{quote(table, safe='')}/{row}"

    def _fail(self, status: HTTPStatus, message: str, *, as_json: bool) -> None:
        if as_json:
            self._send_json({"error": message}, status=status)
        else:
            self._send(self._html(_Query(), error=message), status=status)

    def _send_json(self, value: Any, *, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value, ensure_ascii=False).encode(), kind="application/json", status=status)

    def _send(
        self,
        content: bytes,
        *,
        kind: str = "text/html; charset=utf-8",
        status: HTTPStatus = HTTPStatus.OK,
        cache: str = "no-store",
    ) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Cache-Control", cache),
            ("Content-Security-Policy", _POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _form(body: bytes, content_type: str) -> tuple[dict[str, str], bytes | None, str]:
    """The text fields, the file and the file's name of a multipart form."""
    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str) or not boundary:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "the form has no boundary")
    fields: dict[str, str] = {}
    image, name = None, "image"
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))[1:-1]:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        described = Message()
        for line in head.decode("utf-8", "replace").split("\r\n"):
            key, _, value = line.partition(":")
            if key.lower() == "content-disposition":
                described["Content-Disposition"] = value.strip()
        field = described.get_param("name", header="content-disposition")
        if field == "image":
            image = content
            name = str(described.get_filename() or name)[-100:]
        elif isinstance(field, str):
            fields[field] = content.decode("utf-8", "replace")
    return fields, image, name
