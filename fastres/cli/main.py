"""`fastres`: the entry point, the list of commands, and what becomes of errors.

Exit status: 0 well, 1 a check failed, 2 usage or bad input, 3 this machine lacks something,
130 interrupted, 141 nobody reads the output any more, 143 ended by SIGTERM.
"""

from __future__ import annotations

import gc
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastres.cli import interrupts
from fastres.cli.bench import bench
from fastres.cli.calibrate import calibrate
from fastres.cli.compile import compile_model
from fastres.cli.doctor import doctor
from fastres.cli.export import export
from fastres.cli.inspect import inspect_engine
from fastres.cli.output import WORDS, complain
from fastres.cli.predict import predict
from fastres.cli.profile import profile
from fastres.cli.report import report
from fastres.cli.standard_streams import drop_broken, make_usable
from fastres.cli.summary import summary
from fastres.cli.verify import verify
from fastres.errors import BackendUnavailable, FastresError, ParityError
from fastres.version import __version__
from fastres.wording import named


class Commands(TyperGroup):
    """The group of all commands: turns their errors into one message and an exit status."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            drop_broken()
            complain(_about(error))
            sys.exit(2)

    def make_context(self, info_name: Any, args: list[str], *rest: Any, **kwargs: Any) -> Any:
        WORDS.set(tuple(args))  # parsing takes them off the list
        try:
            return super().make_context(info_name, args, *rest, **kwargs)
        except BrokenPipeError as error:  # of the help
            drop_broken()
            raise typer.Exit(141) from error

    def invoke(self, ctx: Any) -> Any:
        try:
            return self._invoke(ctx)
        except FastresError as error:
            complain(str(error))
            raise typer.Exit(_status(error)) from error
        except KeyboardInterrupt as error:
            complain("interrupted")
            raise typer.Exit(130) from error
        except BrokenPipeError as error:
            drop_broken()
            raise typer.Exit(141) from error

    def _invoke(self, ctx: Any) -> Any:
        interrupts.begin()
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a reader that has gone is noticed here, not at the exit
            return result
        finally:
            interrupts.ignore()


def _about(error: OSError) -> str:
    """In words: of a file, or else of stdout or stderr."""
    if error.filename is None:
        return f"the output cannot be written: {error.strerror}"
    return f"{named(error.filename)}: {error.strerror}"


def _status(error: FastresError) -> int:
    if isinstance(error, ParityError):
        return 1
    return 3 if isinstance(error, BackendUnavailable) else 2


app = typer.Typer(
    name="fastres",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help and errors: easy to search, no boxes in logs
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("compile")(compile_model)
app.command("calibrate")(calibrate)
app.command("export")(export)
app.command("verify")(verify)
app.command("bench")(bench)
app.command("inspect")(inspect_engine)
app.command("profile")(profile)
app.command("summary")(summary)
app.command("predict")(predict)
app.command("report")(report)
app.command("doctor")(doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastres {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """fastres: high-performance inference for residual networks.

    A model is fastres:resnet50@v1, torchvision:resnet50, timm:resnet50d, package.module:factory, or
    the path of a saved engine.

    Exit status: 0 well, 1 a check failed, 2 usage or bad input, 3 this machine lacks something.
    """


def main() -> None:
    """Runs the command line."""
    interrupts.end_at_once()
    make_usable()
    try:
        app(prog_name="fastres")
    finally:
        interrupts.ignore()
        gc.freeze()  # else the interpreter looks through all it holds as it ends, for a second


if __name__ == "__main__":
    main()
