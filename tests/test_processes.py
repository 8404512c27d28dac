"""Several processes of one machine that draw together."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import small_pipelines

from gmail_cli import cli, cli_run, processes
from gmail_cli.artifacts import Artifact, Workspace
from gmail_cli.profile import build
from gmail_cli.stages import generate

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def test_processes_draw_together_what_one_would_have_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("".join(f"a cat and {row} dogs\n" for row in range(65)))  # two shards
    small_pipelines.save("sd1", tmp_path / "sd1")
    chosen = {"model": "sd1", "steps": 1, "guidance": 1.0, "batch_size": 64, "per_caption": 4}
    expected = generate.run(build({"data": {"train": "captions.txt"}, "generate": chosen}), Workspace(tmp_path / "one"))
    options = [f"--set=generate.{key}={value}" for key, value in chosen.items()]
    words = ["gmail", "generate", "--captions", "captions.txt", *options, "--processes", "2"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = capsys.readouterr()
    assert not stopped.value.code, told.err
    assert Artifact.load(Path(told.out.strip())).content == expected.content
    assert {number for number in "12" if f"[{number}/2] generate: " in told.err} == {"1", "2"}


def test_parts_of_parts_and_the_options_that_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(processes, "together", lambda arguments, **_: asked.extend(arguments))
    monkeypatch.setattr(cli_run, "run_stage", lambda *_, **__: None)
    monkeypatch.setattr("sys.argv", ["gmail", "generate", "--shard=2/3", "-s", "seed=4", "--processes", "2", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert asked == [["generate", "-s", "seed=4", "--json", "--shard", part] for part in ("3/6", "4/6")]


def test_each_process_has_a_gpu_and_what_it_says_has_its_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for the command shows what the processes are given."""
    package = tmp_path / "gmail_cli"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(
        "import os, signal, sys, time\n"
        "say = lambda text: print(text, file=sys.stderr, flush=True)\n"
        "say('on ' + os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "say(f'generate: {sys.argv[1]}/10')\n"
        "if len(sys.argv) > 3:\n"
        "    def stop(*_):\n        say('finishing')\n        sys.exit(130)\n"
        "    signal.signal(signal.SIGINT, stop)\n"
        "    say('ready')\n"
        "    time.sleep(60)\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    said: list[str] = []
    at: list[tuple[int, int]] = []
    processes.together([["1", "0"], ["2", "0"], ["3", "0"]], tell=said.append, progress=lambda *now: at.append(now))
    assert sorted(said) == ["[1/3] on 4", "[2/3] on 7", "[3/3] on 4"]
    assert at[-1] == (6, 30)
    with pytest.raises(processes.PartError, match="process 2 of 3 ended with 3, and 1 more") as failed:
        processes.together([["1", "0"], ["1", "3"], ["1", "4"]], tell=said.append)
    assert failed.value.exit_code == 3

    ready = threading.Semaphore(0)

    def tell(line: str) -> None:
        said.append(line)
        if line.endswith("ready"):
            ready.release()

    def interrupt() -> None:
        ready.acquire()
        ready.acquire()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    said.clear()
    with pytest.raises(KeyboardInterrupt):
        processes.together([["1", "0", "wait"], ["1", "0", "wait"]], tell=tell)
    assert {"[1/2] finishing", "[2/2] finishing"} <= set(said)
