"""Searching an index with words and images, on the command line, over real HTTP and in a real browser."""

from __future__ import annotations

import http.client
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import torch
from PIL import Image
from test_cli import ROOT, gmail, shell_environment

from gmail_cli.artifacts import Artifact, StageKey, Workspace
from gmail_cli.components import web
from gmail_cli.components.clip_files import load_clip, save_clip
from gmail_cli.errors import InputError, SetupError, UsageError
from gmail_cli.profile import build
from gmail_cli.stages import embed, index
from gmail_cli.stages.search import Searcher

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    profile = build({"data": {"test_limit": 40}, "index": {"texts": True}})
    workspace = Workspace(tmp_path_factory.mktemp("serve") / "runs", "small")
    return index.run(profile, workspace, embeddings=embed.run(profile, workspace))


@pytest.fixture(scope="module")
def searcher(made: Artifact) -> Searcher:
    return Searcher(made)


@pytest.fixture(scope="module")
def server(searcher: Searcher) -> Iterator[web.Server]:
    with web.Server(searcher, title=f"small {HOSTILE}") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def photo(searcher: Searcher) -> bytes:
    dataset, _ = searcher._datasets()[0]
    return dataset.image_bytes(7)


def ask(
    server: web.Server,
    target: str,
    *,
    method: str = "GET",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    try:
        connection.request(method, target, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def form(photo: bytes, **fields: str) -> tuple[bytes, dict[str, str]]:
    parts = [
        f'--xyz\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields.items()
    ]
    head = '--xyz\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = "".join(parts).encode() + head.encode() + photo + b"\r\n--xyz--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=xyz"}


# -- searching --------------------------------------------------------------------------------------------------------


def test_an_image_of_the_index_finds_itself(searcher: Searcher, photo: bytes) -> None:
    found = searcher.image(photo, k=3)
    assert found.hits[0]["row"] == 7
    assert found.hits[0]["score"] == pytest.approx(1.0, abs=1e-4)
    words = searcher.text("a red ball", k=40)
    assert [hit["score"] for hit in words.hits] == sorted((hit["score"] for hit in words.hits), reverse=True)


def test_an_image_finds_texts_too(searcher: Searcher, photo: bytes) -> None:
    found = searcher.image(photo, k=5, table="test-texts")
    assert found.table == "test-texts"
    assert all(hit["text"] for hit in found.hits)
    assert searcher.thumbnail(found.hits[0]["row"], table="test-texts") is not None  # of the image the text is about


def test_generated_images_go_through_the_aligned_tower(
    made: Artifact, searcher: Searcher, photo: bytes, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"f_g for test-images is not in the index's run\nName the align artifact"):
        searcher.image(photo, k=3, flow="generated")
    clip = load_clip("tiny")
    space = clip.digest
    with torch.no_grad():  # a tower that puts every image opposite to where f_r does
        clip.model.visual.attnpool.c_proj.weight.neg_()
        clip.model.visual.attnpool.c_proj.bias.neg_()
    artifacts = {}
    for name, digest in (("own", space), ("other", "0" * 64)):
        key = StageKey(stage="align", settings={"name": name}, models={"clip": digest})
        with Workspace(tmp_path / "runs", "other").open(key) as slot:
            slot.write_folder("clip", lambda folder: save_clip(clip, folder))
            artifacts[name] = slot.commit(summary={})
    turned = Searcher(made, aligned=artifacts["own"])
    hits = turned.image(photo, k=40, flow="generated").hits
    assert hits[-1]["row"] == 7
    assert hits[-1]["score"] == pytest.approx(-1.0, abs=1e-4)
    assert turned.image(photo, k=1).hits[0]["row"] == 7
    with pytest.raises(InputError, match="tuned a CLIP of digest 000000000000, test-images lives in the space of"):
        Searcher(made, aligned=artifacts["other"]).image(photo, k=3, flow="generated")
    with pytest.raises(InputError, match="was made by `gmail index`"):
        Searcher(made, aligned=made).image(photo, k=3, flow="generated")


def test_what_cannot_be_searched_is_refused(searcher: Searcher) -> None:
    with pytest.raises(UsageError, match="the query '  ' is empty"):
        searcher.text("  ", k=1)
    with pytest.raises(InputError, match="cannot decode the image"):
        searcher.image(b"no image", k=1)
    with pytest.raises(UsageError, match="test-images has no row 40"):
        searcher.thumbnail(40)
    with pytest.raises(UsageError, match="no row -1"):
        searcher.thumbnail(-1)


def test_the_command_takes_words_or_an_image(made: Artifact, photo: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(photo)
    by_image = gmail("search", str(made.path), "--image", "photo.png", "-k", "2", "--json", cwd=tmp_path)
    assert by_image.returncode == 0, by_image.stderr
    answer = json.loads(by_image.stdout)
    assert answer["query"] == "photo.png"
    assert answer["hits"][0]["row"] == 7
    for arguments in ((), ("a ball", "--image", "photo.png")):
        refused = gmail("search", str(made.path), *arguments, cwd=tmp_path)
        assert refused.returncode == 2
        assert "words or an image to look for are needed, and not both" in refused.stderr
    missing = gmail("search", str(made.path), "--image", "nowhere.png", cwd=tmp_path)
    assert missing.returncode == 3
    assert "cannot read --image nowhere.png: No such file" in missing.stderr


# -- over HTTP --------------------------------------------------------------------------------------------------------


def test_words_find_the_same_over_http(server: web.Server, searcher: Searcher) -> None:
    status, headers, body = ask(server, f"/api/search?q={quote('a red ball')}&k=5")
    answer = json.loads(body)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    expected = searcher.text("a red ball", k=5).hits
    assert [(hit["row"], hit["score"]) for hit in answer["hits"]] == [(hit["row"], hit["score"]) for hit in expected]
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3, 4, 5]
    status, _, body = ask(server, "/api")
    assert status == 200
    assert (
        json.loads(body)["tables"]["test-images"] | {"count": 40, "kind": "flat"}
        == json.loads(body)["tables"]["test-images"]
    )


def test_the_page_shows_hits_escapes_everything_and_holds_no_script(server: web.Server) -> None:
    status, headers, body = ask(server, f"/?q={quote(HOSTILE)}&k=9")
    page = body.decode()
    assert status == 200
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3  # title, heading, field
    assert page.count("/thumbnail/test-images/") == 9
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_an_image_is_searched_by_form_and_by_api(server: web.Server, photo: bytes) -> None:
    body, headers = form(photo, k="4", table="test-images", flow="real")
    status, _, page = ask(server, "/", method="POST", body=body, headers=headers)
    assert status == 200
    assert re.findall(r"/thumbnail/test-images/(\d+)", page.decode())[0] == "7"
    assert page.count(b"/thumbnail/test-images/") == 4
    assert b"data:image/jpeg;base64," in page
    status, _, found = ask(server, "/api/search?k=2", method="POST", body=photo, headers={"Content-Type": "image/png"})
    assert status == 200
    assert json.loads(found)["hits"][0]["row"] == 7


def test_binary_forms_keep_every_byte() -> None:
    content = bytes(range(256)) * 3 + b"\r\n--xy\r\n\r\n--"
    body, headers = form(content, k="4")
    assert web._form(body, headers["Content-Type"]) == ({"k": "4"}, content, "a.png")


def test_thumbnails_are_named_by_row_and_nothing_else(server: web.Server) -> None:
    status, headers, body = ask(server, "/thumbnail/test-images/7")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert max(Image.open(io.BytesIO(body)).size) <= 160
    for path in (
        "test-images/40",
        "test-images/-1",
        "test-images/99999999999999999999",
        "test-images/%D9%A1",
        "test-images/7/..",
        "test-images/..%2F..%2Findex.json",
        "..%2F..%2Fetc%2Fpasswd",
        "%2Fetc/passwd",
        "../../../../etc/passwd",
        "nowhere/1",
        "test-images",
    ):
        status, _, body = ask(server, f"/thumbnail/{path}")
        assert status == 404, path
        assert b"root:" not in body


@pytest.mark.parametrize(
    ("target", "status", "message"),
    [
        ("/api/search?q=x&k=0", 400, "k is '0', a whole number of 1 to 100 is needed"),
        ("/api/search?q=x&k=101", 400, "k is '101'"),
        ("/api/search?q=x&k=1e9", 400, "k is '1e9'"),
        ("/api/search?q=x&k=%D9%A3", 400, "k is '٣'"),
        (f"/api/search?q={'x' * 1001}", 400, "the query has 1001 characters, at most 1000"),
        ("/api/search", 400, "give ?q=WORDS, or POST an image"),
        ("/api/search?q=x&table=photos", 400, "the index has no table 'photos'"),
        ("/api/search?q=x&flow=sideways", 400, "flow is 'sideways', allowed are real and generated"),
        ("/api/nothing", 404, "there is nothing at GET /api/nothing"),
    ],
)
def test_wrong_requests_are_told_why(server: web.Server, target: str, status: int, message: str) -> None:
    found = ask(server, target)
    assert found[0] == status
    assert message in json.loads(found[2])["error"]


def test_wrong_bodies_are_told_why(server: web.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, body = ask(server, "/api/search", method="POST", body=b"no image")
    assert status == 400
    assert "cannot decode image" in json.loads(body)["error"]
    status, _, body = ask(server, "/api/search", method="POST", body=b"")
    assert (status, json.loads(body)["error"]) == (400, "no image was sent: choose a file")
    status, _, body = ask(server, "/api", method="POST", body=b"x")
    assert status == 405
    monkeypatch.setattr(web, "MOST_BYTES", 1000)
    status, headers, body = ask(server, "/", method="POST", body=b"x" * 1001)
    assert (status, headers["Connection"]) == (413, "close")
    assert b"can be sent" in body
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.putrequest("POST", "/api/search")
    connection.endheaders()
    with connection.getresponse() as answer:
        assert answer.status == 411
    connection.close()


def test_other_sites_cannot_read_a_local_server(server: web.Server) -> None:
    for host, expected in (("evil.example", 403), ("127.0.0.1:1", 200), ("localhost", 200), ("", 403)):
        assert ask(server, "/api", headers={"Host": host})[0] == expected, host


def test_many_ask_at_once(server: web.Server) -> None:
    words = ["a red ball", "a blue cube", "snow", "a tree"] * 4
    alone = {each: ask(server, f"/api/search?q={quote(each)}&k=5")[2] for each in {*words}}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda each: ask(server, f"/api/search?q={quote(each)}&k=5")[2], words))
    assert answers == [alone[each] for each in words]


def test_a_port_that_is_taken_is_named(server: web.Server, searcher: Searcher) -> None:
    port = server.server_address[1]
    with pytest.raises(SetupError, match=f"cannot listen on 127.0.0.1 port {port}"):
        web.Server(searcher, title="second", port=port)


def _listen_to_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_command_serves_until_it_is_interrupted(made: Artifact, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gmail_cli.cli", "serve", str(made.path), "--port", "0"]
    environment = {**shell_environment(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
        preexec_fn=_listen_to_interrupts,  # noqa: PLW1509 - no threads yet
    ) as process:
        assert process.stdout is not None
        url = urlsplit(process.stdout.readline().strip())
        assert url.hostname == "127.0.0.1"
        connection = http.client.HTTPConnection(url.netloc, timeout=60)
        connection.request("GET", "/api")
        assert json.loads(connection.getresponse().read())["tables"]["test-images"]["count"] == 40
        connection.close()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == "stopped\n"


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page is tested over HTTP only")
def test_a_browser_shows_the_hits(server: web.Server, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    server.thumbnail.cache_clear()
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'browser'}",
            "--window-size=1100,1300",
            "--virtual-time-budget=10000",
            f"--screenshot={picture}",
            f"{server.url}?q={quote('a red ball on the grass')}&k=9",
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert server.thumbnail.cache_info().currsize == 9, "the policy or the markup kept the browser from the images"
    with Image.open(picture) as shown:
        colours = shown.convert("RGB").crop((0, 420, 1100, 1300)).quantize(64).getcolors()
    assert colours is not None
    assert len(colours) > 30
