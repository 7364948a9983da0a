from __future__ import annotations
from asyncxfer.testing import FileContract

class TestRing(FileContract):
    route = "uring:ring"

class TestThreads(FileContract):
    route = "uring:threads"

class TestDirect(FileContract):
    route = "uring:ring"
    direct = True
    durability = "data"
