"""What a GPU would be asked, asked of one that is only pretended (tests/pretended_gpu.cpp): a machine without CUDA tries CUDA's paths, too."""

import shutil
import subprocess
import sys
from pathlib import Path

import pretended_gpu
import pytest
import torch

HERE = Path(__file__).parent


pytestmark = [
    pytest.mark.skipif(not shutil.which(pretended_gpu.COMPILER), reason="the pretended GPU is compiled"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built for CUDA, which the pretended GPU stands in for"),
]


def on_it(*command: str) -> str:
    """Run a module there; what it printed."""
    done = subprocess.run([sys.executable, pretended_gpu.__file__, *command], cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_what_only_a_gpu_can_show_holds_on_a_pretended_one():
    said = on_it("pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_cuda.py")
    assert " passed" in said and "skipped" not in said


COMMANDS = {
    "gpu_check plans --steps 2": "peak_allocated_gb",
    "gpu_check generate": "median_ms",
    "gpu_train --steps 2": "median_seconds",
    "bench_captions --rounds 2": "seconds",
}
"""A script that a lease of a GPU is spent on, and a figure that it writes."""


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_lease_of_a_gpu_is_spent_on_runs_to_its_end(command: str, tmp_path: Path):
    name, *options = command.split()
    out = tmp_path / "figures.json"
    on_it(f"scripts.{name}", *options, "--tiny", "--out", str(out))
    written = out.read_text(encoding="utf-8")
    assert COMMANDS[command] in written and not any(word in written for word in ("failed", "refused", "out_of_memory"))
