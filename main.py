"""Run one command: python main.py COMMAND [--setting value ...]. `python main.py --help` lists the commands."""

import importlib
import sys
from collections.abc import Sequence

from commands.command_line import build_parser
from settings import UserError, check_values

# What Ctrl-C leaves, where it is more than nothing.
GOES_ON = {
    "train": "`python main.py train --resume auto` with the same settings goes on from the last checkpoint.",
    "cross_validate": "The same command goes on: folds that are complete are not trained again.",
    "predict": "The same command goes on: recordings that are written in full are not tagged again.",
    "prepare": "The same command starts anew; only AudioSet's packing goes on after the last whole file.",
    "compress": "The same command goes on: stores that are compressed stay as they are.",
}
STARTS_ANEW = "No file was left half-written; the same command starts anew."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0; 1 where some files could not be read (predict); 2 for a mistake in what was given; 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    try:
        parser = build_parser(chosen)
        values = vars(parser.parse_args(words))
        command = values.pop("command")
        given = {k.removeprefix("setting_"): values.pop(k) for k in list(values) if k.startswith("setting_")}
        check_values(given)  # a wrong value is told before anything heavy is imported
        return importlib.import_module(f"commands.{command}").run(given, **values) or 0
    except UserError as error:
        # torch puts a traceback in front of what a worker of a DataLoader says.
        print(f"error: {str(error).rpartition('UserError: ')[2].strip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Interrupted. {GOES_ON.get(chosen or '', STARTS_ANEW)}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
