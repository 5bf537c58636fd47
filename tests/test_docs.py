"""Every code block of the pages runs, and the tables say what the registry says."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import poolskip_zoo
import poolskip_zoo.export

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_blocks_run(page):
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


# The page of all models takes about a minute: pytest -m slow tests/test_docs.py
@pytest.mark.parametrize(
    "name", ["README.md", "docs/results.md", pytest.param("docs/models.md", marks=pytest.mark.slow)]
)
def test_tables_are_current(name):
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    make_tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tables)
    assert name in make_tables.PAGES
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == make_tables.renewed(name), f"{name} is not what `make tables` writes"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_docstring_examples_run():
    packages = (poolskip_zoo, poolskip_zoo.registry, poolskip_zoo.export)  # the latter two lie beside it in a checkout
    names = {m.name for each in packages for m in pkgutil.walk_packages(each.__path__[:1], f"{each.__name__}.")}
    results = [doctest.testmod(importlib.import_module(name)) for name in sorted(names) if "__main__" not in name]
    assert sum(result.attempted for result in results) > 10
    assert not any(result.failed for result in results)
