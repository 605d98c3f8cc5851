"""The memory of a solve on a CPU: pages that are given back to the system after every application of A are lost time.

A convolution of a 2 MB vector takes some 10 MB for its result and for the layouts in between, and frees them; the next
one takes them again. glibc's malloc gives the free end of its heap back to the system as soon as it is longer than a
threshold, and then every page comes back through a page fault, zeroed: an iteration takes twice its time (8 channels
of 256 x 256, 3x3: 2000 faults, 7.7 ms in place of 3.7), or not, as the layout of the heap has it.

The threshold is no constant. malloc learns it: a block that it had taken from the system on its own and that is freed
will come again, so from then on blocks of that size are kept, and twice as much at the end of the heap (mallopt(3),
"Note on dynamic adjustment"). It learns that from whoever frees the largest block that it believes in, 32 MB, first.
Here that is a block that nobody has written to, which therefore never had a page. What the process may keep for itself
grows to 64 MB by that. Nothing happens where the thresholds have been set by hand, nor in other allocators. Blocks of
more than 32 MB (8 channels of 768 x 768) go back to the system at all times, unless MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ in the environment of the process say otherwise.
"""

from __future__ import annotations

import functools

import torch

__all__ = ["keep_pages"]

# malloc believes in blocks up to 32 MB with what it writes before them, rounded up to pages.
_LARGEST = 2**25 - 2**16


@functools.cache
def keep_pages() -> None:
    """Let malloc keep what temporaries leave behind, from the first solve of a process on."""
    torch.empty(_LARGEST, dtype=torch.uint8)
