"Work done without the rights of a superuser, who may write anywhere."
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unprivileged() -> Iterator[None]:
    "Within the block another user does the work, if this one is a superuser."
    me = os.geteuid()
    if me == 0: os.seteuid(65534)
    try: yield
    finally: os.seteuid(me)
