"""`python -m poolskip_zoo SCRIPT …` is `python SCRIPT …` with our models registered, and so is `-m MODULE`."""

import json
import os
import subprocess
import sys

import pytest

from poolskip_zoo.__main__ import main

SCRIPT = """
import json, os, sys
import helper_beside
# Under plain python nothing has imported timm.
names = sys.modules["timm"].list_models("test_*_poolskip") if "timm" in sys.modules else []
loaded = {"names": names, "name": __name__, "argv": sys.argv, "path": sys.path[0], "file": __file__,
          "main": sys.modules["__main__"].__dict__ is globals(), "package": __package__}
print(json.dumps(loaded))
if "--exit" in sys.argv:
    sys.exit(int(sys.argv[sys.argv.index("--exit") + 1]))
if "--raise" in sys.argv:
    raise KeyError("from the script")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main")
    (folder / "sub").mkdir()
    for place in (folder, folder / "sub"):
        (place / "script.py").write_text(SCRIPT)
        (place / "helper_beside.py").touch()
    (folder / "sub" / "__init__.py").touch()
    return folder


def run(folder, *arguments, before=("-m", "poolskip_zoo")):
    return subprocess.run([sys.executable, *before, *arguments], cwd=folder, capture_output=True, text=True)


# Plain python knows the same script without our names.
def both(folder, *arguments):
    ours, plain = run(folder, *arguments), run(folder, *arguments, before=())
    return ours, plain, json.loads(ours.stdout), json.loads(plain.stdout)


def test_a_script_runs_as_under_python(folder):
    ours, plain, seen, expected = both(folder, "sub/script.py", "--exit", "3", "-m", "--", "x y")
    assert "test_resnet_poolskip" in seen.pop("names")
    assert expected.pop("names") == []
    assert seen["main"]
    assert seen == expected
    assert (ours.returncode, plain.returncode) == (3, 3)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P is of 3.11")
def test_the_safe_path_stays(tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "of_the_user.py").touch()
    (tmp_path / "script.py").write_text("import of_the_user")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "library")}
    command = [sys.executable, "-P", "-m", "poolskip_zoo", "script.py"]
    assert subprocess.run(command, cwd=tmp_path, env=env).returncode == 0


def test_a_module_runs_as_under_python(folder):
    ours, plain, seen, expected = both(folder, "-m", "sub.script", "--exit", "4")
    assert "test_resnet_poolskip" in seen.pop("names")
    assert expected.pop("names") == []
    assert seen["main"]
    assert seen == expected
    assert (ours.returncode, plain.returncode) == (4, 4)


def test_errors_of_the_script_are_its_own(folder):
    done = run(folder, "script.py", "--raise")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("KeyError: 'from the script'")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "usage"),
        (["-m"], "usage"),
        (["-x"], "usage"),
        (["no_such.py"], "no such script: no_such.py"),
        (["-m", "no.such.module"], "no such module, or a package without __main__: no.such.module"),
        (["-m", "timm"], "a package without __main__: timm"),
    ],
)
def test_wrong_calls_are_one_line(monkeypatch, arguments, word):
    monkeypatch.setattr(sys, "argv", ["poolskip_zoo", *arguments])
    with pytest.raises(SystemExit, match=word) as error:
        main()
    assert "\n" not in str(error.value)


def test_a_module_whose_package_lacks_something_says_what(monkeypatch, tmp_path):
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "__init__.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["poolskip_zoo", "-m", "lacking.part"])
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        main()


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["poolskip_zoo", "--help"])
    main()
    assert capsys.readouterr().out.startswith("usage")


@pytest.mark.slow
def test_under_torchrun(folder):
    (folder / "ranks.py").write_text(
        "import os, timm, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "timm.create_model('test_resnet_poolskip')\n"
        "open(f'rank{dist.get_rank()}', 'w').write(os.environ['WORLD_SIZE'])\n"
        "dist.barrier(); dist.destroy_process_group()\n"
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run(folder, "-m", "poolskip_zoo", "ranks.py", before=torchrun)
    assert done.returncode == 0, done.stderr
    assert [(folder / f"rank{rank}").read_text(encoding="utf-8") for rank in (0, 1)] == ["2", "2"]
