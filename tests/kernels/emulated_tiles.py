"""A pytest plugin, for a process with tile_unit.cpp preloaded: trilby finds a tile unit when it is imported."""

import ctypes
import os

unit = ctypes.CDLL(os.environ["LD_PRELOAD"])
unit.pretend.restype = ctypes.c_bool  # an int's other bytes are not set
if not unit.pretend(True):
    raise OSError("CPUID does not fault on this machine")
from trilby.kernels.ops import NATIVE  # noqa: E402

level = NATIVE.level
unit.pretend(False)
