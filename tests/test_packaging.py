"""What is shipped, which way imports run, and what importing and creating cost."""

import ast
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import poolskip_zoo

ROOT = Path(__file__).resolve().parent.parent
# Top-level folders that are installed as sub-packages.
BESIDE = [name for name in ("registry", "export") if (ROOT / name / "__init__.py").is_file()]

# Package to those it may import from; itself and what these may import go without saying.
MAY_IMPORT = {
    "layers": set(),
    "data": {"contexts"},
    "models": {"layers"},
    "contexts": set(),
    "pictures": {"contexts"},
    "registry": {"models", "data"},
    "study": {"registry", "contexts", "pictures"},
    "training": {"registry", "data", "inference", "study", "contexts", "pictures"},
    "hub": {"registry", "diagnostics", "recipes"},
    "diagnostics": {"layers", "contexts", "pictures"},
    "export": {"layers", "contexts"},
    "samples": set(),
    "recipes": set(),
    "inference": {"registry", "data"},
    "pruning": {"diagnostics", "models"},
}


def folders() -> dict[str, Path]:
    """Every package of the tree, by its installed name."""
    roots = {"poolskip_zoo": ROOT / "poolskip_zoo", **{f"poolskip_zoo.{name}": ROOT / name for name in BESIDE}}
    found = {}
    for package, root in roots.items():
        for init in root.rglob("__init__.py"):
            inner = init.parent.relative_to(root).parts
            found[".".join((package, *inner))] = init.parent
    return found


def sources() -> list[tuple[str, Path]]:
    return [(package, file) for package, folder in folders().items() for file in sorted(folder.glob("*.py"))]


def read_toml(path: Path) -> dict:
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no tomllib")
    import tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pyproject():
    return read_toml(ROOT / "pyproject.toml")


@pytest.fixture(scope="module")
def setuptools_table(pyproject):
    return pyproject["tool"]["setuptools"]


def test_every_package_of_the_tree_is_installed(setuptools_table):
    # The cards are files alone: weights are another distribution.
    assert sorted(setuptools_table["packages"]) == sorted([*folders(), "poolskip_zoo.hub_cards"])
    assert setuptools_table["package-dir"] == {
        "poolskip_zoo": "poolskip_zoo",
        "poolskip_zoo.hub_cards": "hub_cards",
        **{f"poolskip_zoo.{name}": name for name in BESIDE},
    }


def test_every_source_file_is_in_a_package_and_every_data_file_is_declared(setuptools_table):
    inside = {file for _, file in sources()}
    for root in (ROOT / "poolskip_zoo", *(ROOT / name for name in BESIDE)):
        assert {file for file in root.rglob("*.py") if "__pycache__" not in file.parts} <= inside
        for file in root.rglob("*"):
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                inside_of = [(p, f) for p, f in folders().items() if f in file.parents]
                package, folder = max(inside_of, key=lambda pair: len(pair[1].parts))
                patterns = setuptools_table["package-data"].get(package, [])
                assert any(file in folder.glob(pattern) for pattern in patterns), f"{file} would not be installed"


def test_weights_stay_within_their_budget():
    """160 MB in the tree and 200 MB over its history, so that a clone stays light."""
    folder = ROOT / "hub_cards"
    assert sum(file.stat().st_size for file in folder.rglob("*.*") if file.is_file()) <= 160e6
    git = ["git", "-C", str(ROOT)]
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: the history is not here")
    listed = subprocess.run(
        [*git, "rev-list", "--objects", "--all", "--", "hub_cards"], capture_output=True, check=True
    )
    names = b"\n".join(line.partition(b" ")[0] for line in listed.stdout.splitlines())
    sizes = subprocess.run(
        [*git, "cat-file", "--batch-check=%(objectsize)"], input=names, capture_output=True, check=True
    )
    assert 0 < sum(map(int, sizes.stdout.split())) <= 200e6


def built(folder: Path, *kinds: str) -> Path:
    """The last of the distributions that setuptools makes of a folder, `wheel` or `sdist` each."""
    pytest.importorskip("setuptools", minversion="77")
    for kind in kinds:
        code = f"from setuptools import build_meta; print('made', build_meta.build_{kind}('.'))"
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "would be ignored" not in done.stderr
        made = folder / re.findall(r"^made (.+)$", done.stdout, re.M)[-1]
        if kind == "sdist":
            shutil.unpack_archive(made, folder / "unpacked")
            folder = next((folder / "unpacked").iterdir())
    return made


def contents(wheel: Path) -> set[str]:
    """Names of a wheel's files, without the folder of its metadata but with the licences there."""
    with zipfile.ZipFile(wheel) as opened:
        names = [name for name in opened.namelist() if ".dist-info/" not in name or "/licenses/" in name]
    return {name.rpartition("/licenses/")[2] for name in names}


