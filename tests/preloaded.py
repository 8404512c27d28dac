"""A `gmail` that starts at once: one process imports the heavy libraries and forks for every command.

The pages of the docs run some hundred commands, and importing torch and its friends takes each of them longer than its
work. What runs is the real entry point in a process of its own, with the caller's arguments, folder, variables and
standard streams.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

CLIENT = """#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    told = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(told).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(told)
    sys.exit(server.recv(1)[0])
"""


@contextlib.contextmanager
def preloaded(program: Path, *, environment: Mapping[str, str]) -> Iterator[None]:
    """Replace ``program`` by one that asks a process with all imports done, until the end of the block."""
    address = program.with_name("gmail.socket")
    server = subprocess.Popen([sys.executable, __file__, str(address)], env={**os.environ, **environment})
    try:
        while not address.exists():
            assert server.poll() is None, "the process that imports ahead has died"
            time.sleep(0.05)
        program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
        program.chmod(0o755)
        yield
    finally:
        server.kill()
        server.wait()


def serve(address: Path) -> None:
    """Fork for every caller."""
    import signal

    import diffusers  # noqa: F401 - imported so that commands need not
    import faiss  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import open_clip  # noqa: F401
    import peft  # noqa: F401
    import pycocotools.coco  # noqa: F401
    import transformers  # noqa: F401

    import gmail_cli.components.diffusion
    import gmail_cli.components.heads
    import gmail_cli.stages.evaluate  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address.with_suffix(".new")))
        listening.listen()
        address.with_suffix(".new").rename(address)
        while True:
            caller, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                answer(caller)
            caller.close()


def answer(caller: socket.socket) -> None:
    """Run one command as the caller; never returns."""
    import signal

    from gmail_cli.cli import main

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(caller, 4, 3)
    told = b""
    while len(told) < int.from_bytes(size, "big"):
        told += caller.recv(1 << 20)
    arguments, folder, variables = json.loads(told)
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["gmail", *arguments]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except Exception:  # noqa: BLE001 - printed as an interpreter would
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        caller.send(bytes([code & 255]))
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
