"""The command `poolskip`: one module per verb, whose own imports wait until it runs."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType

from safetensors import SafetensorError

__all__ = ["main"]

# Every verb module has HELP, add_arguments(parser) and run(args) -> exit code, and imports what is heavy in run.
_VERBS = (
    *("list", "info", "predict", "validate", "pack", "train", "train-many", "export"),
    *("rewrite", "diagnose", "prune", "study", "demo", "hub"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: words of the command line without the program's name; None takes those of the process.

    Returns:
        The verb's own exit status, 0 on success; 2 after a ValueError, RuntimeError, OSError, ImportError or
        SafetensorError, told in one line on standard error; 130 if interrupted, 141 if nobody reads on.
    """
    if sys.stderr is None:  # closed, as `2>&-` or a service leaves it
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for the rest of the process
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows may lack × and …
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(prog="poolskip", description="Pool Skip models: list, inspect, train, evaluate.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in _VERBS:
        module = _module(verb)
        module.add_arguments(verbs.add_parser(verb, help=module.HELP, description=module.HELP))
    args = parser.parse_args(argv)
    try:
        code = _module(args.verb).run(args)
        _flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
        with suppress(OSError):
            _flush()
        return 141
    except (ValueError, RuntimeError, OSError, ImportError, SafetensorError) as error:
        print(f"poolskip: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        with suppress(OSError):
            _flush()
        return 2
    except KeyboardInterrupt:
        print("poolskip: interrupted", file=sys.stderr)
        return 130


def _flush() -> None:
    """Write what waits for standard output; where that fails, Python must not try again at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f".{verb.replace('-', '_')}", __name__)
