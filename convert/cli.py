"""The command line: finds a command's module, runs it, prints its outcome, and turns errors into exit statuses."""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import click

from convert import report
from convert.errors import Problem, explained
from convert.interrupts import interruptible
from convert.report import ProgressBar, envelope, error_text, problem_lines, shown, without_user

# One module of `convert.commands` each; it is imported when its command is asked for, so that `--help` starts at once.
COMMANDS = {
    "inspect": "Say what a checkpoint is, without reading its tensors.",
    "plan": "Show what a conversion would do, or why it is refused.",
    "convert": "Turn a fairseq checkpoint into a Hugging Face model directory.",
    "restore": "Write a fairseq checkpoint from a model directory.",
    "verify": "Prove that a model directory computes what fairseq computes.",
    "record": "Keep fairseq's answers, to verify where fairseq is not installed.",
    "evaluate": "Measure the word error rate of a model directory.",
    "publish": "Push a verified model directory to the Hub.",
    "fetch": "Download a released fairseq checkpoint by name.",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command has to say.

    Args:
        ok: whether the answer is yes (exit 0) or no (exit 1).
        text: lines for people, on stdout, each of which may hold what a file says; `-q` leaves them out.
        data: the fields of the JSON object beside `schema`, `command`, `ok` and `problems`.
        problems: the reasons of a no.
    """

    ok: bool
    text: str | Sequence[str]
    data: dict[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


class LazyGroup(click.Group):
    """A click group whose commands are imported one by one, when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of their use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"convert.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run; errors of usage are text that is safe to print, or with `--json` one object."""
        words = list(sys.argv[1:] if args is None else args)
        _printable("--json" in words)
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            with interruptible():
                sys.exit(super().main(args, prog_name, complete_var, False, **extra))
        except (KeyboardInterrupt, click.Abort) as error:  # before the command's own code, or after it
            sys.exit(explained(error.__cause__ or KeyboardInterrupt()).status)
        except click.UsageError as error:
            if "--json" in words:
                problem = Problem("usage", words[0], error.format_message())
                click.echo(envelope(words[0], False, [problem], hint=f"fairseq-to-hf {words[0]} --help"))
            else:
                text = io.StringIO()
                error.show(text)
                click.echo(shown(text.getvalue(), keep="\n"), err=True, nl=False)
            sys.exit(2)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def command(name: str, *examples: str) -> Callable[[Callable[..., Outcome]], click.Command]:
    """Make a click command of a function that returns an `Outcome`.

    Adds `--json`, `-q` and `-v`, appends the examples to the help, and is the only place that prints results and errors.

    Args:
        name: the command's name, a key of `COMMANDS`.
        examples: at least three real command lines, shown at the end of `--help`.
    """

    def decorate(function: Callable[..., Outcome]) -> click.Command:
        @functools.wraps(function)
        def run(as_json: bool, quiet: bool, verbose: bool, **arguments: Any) -> None:
            context = click.get_current_context()
            context.obj = Settings(quiet=quiet or as_json, verbose=verbose)
            try:
                outcome = function(**arguments)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except (Exception, KeyboardInterrupt) as raised:  # noqa: BLE001
                error = explained(raised, name)
                if verbose:
                    click.echo(shown(without_user(traceback.format_exc()), keep="\n"), err=True)
                if as_json:
                    click.echo(envelope(name, False, error.problems, hint=error.hint))
                else:
                    click.echo(error_text(error), err=True)
                context.exit(error.status)
            if as_json:
                click.echo(envelope(name, outcome.ok, outcome.problems, **outcome.data))
            elif not quiet and outcome.text:
                lines = outcome.text.split("\n") if isinstance(outcome.text, str) else outcome.text
                click.echo("\n".join(map(shown, lines)))
            elif quiet and not outcome.ok:
                click.echo("\n".join(problem_lines(outcome.problems)) or f"{name}: no", err=True)
            context.exit(0 if outcome.ok else 1)

        run.__doc__ = inspect.cleandoc(function.__doc__ or "")
        made = click.command(name, epilog="\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples))(run)
        made.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object, on failure too."),
            click.Option(["-q", "--quiet"], is_flag=True, help="Print nothing but errors."),
            click.Option(["-v", "--verbose"], is_flag=True, help="Say more; show the traceback of an error."),
        ]
        return made

    return decorate


@dataclass(frozen=True, slots=True)
class Settings:
    """How much a command says, kept as the click context's object."""

    quiet: bool
    verbose: bool

    @property
    def progress(self) -> bool:
        """Whether progress bars are shown: on a terminal, and not when asked to be quiet."""
        return not self.quiet and sys.stderr.isatty()


def _printable(as_json: bool) -> None:
    """Print every character somehow, on terminals that are not UTF-8 too; JSON is always UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8" if as_json else None, errors="backslashreplace")


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  fairseq-to-hf inspect checkpoint_best.pt
  fairseq-to-hf convert checkpoint_best.pt my-model
  fairseq-to-hf verify checkpoint_best.pt my-model""",
)
@click.version_option(package_name="fairseq-to-hf")
def main() -> None:
    """Turn fairseq speech checkpoints into Hugging Face models, and prove that they are the same."""


def progress_bar(label: str) -> AbstractContextManager[ProgressBar | None]:
    """Show the progress of the command that runs, unless it was asked to be quiet; see `convert.report.progress_bar`."""
    settings = getattr(click.get_current_context(silent=True), "obj", None)
    return report.progress_bar(label, show=settings is not None and settings.progress)