def test_the_wheel_of_the_sdist_has_the_packages_and_nothing_else(tmp_path, setuptools_table):
    tree = tmp_path / "tree"
    for name in ("poolskip_zoo", *BESIDE, "hub_cards", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    # What other programs leave behind: weights are another distribution, whatever an old egg-info says.
    (tree / "hub_cards/resnet20_cifar.c10/model.safetensors").touch()
    (tree / "poolskip_zoo/notes.txt").touch()
    (tree / "poolskip_zoo.egg-info").mkdir()
    (tree / "poolskip_zoo.egg-info/SOURCES.txt").write_text(
        "hub_cards/resnet20_cifar.c10/model.safetensors\npoolskip_zoo/notes.txt\n"
    )
    expected = {"LICENSE", "NOTICE"}
    for package, folder in {**folders(), "poolskip_zoo.hub_cards": ROOT / "hub_cards"}.items():
        for pattern in ("*.py", *setuptools_table["package-data"].get(package, [])):
            expected.update(f"{package.replace('.', '/')}/{f.relative_to(folder)}" for f in folder.glob(pattern))
    assert contents(built(tree, "sdist", "wheel")) == expected
    # Tests without the files that they read would be of no use there.
    assert not list(tree.glob("unpacked/*/tests"))


def test_the_wheel_of_weights_has_the_checkpoints_and_nothing_else(tmp_path):
    # As `make weights-wheel` lays it out.
    package = tmp_path / "poolskip_zoo_weights"
    shutil.copy(ROOT / "hub_cards/pyproject.toml", tmp_path)
    files = {"README.md", "SHA256SUMS", "config.json", "golden.safetensors", "model.safetensors"}
    for name in (*(f"x.c10/{file}" for file in files), "x.c10/model.safetensors.tmp", "__pycache__/x.pyc"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / "__init__.py").touch()
    for name in ("LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    expected = {f"poolskip_zoo_weights/{name}" for name in ("__init__.py", *(f"x.c10/{file}" for file in files))}
    assert contents(built(tmp_path, "wheel")) == {*expected, "LICENSE", "NOTICE"}


# --- what it requires


def bounds(requirements: list[str]) -> dict[str, str]:
    """Name, in one spelling, to the lowest version."""
    parts = (re.fullmatch(r"([\w.-]+)(?:>=([\w.]+))?", each) for each in requirements)
    return {match[1].lower().replace("_", "-"): match[2] for match in parts if match}


def test_the_lowest_versions_are_those_that_are_tested(pyproject):
    project = pyproject["project"]
    extras = [project["optional-dependencies"][name] for name in ("train", "export", "prune")]
    lowest = bounds([*project["dependencies"], *(each for extra in extras for each in extra)])
    pinned = re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "tests/lowest.txt").read_text(encoding="utf-8"), re.M)
    tested = {name.lower().replace("_", "-"): version for name, version in pinned}
    assert lowest.keys() == tested.keys() - {"torchvision"}  # torch's own, in step with it
    for name, version in lowest.items():
        assert tested[name] in (version, f"{version}.0"), name


def test_dev_has_what_tests_import_or_skip(pyproject):
    """Else they would skip wherever `make test` made the environment, and nobody would see it."""
    extras = pyproject["project"]["optional-dependencies"]
    known = bounds([*pyproject["project"]["dependencies"], *(r for e in extras.values() for r in e)])
    assert extras["dev"][0] == "poolskip-zoo[prune,train,export]"
    wanted = {
        name.partition(".")[0].replace("_", "-")
        for file in (ROOT / "tests").glob("*.py")
        for name in re.findall(r'importorskip\("([\w.]+)"', file.read_text(encoding="utf-8"))
    }
    assert wanted - {"triton"} <= known.keys()  # which comes with torch where it runs


