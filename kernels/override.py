"""Kernels in PyTorch's dispatcher that stand above those of before, for as long as anyone wants them, and quietly."""

import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.library import Library, get_kernel

_LOCK = threading.RLock()


@dataclass(frozen=True, eq=False)
class Override:
    """Kernels that are in place for as long as anyone holds them.

    Attributes:
        provide: Puts them above what is there.
        withdraw: Takes them away again.
        on_top: Whether they stay above others that come later.
        holders: Who wants them.
    """

    provide: Callable[[], None]
    withdraw: Callable[[], None]
    on_top: bool = False
    holders: set[object] = field(default_factory=set)

    def hold(self, holder: object) -> None:
        """Put the kernels in place, if nobody held them before."""
        with _LOCK:
            if not self.holders:
                self._arrange(self.provide)
            self.holders.add(holder)

    def release(self, *holders: object) -> None:
        """Take the kernels away, if nobody else holds them; `holders` may have let go before."""
        with _LOCK:
            held = bool(self.holders)
            self.holders.difference_update(holders)
            if held and not self.holders:
                self._arrange(self.withdraw)

    def _arrange(self, change: Callable[[], None]) -> None:
        """`change` what is below the kernels that stay on top: they know what is below, and are put there anew."""
        above = [override for override in _on_top if override is not self]
        for override in above:
            override.withdraw()
        _without_warning(change)
        for override in reversed(above):
            _without_warning(override.provide)
        if self.on_top:
            _on_top[:] = [*above, self] if change == self.provide else above


_on_top: list[Override] = []  # those held that are to stay above


def release_all(*overrides: Override) -> None:
    """Take the kernels of `overrides` away, whoever holds them."""
    with _LOCK:
        for override in overrides:
            override.release(*override.holders)


def _without_warning(change: Callable[[], None]) -> None:
    """Call `change`, and let PyTorch not warn that kernels are overridden: that is what was asked for.

    PyTorch warns once a process, from C++, past Python's filters. So the warning is used up on an operator of trilby,
    overridden from Python, before `change` comes.
    """
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            libraries = [Library("trilby", kind) for kind in ("FRAGMENT", "IMPL", "IMPL")]
            libraries[0].define("overridden() -> ()")
            for library in libraries[1:]:
                library.impl("overridden", lambda: None, "CPU", allow_override=True)
        for library in reversed(libraries):
            library._destroy()
        change()
    finally:
        torch.set_warn_always(always)


class StandIn(Protocol):
    """A call of an operator of PyTorch's that trilby may compute; made of the operator's arguments."""

    def reasons_for_pytorch(self) -> Iterable[str]:
        """Every reason why it stays PyTorch's; the first that comes decides."""

    def compute(self) -> Any:
        """What the operator returns, by trilby."""


def has_kernel(operator: str, key: str) -> bool:
    """Whether this torch has a kernel for the dispatch key, if only one that composes others."""
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, key)


def has_kernel_of_its_own(operator: str, key: str) -> bool:
    """Whether this torch has a kernel for this very dispatch key: one without CUDA has none for CUDA's."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def stand_in(operator: str, keys: tuple[str, ...], call: Callable[..., StandIn]) -> Library:
    """Put trilby in PyTorch's place for `operator` until the library is destroyed.

    What trilby does not compute runs the kernel that was there before. They are stacked on purpose, which older
    PyTorch refuses where it is not said.
    """
    namespace, name = operator.split("::")
    library = Library(namespace, "IMPL")
    for key, below in [(key, get_kernel(operator, key)) for key in keys]:

        def kernel(keyset: torch._C.DispatchKeySet, *given: Any, _below: Any = below, **named: Any) -> Any:
            asked = call(*given, **named)
            if any(asked.reasons_for_pytorch()):
                return _below.call_boxed(keyset, *given, **named)
            return asked.compute()

        library.impl(name, kernel, key, with_keyset=True, allow_override=True)
    return library
