"""The frame around all commands: help, version, exit status, streams, start-up."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner, Result

import fastres
from fastres import errors
from fastres.cli import main
from fastres.wording import named

Run = Callable[..., Result]
Shell = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = (
    "compile",
    "calibrate",
    "export",
    "verify",
    "bench",
    "inspect",
    "profile",
    "summary",
    "predict",
    "report",
    "doctor",
)
ESCAPE = "\x1b"


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"fastres {fastres.__version__}\n"


def test_help_lists_every_command(run: Run) -> None:
    text = run("--help").stdout
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_ends_without_a_last_search_for_garbage() -> None:
    code = (
        "import atexit, gc; from fastres.cli.main import main; "
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000)); main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"fastres {fastres.__version__}\nTrue\n")


@pytest.mark.parametrize("late", ["SIGINT", "SIGTERM"])
def test_a_signal_that_comes_when_all_is_done_changes_nothing(late: str) -> None:
    code = (
        "import atexit, os, signal; from fastres.cli.main import main; "
        f"atexit.register(lambda: os.kill(os.getpid(), signal.{late})); main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name: str, run: Run) -> None:
    text = run(name, "--help").stdout
    assert text.startswith(f"Usage: fastres {name}") and "--json" in text


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; import fastres.cli.main; "
        "sys.exit(', '.join({'torch', 'openvino', 'onnx', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stderr.strip() == ""


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("compile", "--nonsense"),
        ("compile", "a", "b"),
        ("compile", "fastres:resnet18", "--image-size", "-1"),
        ("compile", "fastres:resnet18", "--image-size", "x"),
        ("compile", "fastres:resnet18", "--threads", "0"),
        ("predict", "fastres:resnet18", "x.jpg", "--top-k", "0"),
        ("bench", "fastres:resnet18", "--duration", "0"),
        ("verify", "fastres:resnet18", "--atol", "-1"),
    ],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...], run: Run) -> None:
    result = run(*arguments, status=2)
    assert "Usage:" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ParityError, 1),
        (errors.InputError, 2),
        (errors.BuildError, 2),
        (errors.CaptureError, 2),
        (errors.GraphError, 2),
        (errors.UnsupportedError, 2),
        (errors.ArtifactError, 2),
        (errors.FastresError, 2),
        (errors.BackendUnavailable, 3),
    ],
)
def test_each_error_has_its_status(error: type[errors.FastresError], status: int) -> None:
    result = _raising(error("what was found"))
    assert result.exit_code == status
    assert (result.stdout, result.stderr) == ("", "error: what was found\n")


def test_ctrl_c_is_130() -> None:
    result = _raising(KeyboardInterrupt())
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "error: interrupted\n")


def _raising(error: BaseException) -> Result:
    app = typer.Typer(cls=main.Commands)

    @app.command("do")
    def do() -> None:
        raise error

    @app.callback()
    def root() -> None: ...

    return CliRunner().invoke(app, ["do"])


def test_a_long_message_is_not_broken_or_interpreted() -> None:
    text = f"[bold]{'x' * 300}[/bold] :smile:"
    assert _raising(errors.InputError(text)).stderr == f"error: {text}\n"


def test_usage_errors_get_no_escape_codes(shell: Shell) -> None:
    found = shell("compile", "--nonsense")
    assert found.returncode == 2 and found.stdout == ""
    assert "--nonsense" in found.stderr and ESCAPE not in found.stderr


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color_is_respected_on_a_terminal(
    no_color: str, coloured: bool, command: list[str]
) -> None:
    controller, terminal = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": no_color}
    found = subprocess.run(
        [*command, "compile", "fastres:resnet18", "--batch-size", "0,x"],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=environment,
    )
    os.close(terminal)
    seen = os.read(controller, 4096).decode()
    os.close(controller)
    assert found.returncode == 2 and found.stdout == b""
    assert "error:" in seen and ("\x1b[1;31m" in seen) == coloured


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("summary", "fastres:cifar_resnet8")]
)
def test_a_full_disk_is_one_line(arguments: tuple[str, ...], command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run([*command, *arguments], stdout=full, stderr=subprocess.PIPE)
    assert found.returncode == 2
    assert found.stderr == b"error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("name", ["x", "y" * 999])
def test_an_error_about_a_file_names_it_and_not_the_output(name: str) -> None:
    result = _raising(FileNotFoundError(2, "No such file or directory", name))
    assert result.exit_code == 2 and len(result.stderr) < 200
    assert result.stderr == f"error: {named(name)}: No such file or directory\n"


def test_no_stdout_at_all(command: list[str]) -> None:
    line = f"{shlex.join([*command, 'summary', 'fastres:cifar_resnet8'])} >&-"
    found = subprocess.run(line, shell=True, stderr=subprocess.PIPE)
    assert (found.returncode, found.stderr) == (0, b"")


@pytest.mark.parametrize("words", [("compile", "--help"), ("--help",), ("--version",)])
def test_a_reader_that_goes_away_is_no_error(command: list[str], words: tuple[str, ...]) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, *words], **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()
    assert (process.returncode, complaint) == (141, b"")


@pytest.mark.parametrize("module", ["fastres", "fastres.cli.main"])
def test_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("fastres ")
