"""Every console block of the README and the docs runs as written, in reading order, in one folder of small inputs."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from preloaded import preloaded
from test_cli import ROOT, shell_environment

from gmail_cli import profile
from gmail_cli.components import captions
from gmail_cli.stages import train

GUIDES = ("captions", "generate", "million", "align", "train", "evaluate", "ci", "search", "scenes")
FIRST = ("README.md", "docs/getting-started.md", "docs/concepts.md", *(f"docs/guides/{name}.md" for name in GUIDES))
"""Pages in reading order; those of docs/ that are not named come after them."""

#: What cannot run here, and why. A block that stops running must be entered, so that they do not grow unseen.
NOT_RUN = [
    ("docs/getting-started.md", "the first command of README.md, five minutes"),
    ("docs/guides/generate.md", "needs hub weights"),
    ("docs/guides/generate.md", "needs hub weights"),
    ("docs/guides/align.md", "needs hub weights"),
    ("docs/guides/search.md", "serves until Ctrl-C"),
]

#: Small sizes; `[data]` is the README's own.
SMALL = """
name = "tiny"
{data}
[generate]
steps = 2
guidance = 2.5
batch_size = 16

[align]
steps = 2
batch_size = 8

[train]
steps = 2
batch_size = 8
warmup = 0

[embed]
gap_count = 8

[eval]
meteor = "off"
resamples = 100
"""


CONSOLE = re.compile(r"(?:^<!-- ([^\n]*) -->\n\n?)?^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A console block: where it stands, the comment before it, its text."""

    page: str
    line: int
    comment: str
    text: str

    @property
    def script(self) -> str:
        """What is typed: the lines after a prompt and their continuations, or every line where there is no prompt."""
        if not self.text.startswith("$ "):
            return self.text
        typed = re.findall(r"^\$ ((?:.*\\\n)*.*)$", self.text, re.MULTILINE)
        return "\n".join(typed)


def pages() -> list[str]:
    rest = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return [*FIRST, *(page for page in rest if page not in FIRST)]


def blocks() -> Iterator[Block]:
    for page in pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        for found in CONSOLE.finditer(text):
            line = text.count("\n", 0, found.start(2)) + 1
            yield Block(page, line, found[1] or "", found[2])


BLOCKS = list(blocks())
RUN = [block for block in BLOCKS if not block.comment]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the inputs that the docs name, small, and with the README's `gmail.toml`, small too."""
    folder = tmp_path_factory.mktemp("reader")
    data = re.search(r"^```toml\n(\[data\]\n.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert data, "README.md shows no gmail.toml"
    (folder / "gmail.toml").write_text(SMALL.format(data=data[1]))
    scenes_as_coco("scenes:train", 8, folder / "coco.json", images=folder / "photos")
    scenes_as_coco("scenes:test", 12, folder / "captions_dev.json", images=folder / "dev")
    annotations = folder / "coco" / "annotations"
    annotations.mkdir(parents=True)
    shutil.copy(folder / "coco.json", annotations / "captions_train2017.json")
    shutil.copytree(folder / "photos", folder / "coco" / "train2017")
    whole_val2017(folder / "coco" / "val2017", file=annotations / "captions_val2017.json", of=folder / "dev")
    (folder / "my-pipeline").symlink_to(ROOT / "gmail_cli/weights/tiny/pipeline")
    (folder / "sd14").mkdir()
    drawn = captions.read(folder / "coco.json", images=folder / "photos")
    rows = [
        {
            "key": image.id,
            "caption": drawn.captions_of(image.id)[0].text,
            "image": {"bytes": drawn.image_bytes(row), "path": f"{image.id}.png"},
        }
        for row, image in enumerate(drawn.images)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "sd14" / "part-0.parquet")
    return folder


def whole_val2017(images: Path, *, file: Path, of: Path) -> None:
    """As many images and captions as protocol coco-val2017-5k demands; the images are links to a few."""
    files = sorted(of.iterdir())
    images.mkdir()
    described: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    for row in range(5000):
        (images / f"{row:05d}.png").symlink_to(files[row % len(files)])
        described["images"].append({"id": row, "file_name": f"{row:05d}.png"})
        for number in range(5 * row, 5 * row + 5):
            described["annotations"].append({"id": number, "image_id": row, "caption": f"caption {number}"})
    file.write_text(json.dumps(described))


def scenes_as_coco(source: str, count: int, file: Path, *, images: Path) -> None:
    """Write scenes as a COCO captions file with two captions each, and their images beside it."""
    dataset = captions.read(source, limit=count)
    images.mkdir()
    described: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    for row, image in enumerate(dataset.images):
        (images / f"{row:03d}.png").write_bytes(dataset.image_bytes(row))
        described["images"].append({"id": row, "file_name": f"{row:03d}.png"})
        for caption in dataset.captions_of(image.id)[:2]:
            number = len(described["annotations"])
            described["annotations"].append({"id": number, "image_id": row, "caption": caption.text})
    file.write_text(json.dumps(described))


@pytest.fixture(scope="module")
def environment(folder: Path) -> Iterator[dict[str, str]]:
    found = {**shell_environment(folder), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "cache")}
    with preloaded(folder / "bin" / "gmail", environment=found):
        yield found