def test_extras_that_errors_and_documents_name_exist(pyproject):
    places = [file for _, file in sources()] + [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = [
        names for file in places for names in re.findall(r"poolskip-zoo\[([\w,]+)\]", file.read_text(encoding="utf-8"))
    ]
    assert len(named) > 5
    extras = pyproject["project"]["optional-dependencies"]
    assert {each for names in named for each in names.split(",")} <= extras.keys()


def test_versions_agree(pyproject):
    weights = read_toml(ROOT / "hub_cards/pyproject.toml")
    assert pyproject["project"]["version"] == poolskip_zoo.__version__ == weights["project"]["version"]


def test_it_is_typed(setuptools_table):
    assert (ROOT / "poolskip_zoo/py.typed").is_file()
    assert "py.typed" in setuptools_table["package-data"]["poolskip_zoo"]


# --- imports


def imported(package: str, file: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, by absolute name."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *(node.module or "").split(".")]).strip(".")
            # `from .. import data` names the sub-package behind the `import`.
            names.update({base} if node.module else {f"{base}.{alias.name}" for alias in node.names})
    return {name for name in names if name.partition(".")[0] == "poolskip_zoo"}


def area(module: str) -> str:
    """The sub-package or top-level module, "" for names of the package itself."""
    first = module.split(".")[1] if "." in module else ""
    known = {package.split(".")[1] for package in folders() if "." in package}
    return first if first in known or (ROOT / "poolskip_zoo" / f"{first}.py").is_file() else ""


def closure(name: str) -> set[str]:
    return {name}.union(*(closure(each) for each in MAY_IMPORT[name]))


def areas() -> list[str]:
    packages = {package.split(".")[1] for package in folders() if "." in package}
    modules = {file.stem for file in (ROOT / "poolskip_zoo").glob("*.py") if not file.stem.startswith("__")}
    return sorted(packages | modules)


def test_every_area_has_a_rule():
    assert {*areas()} == {*MAY_IMPORT, "cli"}


@pytest.mark.parametrize("name", areas())
def test_imports_run_one_way(name):
    for package, file in sources():
        own = package.split(".")[1] if "." in package else file.stem
        if own != name:
            continue
        used = {area(module) for module in imported(package, file)} - {""}
        allowed = {*MAY_IMPORT, "cli"} if name == "cli" else closure(name)
        assert used <= allowed, f"{file} imports {used - allowed}; {name} may import {allowed}"


def test_nothing_imports_registry_or_export_by_a_bare_name():
    for _, file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                tops = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops = {(node.module or "").partition(".")[0]}
            else:
                continue
            assert not tops & {"registry", "export"}, f"{file}: installed, there is no such package"


# --- running it


def run(code: str, *flags: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_leaves_optional_libraries_alone():
    optional = "accelerate matplotlib tensorboard tqdm onnx onnxruntime onnxscript segmentation_models_pytorch monai"
    code = f"""
import sys, timm
before = set(sys.modules)
import poolskip_zoo
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & set({optional.split()!r})))
print(sorted(name for name in sys.modules if name.startswith("poolskip_zoo.")))
"""
    optional_loaded, modules = run(code).splitlines()
    assert optional_loaded == "[]"
    assert not [m for m in ast.literal_eval(modules) if m.split(".")[1] in ("cli", "training", "hub", "diagnostics")]


def test_parts_are_imported_when_they_are_asked_for():
    asked = "poolskip_zoo.diagnostics.diagnose, poolskip_zoo.export.to_onnx, poolskip_zoo.inference.Classifier"
    run(f"import poolskip_zoo; {asked}, poolskip_zoo.pruning.prune_inert, poolskip_zoo.training.train")
    run("import poolskip_zoo; assert not hasattr(poolskip_zoo, 'exports')")


def test_a_stray_import_of_the_folder_fails_loudly():
    done = subprocess.run([sys.executable, "-c", "import registry"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode
    assert "relative import" in done.stderr


def seconds(code: str) -> float:
    start = time.perf_counter()
    run(code)
    return time.perf_counter() - start


def interleaved(runs: int, *codes: str) -> list[float]:
    """Smallest time of each of several programs, run in turn so that a busy machine slows all of them."""
    times = [[seconds(code) for code in codes] for _ in range(runs)]
    return [min(column) for column in zip(*times, strict=True)]


@pytest.mark.slow
def test_import_time():
    timm, ours = interleaved(7, "import timm", "import poolskip_zoo")
    print(f"import poolskip_zoo {ours:.2f} s, import timm {timm:.2f} s: {ours / timm:.3f}×")
    assert ours <= 1.15 * timm


@pytest.mark.slow
def test_creation_time():
    """Of resnet50_poolskip: 1.3 × resnet50 plus the time to initialise the extra parameters."""
    code = """
import time, torch, timm, poolskip_zoo
from poolskip_zoo.layers import pool_skip_modules
torch.set_num_threads(1)
def once(f):
    start = time.perf_counter(); f(); return time.perf_counter() - start
layers = pool_skip_modules(timm.create_model("resnet50_poolskip", device="meta")).values()
def extra():
    for layer in layers:
        torch.nn.Conv2d(layer.conv.in_channels, layer.conv.out_channels, 3, groups=layer.conv.groups)
programs = [lambda: timm.create_model("resnet50"), lambda: timm.create_model("resnet50_poolskip"), extra]
times = [[once(f) for f in programs] for _ in range(9)]
print(*(min(column) for column in zip(*times)))
"""
    base, ours, extra = map(float, run(code).split())
    print(f"resnet50 {base:.3f} s, its extra parameters {extra:.3f} s, resnet50_poolskip {ours:.3f} s")
    assert ours <= 1.3 * base + extra
