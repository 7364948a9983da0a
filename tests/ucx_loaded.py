"""Imported by a process that others are forked from: they find UCX loaded, which takes time, and not in use."""

from asyncxfer import Config
from asyncxfer.backends import _ucx_library

_ucx_library.load(Config.load())