@pytest.mark.parametrize("block", RUN, ids=lambda block: f"{block.page}:{block.line}")
def test_console_block_runs_as_written(block: Block, folder: Path, environment: dict[str, str]) -> None:
    command = ["bash", "-c", f"set -eu\n{block.script}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.script}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_the_workflow_runs_as_written_and_fails_on_a_fall(folder: Path, environment: dict[str, str]) -> None:
    """Each `run` step of docs/guides/gmail-gate.yml but the installation, as GitHub's shell runs it."""
    workflow = yaml.safe_load((ROOT / "docs/guides/gmail-gate.yml").read_text(encoding="utf-8"))
    steps = [step for step in workflow["jobs"]["gate"]["steps"] if "run" in step and step["name"] != "Install"]
    kept = next(step for step in workflow["jobs"]["gate"]["steps"] if step.get("name") == "Keep the report")
    values = {**environment, "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    baseline = folder / "baseline" / "results.json"
    results = json.loads(baseline.read_text(encoding="utf-8"))
    assert results["protocol"] == "captions_dev.json/unversioned", "docs/guides/ci.md made it"

    def run() -> dict[str, subprocess.CompletedProcess[str]]:
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]
        return {
            step["name"]: subprocess.run(
                [*command, step["run"]], cwd=folder, env=values, capture_output=True, text=True, check=False
            )
            for step in steps
        }

    done = run()
    assert {name: each.returncode for name, each in done.items()} == dict.fromkeys(done, 0), done
    assert re.search(r"^::notice title=gmail eval.*metrics held$", done["Hold against the baseline"].stderr, re.M)
    assert all((folder / path).is_file() for path in kept["with"]["path"].split())
    assert (folder / "summary.md").read_text(encoding="utf-8").startswith("# GMAIL on")
    name = "clip.none.text_to_image_mean_reciprocal_rank"
    results["metrics"][name] += 0.02
    baseline.write_text(json.dumps(results), encoding="utf-8")
    done = run()
    assert [each.returncode for each in done.values()] == [0, 5, 0]
    assert re.search(rf"^::error title=.*::{name}: ", done["Hold against the baseline"].stderr, re.M)
    assert done["Hold against the baseline"].stdout.startswith("runs/gate/eval/")


def test_blocks_that_do_not_run_say_why_and_do_not_grow() -> None:
    comments = [(block.page, block.comment) for block in BLOCKS if block.comment]
    readme = [comment for page, comment in comments if page == "README.md"]
    assert readme == ["run", "test"], "the README's own two commands are run by .ci/run and tests/test_end_to_end.py"
    others = [(page, comment) for page, comment in comments if page != "README.md"]
    assert others == [(page, f"not run: {reason}") for page, reason in NOT_RUN]


def test_the_papers_commands_ask_for_cells_that_exist() -> None:
    """A line of the paper's tables that no task or arm fits would fail only once COCO and a GPU are there."""
    text = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    (arms,) = set(re.findall(r"`C` is `P --set\s+'(train\.arms=[^']+)'`", text))
    commands = [shlex.split(line) for line in re.findall(r"^    ([PC] --.+)$", text, re.M)]
    assert len(commands) > 8
    for letter, *words in commands:
        settings = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
        asked = profile.load("coco-sd21-vitb16", overrides=[*([arms] if letter == "C" else []), *settings])
        assert train.cells(asked), words


def test_commands_stand_in_console_blocks() -> None:
    """A command in a block of another sort would never run."""
    for page in pages():
        if page in {"docs/weights.md", "docs/experiments.md", "docs/reference/cli.md"}:
            continue  # trainings of hours, and output of --help
        text = re.sub(r"^```console\n.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
        assert not re.findall(r"^(?:    )?(?:\$ )?gmail [a-z]+ .*$", text, re.MULTILINE), page
