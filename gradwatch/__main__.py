"""`gradwatch` and `python -m gradwatch`: the command line."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

import gradwatch

DEMO_CASES = ("vanishing", "exploding", "silent-nan")
"""Named here too, so that the help comes without loading torch."""

_TAKES_A_VALUE = ("--clip", "--on-nonfinite")
"""Options of `run` that are followed by one."""

_EPILOG = """In your own loop no command is needed:

    from gradwatch import GradWatch

    with GradWatch(model):
        ...  # the training loop, unchanged
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        The exit code: of `run` the script's own, 2 for a command line that makes no sense.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parser()
    if not args:
        parser.print_help(sys.stderr)
        return 2
    if not args[0].startswith("-") and args[0] not in commands:
        parser.error(_unknown(args[0], commands))
    ours, script = _split(args)
    options = parser.parse_args(ours)
    if options.command == "demo":
        from gradwatch.demo import demo

        return demo(options.case, seed=options.seed)
    return _run(parser, options, script)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, script: list[str]) -> int:
    if script and script[0].startswith("-m"):
        module, script = True, [script[0][2:], *script[1:]] if script[0] != "-m" else script[1:]
    else:
        module = False
    if not script:
        parser.error("run: it needs a script, as in `gradwatch run train.py`, or a module, as in `gradwatch run -m package.train`")
    from gradwatch.run import run

    return run(
        script[0],
        script[1:],
        module=module,
        clip=options.clip,
        on_nonfinite=options.on_nonfinite,
        quiet=options.quiet,
        summary=options.summary,
    )


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    """Cut off what is the script's: argparse would take a "--" out of it, and options that both of them have."""
    if args[0] != "run":
        return args, []
    i = 1
    while i < len(args) and args[i].startswith("-") and not args[i].startswith("-m"):
        if args[i] == "--":
            return args[:i], args[i + 1 :]
        i += 2 if args[i] in _TAKES_A_VALUE else 1
    return args[:i], args[i:]


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    parser = argparse.ArgumentParser(
        prog="gradwatch",
        description="Watches the gradients of a PyTorch training loop and says what is wrong, where, why, and what to do.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gradwatch {gradwatch.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_demo(commands)
    _add_run(commands)
    return parser, list(commands.choices)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="show a network that does not learn, the reason, and the remedy",
        description="Trains small networks on the text of Python's standard library, here and now: no network access, no download, "
        "under a minute. Every number that is printed was measured in that run.",
        allow_abbrev=False,
    )
    demo.add_argument("--case", choices=DEMO_CASES, help="this part alone (default: all, one after the other)")
    demo.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the batches (default: 0)")


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="watch a training script that stays as it is",
        usage="gradwatch run [options] script.py [args]\n       gradwatch run [options] -m package.module [args]",
        description="Runs a Python script as `python` would and watches what it trains. Alerts and the verdict go to stderr; stdout, "
        "arguments, exit code and exceptions are the script's own.",
        allow_abbrev=False,
    )
    run.add_argument("--clip", type=_max_norm, metavar="MAX_NORM", help="clip the global norm of the gradients before each step")
    run.add_argument(
        "--on-nonfinite",
        choices=("warn", "raise"),
        default="warn",
        help="what to do about a NaN or Inf in the gradients: say it (default), or stop before the weights change",
    )
    run.add_argument("--quiet", action="store_true", help="no alerts while it runs, only the verdict at its end")
    run.add_argument("--summary", action="store_true", help="at its end the whole story, layer by layer, in place of the verdict")


def _max_norm(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no max_norm; it needs a finite number above 0")
    return value


def _unknown(given: str, commands: Sequence[str]) -> str:
    """What to say about a word that is no command."""
    said = f"there is no command {given!r}; there are {', '.join(commands)}"
    close = difflib.get_close_matches(given, commands, n=1)
    if close:
        return f"{said}. Did you mean `gradwatch {close[0]}`?"
    if given.endswith(".py") or os.path.isfile(given):
        return f"{said}. To watch that script: `gradwatch run {given}`"
    return f"{said}. `gradwatch --help` tells what they do"


if __name__ == "__main__":
    sys.exit(main())
