"""The number of a worker's requests in flight. It keeps it up; its parent reads it, also when the worker has died."""

import mmap
import os

SIZE = 8
"""Bytes."""


def new_count() -> int:
    """Return the descriptor of new memory for the number, which two processes can share."""
    descriptor = os.memfd_create("in-flight")
    os.truncate(descriptor, SIZE)
    return descriptor


def count_in(descriptor: int) -> memoryview:
    """Return the number in the memory of a descriptor, as a sequence of one."""
    return memoryview(mmap.mmap(descriptor, SIZE)).cast("Q")
