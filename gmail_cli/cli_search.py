"""``gmail search`` and ``gmail serve``: thin, over :mod:`gmail_cli.stages.search`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmail_cli.cli_common import count, say
from gmail_cli.errors import InputError, SetupError, UsageError

if TYPE_CHECKING:
    from gmail_cli.stages.search import Searcher

app = typer.Typer(rich_markup_mode=None)


class Flow(str, Enum):
    """What images are, and so which encoder they go through."""

    REAL = "real"
    GENERATED = "generated"


IndexArgument = Annotated[Path, typer.Argument(metavar="INDEX", help="Index artifact.")]
AlignedOption = Annotated[
    Path | None,
    typer.Option("--aligned", metavar="ARTIFACT", help="Align artifact with f_g; default: the one of the embeddings."),
]


@app.command()
def search(
    index: IndexArgument,
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="What to look for, in words.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Look for what is like this image.")] = None,
    flow: Annotated[
        Flow, typer.Option(help="What --image is: a photograph goes through f_r, a generated image through f_g.")
    ] = Flow.REAL,
    k: Annotated[int, typer.Option("--top", "-k", parser=count, metavar="K", help="How many.")] = 10,
    table: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which index of the artifact; default: test-images.")
    ] = None,
    aligned: AlignedOption = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with thumbnails.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Search an index with a text query or an image; prints the top k with scores."""
    from gmail_cli.stages.search import said

    if (query is None) == (image is None):
        hint = 'Give a query, "a red car on snow", or --image FILE.'
        raise UsageError("words or an image to look for are needed, and not both", hint=hint)
    searcher = _open(index, aligned)
    if image is not None:
        try:
            data = image.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read --image {image}: {error.strerror}", hint="Give an image file.") from error
        found = searcher.image(data, k=k, table=table, flow=flow.value, name=str(image))
    else:
        found = searcher.text(query or "", k=k, table=table)
    if html is not None:
        page = searcher.page(found)
        try:
            html.write_text(page, encoding="utf-8")
        except OSError as error:
            hint = "Name a file in a folder that exists and can be written."
            raise SetupError(f"cannot write --html {html}: {error.strerror}", hint=hint) from error
        say(f"page: {html}")
    if as_json:
        typer.echo(json.dumps({"query": found.query, "table": found.table, "hits": found.hits}, ensure_ascii=False))
        return
    for rank, hit in enumerate(found.hits, 1):
        typer.echo(f"{rank}\t{hit['score']:.4f}\t{hit['id']}\t{said(hit)}".rstrip())


@app.command()
def serve(
    index: IndexArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's are asked for.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    aligned: AlignedOption = None,
) -> None:
    """Serve an index as a local web page and JSON API, for words and images; prints its address; Ctrl-C ends it."""
    from gmail_cli.components.web import Server

    searcher = _open(index, aligned)
    title = f"{searcher.artifact.path.parents[1].name}, index {searcher.artifact.digest[:12]}"
    with Server(searcher, title=title, host=host, port=port) as server:
        if not server.is_local:
            say(f"warning: everyone who reaches {host} can search and see these images")
        typer.echo(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")


def _open(index: Path, aligned: Path | None) -> Searcher:
    from gmail_cli.artifacts import Artifact
    from gmail_cli.stages.search import Searcher

    return Searcher(Artifact.load(index), aligned=None if aligned is None else Artifact.load(aligned))
