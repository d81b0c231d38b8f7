"""What a GPU would be asked, asked of one that is only pretended (tests/pretended_gpu.cpp): a machine without CUDA tries CUDA's paths, too."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pretended_gpu
import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(not shutil.which(pretended_gpu.COMPILER), reason="the pretended GPU is compiled")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built for CUDA, which the pretended GPU stands in for")
def test_what_only_a_gpu_can_show_holds_on_a_pretended_one():
    command = [sys.executable, pretended_gpu.__file__, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False, env=os.environ | {"PYTEST_ADDOPTS": ""})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
