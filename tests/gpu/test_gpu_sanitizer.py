"""A small case of every kind of kernel under compute-sanitizer: no access outside of a tensor."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
HERE = Path(__file__).parent
# Sizes that are no multiple of anything, in one dtype, by each strategy and its backward.
SMALL = (
    "test_gpu_kernels.py::test_matches_oracle[packed-unaligned-torch.bfloat16-3]",
    "test_gpu_kernels.py::test_matches_oracle[split-conv-7x7-torch.bfloat16-3]",
    "test_gpu_kernels.py::test_matches_oracle[depthwise-mobile-stride-torch.bfloat16-3]",
    "test_gpu_kernels.py::test_fused_neuron[form0-True-2-torch.bfloat16]",
    "test_gpu_fused_convolutions.py::test_matches_oracle[strided-NHWC-torch.bfloat16-3]",
    "test_gpu_fused_convolutions.py::test_gradients[WALKED-strided-1-NHWC]",
    "test_gpu_tapes.py::test_a_tape_gives_the_bits_of_its_body[grouped-torch.bfloat16-candidate]",
    "test_gpu_full.py::test_every_site[conv2d-depthwise-torch.float32]",
)
SANITIZER = shutil.which("compute-sanitizer")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on the PATH")
def test_memcheck() -> None:
    cases = [f"{HERE / case}" for case in SMALL]
    quiet = ["-m", "gpu", "-p", "no:cacheprovider", "-q"]
    pytest_ = [sys.executable, "-m", "pytest", *quiet, *cases]
    checked = [str(SANITIZER), "--tool", "memcheck", "--error-exitcode", "9", *pytest_]
    # Torch's own allocator would hand out memory that goes on past the end of a tensor.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = subprocess.run(checked, env=env, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert f"{len(SMALL)} passed" in found.stdout
    assert "ERROR SUMMARY: 0 errors" in found.stdout
