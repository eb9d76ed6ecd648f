"""What the environment brings: devices, proxies, a notebook's settings, home folders, libraries."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

import pixelflow_jax as pf
from pixelflow_jax.common import UserError, cli, memory, optional
from pixelflow_jax.evaluation import sweep
from pixelflow_jax.requests import request
from pixelflow_jax.training.checkpoints import find_step

HERE = pathlib.Path(__file__).parents[2]


def child(code, *argv, **env):
    """A Python process at the root of the checkout, with more in its environment."""
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=HERE,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_device_that_is_not_there(trained, tmp_path):
    """Catches a traceback, or words about something else, of a command that JAX has no device for."""
    commands = f"""
        train --workdir={tmp_path / "a"}
        sample --checkpoint={trained} --out={tmp_path / "b"}
        evaluate --samples={trained}/x.npz --reference=digits --features=pca --out={tmp_path / "c"}
        convert --source={trained} --to=official --out={tmp_path / "d"}
        demo --checkpoint={trained}
        doctor --workdir={tmp_path / "e"} --no_compile
    """.strip().splitlines()
    code = """
import importlib, sys
from pixelflow_jax.common import cli
for line in sys.argv[1:]:
    name, *argv = line.split()
    try:
        importlib.import_module(f"pixelflow_jax.{name}").main(argv)
    except SystemExit as end:
        print(name, "ends with", end.code)
    except Exception as error:
        print(name, "says", cli.usual_cause(error) or error)
"""
    ended = child(code, *commands, JAX_PLATFORMS="cuda")
    assert ended.returncode == 0 and "AssertionError" not in ended.stdout, ended.stdout + ended.stderr
    for line in commands[:-1]:
        name = line.split()[0]
        assert f"{name} says JAX_PLATFORMS=cuda: JAX finds no such device here;" in ended.stdout
    assert "FAIL  devices   JAX_PLATFORMS=cuda" in ended.stdout and "doctor ends with 1" in ended.stdout


def test_warnings_show_no_source():
    """Catches a line of our source in what a person reads."""
    code = """
import warnings
from pixelflow_jax.common import cli
cli.run(lambda: warnings.warn("something to know", stacklevel=1))
"""
    assert child(code).stderr == "warning: something to know\n"


def test_plots_do_not_depend_on_a_notebook():
    """Catches a sweep that a notebook's MPLBACKEND ends when all its work is done."""
    pytest.importorskip("matplotlib")
    code = """
import io, os
from pixelflow_jax.evaluation import sweep
assert sweep._plot([], "").startswith(bytes([137]) + b"PNG")
print(os.environ["MPLBACKEND"])
"""
    backend = "module://matplotlib_inline.backend_nowhere"
    ended = child(code, MPLBACKEND=backend)
    assert ended.returncode == 0 and ended.stdout.strip() == backend, ended.stderr


def test_a_plot_that_fails(monkeypatch, capsys):
    """Catches a sweep that is lost with its picture."""

    def fail(*args):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(sweep, "optional", lambda *args: None)  # matplotlib may be missing here
    for name in ("_draw", "optional"):
        with monkeypatch.context() as patch:
            patch.setattr(sweep, name, fail)
            assert not sweep._plot([], "fid")
        assert "no sweep.png: no fonts" in capsys.readouterr().out


