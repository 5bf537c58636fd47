"""Run a script or module with the Pool Skip models registered: `python -m poolskip_zoo train.py …`, `… -m MODULE …`.

Processes that the script spawns (`multiprocessing` with `spawn` or `forkserver`) start anew and do not have the models;
forked ones and those of torchrun, which starts this module itself, do.
"""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

_USAGE = "usage: python -m poolskip_zoo SCRIPT [ARGS ...]  or  python -m poolskip_zoo -m MODULE [ARGS ...]"


def main() -> None:
    """Run what the command line names as `__main__`, as python itself would.

    Raises:
        SystemExit: with one line if nothing is named, or the script or module does not exist.
    """
    import poolskip_zoo  # noqa: F401

    arguments = sys.argv[1:]
    if arguments[:1] == ["-m"] and len(arguments) > 1:
        # python -m puts the working directory first, which it already is here.
        sys.argv = arguments[1:]
        if not _exists(arguments[1]):
            raise SystemExit(f"poolskip_zoo: no such module, or a package without __main__: {arguments[1]}")
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments and not arguments[0].startswith("-"):
        sys.argv = arguments
        _run_script(Path(arguments[0]))
    elif arguments in (["-h"], ["--help"]):
        print(_USAGE)
    else:
        raise SystemExit(_USAGE)


def _exists(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:  # a package runs by its __main__
            spec = importlib.util.find_spec(f"{module}.__main__")
        return spec is not None
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            return False
        raise  # the package is there, and what it imports is not


def _run_script(script: Path) -> None:
    # Not runpy.run_path: it leaves `__file__` relative, which a script that changes its directory cannot use.
    if not script.is_file():
        raise SystemExit(f"poolskip_zoo: no such script: {script} (the package's own command is `poolskip`)")
    # python SCRIPT puts the script's folder first, in place of the working directory; with -P neither is there.
    if not getattr(sys.flags, "safe_path", False):  # 3.11
        sys.path[0] = str(script.resolve().parent)
    module = ModuleType("__main__")
    module.__file__ = str(script.absolute())
    sys.modules["__main__"] = module
    exec(compile(script.read_bytes(), module.__file__, "exec"), module.__dict__)


if __name__ == "__main__":
    main()
