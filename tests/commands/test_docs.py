"""The documentation is true: its commands run, and its links and pictures exist."""

import argparse
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
from fuzz import COMMANDS, WORK, Reached, reached
from PIL import Image

from pixelflow_jax.common import UserError
from pixelflow_jax.config import check_batch_size, load_config
from pixelflow_jax.training.loop import train

from bucket import Bucket
from conftest import TINY

HERE = pathlib.Path(__file__).parents[2]
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
PLACEHOLDER = re.compile(
    r"\b[A-Z][A-Z_0-9]{2,}\b|google/|ShoufaChen/|/tmp/|runs/|out/|gs://|\.png|\.pth|\.npz|\.jsonl|prompts|imagenet"
)


def blocks(page: pathlib.Path, language: str = "bash") -> list[str]:
    """Return the fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page: pathlib.Path) -> list[list[str]]:
    """Return every `python ...` command on a page, in blocks and in running text, as argv."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"^(?:    )?((?:PYTHONPATH=\S+ )?python .*)$", text, re.M)
    joined = re.sub(r"\n(?=[^\n`|-])", " ", text)
    found += re.findall(
        r"`((?:PYTHONPATH=\S+ )?python (?:-m pixelflow_jax|benchmarks|tests|docs)[^`]*)`", joined
    )
    found += [part for line in re.findall(r"&& (python -m pixelflow_jax.*)$", text, re.M)
              for part in line.split(" && ")]  # fmt: skip
    parsed = [shlex.split(line.split(" && ")[0], comments=True) for line in found]
    return [[word for word in words if not word.startswith("PYTHONPATH=")] for words in parsed]


def test_commands_are_found():
    """Catches an extraction that no longer finds the commands."""
    assert sum(len(commands(page)) for page in PAGES) > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_their_flags(page, monkeypatch, tmp_path):
    """Catches a documented command whose flags or config keys do not exist.

    The project's commands run until their work would begin, or until a placeholder for the reader's
    file.
    """
    for room, name in WORK:
        monkeypatch.setattr(room, name, reached)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # scripts that run in this process must not replace it
    os.symlink(HERE / "configs", tmp_path / "configs")
    for argv in commands(page):
        if argv[1] == "-m" and argv[2].startswith("pixelflow_jax."):
            name = argv[2].removeprefix("pixelflow_jax.")
            words = [word for word in argv[3:] if word != "..."]
            if "..." in argv or any(word.endswith("=...") for word in words) or not words:
                continue  # an abridged command
            try:
                with Bucket():  # an empty one
                    COMMANDS[name][0](words)
            except Reached:
                continue
            except UserError as error:
                assert PLACEHOLDER.search(str(error)), f"{page.name}: {' '.join(argv)}: {error}"
        elif argv[1].startswith(("benchmarks/", "tests/", "docs/")):
            check_script(HERE / argv[1], argv[2:])


