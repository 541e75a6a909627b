"""Finds and loads the C++ extension, or says why it can't.

The extension is one shared object beside this file. It holds no Python: loading it registers its kernels with torch.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_native.abi3.so")

REBUILD = (
    "pip install --no-build-isolation --force-reinstall --no-deps trilby (or `make` in a checkout), with a C++ compiler"
)


@dataclass(frozen=True)
class Native:
    """The state of the C++ extension in this process.

    Attributes:
        loaded: Whether its kernels are registered with torch.
        reason: Why not, if not; empty otherwise.
    """

    loaded: bool
    reason: str = ""

    @property
    def levels(self) -> tuple[str, ...]:
        """The instruction-set levels that this machine can run, worst first."""
        return tuple(torch.ops.trilby.cpu_levels().split()) if self.loaded else ()

    @property
    def why_not_amx(self) -> str:
        """Why the level `amx` is not among them; empty where it is, or where there are none."""
        return str(torch.ops.trilby.why_not_amx()) if self.loaded else ""

    @property
    def multiplies_pairs_fast(self) -> bool:
        """Whether vectors of this processor multiply bfloat16 (level `avx512bf16`) faster than float32."""
        return self.loaded and bool(torch.ops.trilby.multiplies_pairs_fast())

    @property
    def level(self) -> str:
        """The instruction-set level in use."""
        return str(torch.ops.trilby.cpu_level()) if self.loaded else ""

    def use_level(self, level: str) -> None:
        """Run `level` from now on.

        Raises:
            ValueError: If this machine or this build lacks it.
        """
        if not self.loaded or not torch.ops.trilby.use_cpu_level(level):
            raise ValueError(f"level was {level!r}; this machine has {', '.join(self.levels) or 'none'}")


def load() -> Native:
    """Load the extension. Its absence is no error; a file that does not load gives one warning and is left alone."""
    if not LIBRARY.exists():
        return Native(False, "the C++ extension was not built when trilby was installed")
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as failure:
        reason = f"the C++ extension does not load: {failure}"
        warnings.warn(f"trilby: {reason}. PyTorch's own kernels run instead; to mend it: {REBUILD}", stacklevel=2)
        return Native(False, reason)
    native = Native(True)
    forced = os.environ.get("TRILBY_CPU_ISA")
    if forced is not None and forced != native.level:
        raise ValueError(f"TRILBY_CPU_ISA was {forced!r}; this machine has {', '.join(native.levels)}")
    return native