def test_extras_that_are_there_but_ill(tmp_path, monkeypatch):
    """Catches advice to install what is installed."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ill_one.py").write_text("raise ImportError('a SOCKS proxy needs socksio')")
    (tmp_path / "ill_two.py").write_text("1 / 0")
    for module, why in (("ill_one", "a SOCKS proxy needs socksio"), ("ill_two", "division by zero")):
        with pytest.raises(
            UserError, match=f"{module}, which is installed but cannot be imported: {why}"
        ):
            optional(module, "demo", "the page")
    with pytest.raises(UserError, match="the page needs the extra `demo`"):
        optional("not_there_at_all", "demo", "the page")


@pytest.mark.slow
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "socks5h://u:p@h:1"])
def test_the_demo_behind_a_proxy(trained, proxy):
    """Catches a page that asks a proxy for itself, or a proxy that is taken for a missing extra."""
    pytest.importorskip("gradio", reason="gradio is the extra `demo`")
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    command = [sys.executable, "-m", "pixelflow_jax.demo", f"--checkpoint={trained}", "--port=0"]
    env = {**os.environ, **dict.fromkeys(names, proxy)}
    demo = subprocess.Popen(command, cwd=HERE, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert "Ctrl-C ends it" in demo.stdout.readline()
    finally:
        demo.terminate()
        demo.wait()
        demo.stdout.close()


def test_home(trained, tmp_path, monkeypatch):
    """Catches a folder named "~", from a flag or from Python."""
    monkeypatch.setenv("HOME", str(trained.parent))
    flags = [
        "--checkpoint=~/run",
        "--out=~/x",
        "--prompts_file=~",
        "--prompt=~/x",
        "--init_image=~/a.png",
    ]
    args = request.parser("").parse_args(flags)
    home = str(trained.parent)
    assert (args.checkpoint, args.out, args.prompts_file) == (f"{home}/run", f"{home}/x", home)
    assert args.prompt == ["~/x"] and args.init_image == f"{home}/a.png"
    assert find_step("~/run")[0] == find_step(trained)[0]
    with pytest.raises(UserError, match="--out=~nobody-here/x: ~nobody-here is no user's folder"):
        request.parser("").parse_args(["--checkpoint=x", "--out=~nobody-here/x"])
    with pytest.raises(UserError, match="holds a run of another config"):
        pf.fit(pf.load_config("digits"), "~/run")
    assert cli.parser("").parse_args([]) is not None


@pytest.mark.parametrize(
    "change", ["nothing", "the kernel's own policy", "the user's variable", "an accelerator"]
)
def test_huge_pages_are_asked_for_where_they_help(change, monkeypatch, tmp_path):
    """Catches a process that starts again for ever or for nothing, or with other arguments."""
    started, policy = [], tmp_path / "enabled"
    policy.write_text("[always] madvise" if change == "the kernel's own policy" else "always [madvise]")
    monkeypatch.setattr(memory, "HUGE_PAGES", policy)
    monkeypatch.setattr(memory, "PLUGINS", ("json",) if change == "an accelerator" else ("nowhere",))
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(os, "execve", lambda *args: started.append(args))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-P", "-m", "pixelflow_jax.train", "--help"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if change == "the user's variable":
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    memory.restart_with_huge_pages()
    if change != "nothing":
        assert not started
        return
    ((program, argv, environ),) = started
    assert program == sys.executable and argv == sys.orig_argv
    assert environ["GLIBC_TUNABLES"] == memory.TUNABLE
    monkeypatch.setattr(os, "environ", environ)
    memory.restart_with_huge_pages()
    assert len(started) == 1


def test_a_command_starts_again_with_huge_pages(tmp_path):
    """Catches a command that does not, and one that loses its arguments."""
    wanted = memory.HUGE_PAGES.is_file() and "[madvise]" in memory.HUGE_PAGES.read_text()
    wanted &= memory.platform.libc_ver() >= ("glibc", "2.35") and sys.platform == "linux"
    wanted &= not any(importlib.util.find_spec(name) for name in memory.PLUGINS)
    config = tmp_path / "config.py"
    config.write_text("import os\nraise ValueError(os.environ.get('GLIBC_TUNABLES'))\n")
    environ = {name: x for name, x in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = ["-m", "pixelflow_jax.train", f"--config={config}", "--workdir=never"]
    ended = subprocess.run(
        [sys.executable, *command], cwd=HERE, env=environ, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert f"ValueError: {memory.TUNABLE if wanted else None}" in ended.stderr, ended.stderr
