"""The benchmarks still run: one round of each, of which no number means anything.

python -m pytest -m slow tests/test_benchmarks.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


# Script, its words, and what it prints then.
RUNS = [
    ("operator_speed.py", "--only speed --rounds 1", "| (2, 256, 56, 56), 4 |"),
    ("model_speed.py", "--size 64 --batch 1 --rounds 1", "| `resnet50_poolskip` |"),
    ("training_settings.py", "--batch 2 --rounds 1", "| + compiled |"),
    ("accuracy_latency.py", "--rounds 1 --output OUT/picture.png", "resnet20_cifar_poolskip"),
    ("fold.py", "--rounds 1", "| 512×8×8 |"),
    ("export_latency.py", "operator --runs 1 --static", "onnxruntime operator fixed index: "),
    ("runtime_latency.py", "onnxruntime --rounds 1", "onnxruntime scatter: "),
    ("existing_tools.py", "--name test_resnet_poolskip --tools torch.export", "| torch.export"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "words", "said"), RUNS)
def test_it_runs(script: str, words: str, said: str, tmp_path: Path) -> None:
    if script in ("export_latency.py", "runtime_latency.py"):
        pytest.importorskip("onnxruntime")
    command = [sys.executable, ROOT / "benchmarks" / script, *words.replace("OUT", str(tmp_path)).split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "TERM": "dumb"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout


def test_every_benchmark_is_run() -> None:
    """But those that need environments of their own, and what they share."""
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts - {script for script, *_ in RUNS} == {"tf2onnx_segnet.py", "onnx_files.py", "turns.py"}
