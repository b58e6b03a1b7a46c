"""Run one command: python main.py COMMAND [--setting value ...]. `python main.py --help` lists the commands."""

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from commands import report_missing

try:
    from commands.command_line import build_parser
    from data.files import FULL, explained
    from data.names import terminal_text
    from data.workers import Terminated, end_with_parent, raise_at_sigterm, works_for_another
    from settings import UserError, check_values
except ModuleNotFoundError as error:
    sys.exit(report_missing(error))

# Commands that do not start anew after Ctrl-C.
RESUMED = {
    "train": "`python main.py train --resume auto` with the same settings resumes from the last checkpoint.",
    "cross_validate": "The same command resumes: complete folds are not trained again.",
    "compare": "The same command resumes: runs that are tested already are not trained again.",
    "predict": "The same command resumes: recordings that are written in full are not tagged again.",
    "prepare": "The same command starts anew; only AudioSet's packing resumes after the last whole file.",
    "compress": "The same command resumes: compressed stores stay as they are.",
}
WIDTH = "1000"  # characters of a line in a file or a pipe
STARTS_ANEW = "No file was left half-written; the same command starts anew."


@contextmanager
def wide_tables() -> Iterator[None]:
    """Where no terminal shows them, rich's tables are as wide as their content: 80 columns would cut them."""
    narrow = "COLUMNS" in os.environ or sys.stdout.isatty()
    if not narrow:
        os.environ["COLUMNS"] = WIDTH
    try:
        yield
    finally:
        if not narrow:
            os.environ.pop("COLUMNS", None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0; 1 where some files could not be read (predict, prepare); 2 for a mistake in what was given; 130 when interrupted,
    143 when ended by SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    if works_for_another():
        end_with_parent()
    try:
        parser = build_parser(chosen, everything="--help-all" in words)
        values = vars(parser.parse_args(words))
        command = values.pop("command")
        given = {k.removeprefix("setting_"): values.pop(k) for k in list(values) if k.startswith("setting_")}
        check_values(given)  # before anything heavy is imported
        with wide_tables(), explained(Path("An output"), FULL):  # of those that name none, as what is printed
            return importlib.import_module(f"commands.{command}").run(given, **values) or 0
    except UserError as error:
        # torch puts a traceback in front of the message of a DataLoader's worker.
        print(f"error: {terminal_text(str(error).rpartition('UserError: ')[2].strip())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        return report_missing(error)
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one of the processes that share a run
            how = "Ended by SIGTERM" if terminated else "Interrupted"
            print(f"{how}. {RESUMED.get(chosen or '', STARTS_ANEW)}", file=sys.stderr)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def warning_text(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning with its place, without the line of code that gave it."""
    return terminal_text(f"{filename}:{lineno}: {category.__name__}: {message}") + "\n"


if __name__ == "__main__":
    raise_at_sigterm()
    warnings.formatwarning = warning_text
    sys.exit(main())
