"""Run a script or module with the Pool Skip models registered: `python -m poolskip_zoo train.py …`, `… -m MODULE …`."""

import runpy
import sys
from pathlib import Path

_USAGE = "usage: python -m poolskip_zoo SCRIPT [ARGS…]  or  python -m poolskip_zoo -m MODULE [ARGS…]"


def main() -> None:
    """Run what the command line names as `__main__`, as python itself would.

    Raises:
        SystemExit: with a line of usage if nothing is named or the script does not exist.
    """
    import poolskip_zoo  # noqa: F401

    arguments = sys.argv[1:]
    if arguments[:1] == ["-m"] and len(arguments) > 1:
        sys.argv = arguments[1:]
        # python -m puts the working directory first, which it already is here.
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments and not arguments[0].startswith("-"):
        script = Path(arguments[0])
        if not script.is_file():
            raise SystemExit(f"poolskip_zoo: no such script: {script}\n{_USAGE}")
        sys.argv = arguments
        # python SCRIPT puts the script's folder first, in place of the working directory.
        sys.path[0] = str(script.resolve().parent)
        runpy.run_path(str(script), run_name="__main__")
    else:
        raise SystemExit(_USAGE)


if __name__ == "__main__":
    main()