def check_script(path: pathlib.Path, words: list[str]) -> None:
    """Raise AssertionError unless a script's parser accepts these words."""

    class Parsed(Exception):
        pass

    known = argparse.ArgumentParser.parse_known_args

    def parse(self, *args, **kwargs):
        raise Parsed(known(self, words)[1])

    def error(self, message):
        raise AssertionError(f"{path.name} {' '.join(words)}: {message}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(argparse.ArgumentParser, "error", error)
        patch.syspath_prepend(str(path.parent))
        patch.setattr(sys, "argv", [str(path), *words])
        with pytest.raises(Parsed) as parsed:
            runpy.run_path(str(path), run_name="__main__")
    assert not parsed.value.args[0], f"{path.name} does not know {parsed.value.args[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_scripts_are_there(page):
    """Catches a link to a file or picture, or a script name, that does not exist."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for script in re.findall(r"\b(?:launch|benchmarks|tests|docs|configs|notebooks)/[\w/.]+\w\b", text):
        known = (HERE / script).exists() or script == "launch/settings.env"  # that one is the reader's
        assert known or "NAME" in script or "/X." in script, f"{page.name}: {script}"


def test_table_of_official_names():
    """Catches names in docs/checkpoints.md that the conversion does not know."""
    from pixelflow_jax.foreign.official import _block_rules, _outer_rules

    rules = [*_block_rules(True), *_outer_rules(4, True)]
    official = " ".join(rule.official for rule in rules)
    ours = {part for rule in rules for part in rule.ours}
    table = (HERE / "docs" / "checkpoints.md").read_text().split("| official |")[1].split("FID's")[0]
    for row in table.splitlines()[2:]:
        cells = row.split(" | ")
        if len(cells) < 2:
            continue
        for name in re.findall(r"`([\w.]+)`", cells[0]):
            name = name.removeprefix("transformer_blocks.N.").strip(".")
            assert name in official, f"{name} is not an official name"
        for name in re.findall(r"`([\w/.]+)`", cells[1]):
            for part in name.replace("...", "").strip("/").split("/"):
                assert part in ours | {"blocks"}, f"{part} is not one of our names"


def test_batches_fit_the_slices_that_are_named():
    """Catches a projection, or a config's hardware line, for a run that is refused at its start."""
    rows = re.findall(
        r"\| v\w+-(\d+)(?: \((\d+) chips\))? \| `(\w+)`", (HERE / "docs/tpu.md").read_text()
    )
    assert len(rows) == 3
    for number, chips, name in rows:
        check_batch_size(load_config(name), int(chips or number))
    for name in ("t2i_256", "t2i_512", "t2i_1024"):
        text = (HERE / "configs" / f"{name}.py").read_text()
        chips, flags = (
            int(re.search(r"a TPU of (\d+)", text)[1]),
            re.findall(r"--config\.(\S+=\d\S*)", text),
        )
        check_batch_size(load_config(name), chips)
        if flags:
            config = load_config(name, flags)
            check_batch_size(config, config.mesh.data * config.mesh.fsdp)


@pytest.mark.slow
def test_first_hour(tmp_path):
    """Catches a command of the first hour that does not work in the documented order.

    The network is smaller, runs are shorter, and packages are not installed. compile_check and the demo
    have their own tests and are skipped.
    """
    small = " ".join(f"--config.{o}" for o in TINY if not o.startswith(("num_train", "model.depth")))
    script = ["set -euo pipefail", "python() { command " + shlex.quote(sys.executable) + ' "$@"; }']
    page = HERE / "docs" / "first_hour.md"
    for line in "".join(blocks(page)).splitlines():
        line = line.replace("/.venv-aot/bin/python", "python")
        if "pip install" in line or "demo " in line or "compile_check" in line:
            continue
        if "pixelflow_jax.train" in line:
            steps = "" if "num_train_steps" in line else "--config.num_train_steps=8"
            line = line.replace("=300", "=4").replace("=400", "=8") + f" {small} {steps}"
        script.append(line.replace("--num_images=200", "--num_images=100"))
    (code,) = blocks(page, "python")
    (tmp_path / "notebook.py").write_text(code)
    script.append("python notebook.py")
    os.symlink(HERE / "configs", tmp_path / "configs")
    ended = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    for made in (
        "all/grid.png",
        "again/000000.png",
        "metrics.json",
        "sweep/sweep.md",
        "converted/grid.png",
    ):
        assert (tmp_path / "out" / made).exists(), made
    same, other = (
        (tmp_path / "out" / name / "000000.png").read_bytes()
        == (tmp_path / "out" / "threes" / "000004.png").read_bytes()
        for name in ("again", "guided")
    )
    assert same and not other


@pytest.mark.slow
def test_python_page(tmp_path, monkeypatch):
    """Catches code on the Python page that does not run."""
    import pixelflow_jax as pf

    monkeypatch.chdir(HERE)
    pf.fit(pf.load_config("configs/digits.py", TINY), tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(HERE / "docs" / "api.md", "python")
    names = {}
    exec(compile(code, "api.md", "exec"), names)
    assert names["images"].shape == (2, 16, 16, 3) and np.isfinite(names["numbers"]["loss"])
    assert names["made"].pixels.shape == (1, 16, 16, 3)  # of the last stage


@pytest.mark.slow
def test_pictures(trained, tmp_path, monkeypatch):
    """Catches a picture of the documentation that its command can no longer make."""
    words = load_config("configs/t2i_tiny.py", [*TINY, "num_train_steps=1"])
    train(words, tmp_path / "words")
    pictures = runpy.run_path(str(HERE / "docs" / "pictures.py"))
    for checkpoint in (trained, tmp_path / "words"):
        flags = [f"--checkpoint={checkpoint}", f"--out={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["pictures.py", *flags])
        pictures["main"]()
    made = {path.name: np.asarray(Image.open(path)) for path in tmp_path.glob("*.png")}
    of_digits, of_emoji = {"samples.png", "renoising.png", "guidance.png"}, {"emoji.png", "cascade.png"}
    assert made.keys() == of_digits | of_emoji
    assert all(picture.std() > 1 for picture in made.values())
