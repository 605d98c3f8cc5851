"""A solve on a CPU does not give its pages back to the system between two applications of its operator."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="this is about glibc's malloc"
)

# A process of its own, whose malloc knows nothing yet. The operator holds five vectors of 2 MB and frees them, more
# than malloc keeps at first. The first applications still find no free block that fits; the later half is counted.
_PROGRAM = """
import resource, warnings
import torch, lsconv

torch.set_num_threads(1)
diagonal = torch.logspace(0, -3, 2**19)
faults = []

def apply(x):
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    a = diagonal * x
    b = a * 2
    c = b * 2
    d = c * 2
    return d - c

warnings.simplefilter("ignore")
A = lsconv.FromFunctions((2**19,), (2**19,), apply, apply)
getattr(lsconv, METHOD)(A, torch.linspace(1, 2, 2**19), max_iter=40, rtol=0)
assert len(faults) > 80
print((faults[80] - faults[40]) // 40)
"""


@glibc
@pytest.mark.parametrize("method", ["cgls", "lsqr"])
def test_an_application_finds_its_pages_where_the_last_one_left_them(method: str) -> None:
    program = f"METHOD = {method!r}\n{_PROGRAM}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 100  # of 512 in each of five vectors
