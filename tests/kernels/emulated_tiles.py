"""A pytest plugin, for a process with tile_unit.cpp preloaded: trilby finds a tile unit when it is imported."""

import ctypes
import os

import torch  # before anything is pretended: its own kernels have no use for a tile unit in software

unit = ctypes.CDLL(os.environ["LD_PRELOAD"])
if not unit.pretend(True):
    raise OSError("CPUID does not fault on this machine")
from trilby.kernels.ops import NATIVE  # noqa: E402

levels = NATIVE.levels
unit.pretend(False)
