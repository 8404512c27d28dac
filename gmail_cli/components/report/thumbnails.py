"""Images as small as a page shows them."""

from __future__ import annotations

import io

from gmail_cli.components.images import decode


def thumbnail(data: bytes, *, side: int, name: str = "image") -> bytes:
    """An encoded image as a JPEG whose longest side is at most ``side`` pixels; smaller images keep their size.

    Raises:
        InputError: The bytes are no image.
    """
    image = decode(data, name=name)
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=82, optimize=True)
    return stream.getvalue()
