"""Whose kernels are compiled, and for what: ours, and public ones where they are installed or pointed at.

Each is asked through its own public function, with tensors on the meta device, so that its own host code chooses what
is launched. None of their code is here.
"""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from trilby.kernels import gpu
from trilby.kernels.gpu.attention_launch import attention_forward_by_descriptor_tiles
from trilby.kernels.gpu.attention_tiles import AttentionTiles
from trilby.kernels.gpu.targets import TARGETS
from trilby.kernels.options import AttentionOptions

OURS = "trilby"
OURS_BY_DESCRIPTOR = "trilby by descriptor"  # the forward's other launch choice, off by default
TUTORIAL = "Triton's tutorial"
FLASH_ATTENTION = "flash-attn"
LIGER = "Liger"

# Matrix products over the head dimension that a score costs in each loop of a kernel, in program order; the last
# number holds for the loops that follow. Forward: Q K^T and P V. Backward of key and value: Q K^T, dO V^T, P^T dO and
# dS^T Q; of query: Q K^T, dO V^T and dS K; all in one loop: 5.
PRODUCTS = {
    "attention_forward_kernel": (2,),
    "attention_backward_key_value_kernel": (4,),
    "attention_backward_query_kernel": (3,),
    "_attn_fwd": (2,),
    "_attn_bwd": (4, 4, 3),
    "_fwd_kernel": (2,),
    "_bwd_kernel": (5,),
}

# A project, what launches a norm of so many rows, and the kernels of its forward and backward.
Run = tuple[str, Callable[..., object], str, str]
# Batch, heads and positions that attention is compiled for: they change no code, but some kernels want them so.
B, H, T = 2, 16, 4096
# Rows that norms are compiled for: no two of them should need code of their own.
ROWS = (4096, 5000, 8208)


@dataclass(frozen=True)
class Subject:
    """A kernel, or those of one operation.

    Attributes:
        project: Whose.
        operation: What, the same for all who are compared.
        run: Launches it; called anew for every target, norms with the number of rows.
        kernels: Names of the kernels of interest among those that are launched.
        head_dim: Of attention.
        width: Of norms.
        programs: Of norms: how many programs walk over so many rows on so many multiprocessors; none: one for each row.
        targets: Names of those that it is for; none: all.
    """

    project: str
    operation: str
    run: Callable[..., object]
    kernels: tuple[str, ...]
    head_dim: int = 0
    width: int = 0
    programs: Callable[[int, int], int] | None = None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Places:
    """Where public kernels are that are not installed: a file, a package's folder; none: they are left out."""

    tutorial: Path | None = None
    flash_attention: Path | None = None


def attention_subjects(head_dim: int, places: Places) -> list[Subject]:
    """Causal attention, forward and backward, in half precision."""
    forward, backward = f"attention forward D {head_dim}", f"attention backward D {head_dim}"
    ours, our_kernels = partial(_our_attention, head_dim), ("attention_forward_kernel",)
    ours_backward = ("attention_backward_key_value_kernel", "attention_backward_query_kernel")
    found = [
        Subject(OURS, forward, ours, our_kernels, head_dim),
        Subject(OURS, backward, ours, ours_backward, head_dim),
    ]
    for target in TARGETS.values():
        tiles = attention_forward_by_descriptor_tiles(target, torch.bfloat16, head_dim)
        if tiles is not None:
            run = partial(_our_forward, head_dim, tiles)
            found.append(Subject(OURS_BY_DESCRIPTOR, forward, run, our_kernels, head_dim, targets=(target.name,)))
    for project, place, function, kernels in (
        (TUTORIAL, places.tutorial, _tutorial, ("_attn_fwd", "_attn_bwd")),
        (FLASH_ATTENTION, places.flash_attention, _flash_attention, ("_fwd_kernel", "_bwd_kernel")),
    ):
        if place is not None:
            run = partial(function, place, head_dim)
            found += [
                Subject(project, operation, run, (kernel,), head_dim)
                for operation, kernel in zip((forward, backward), kernels)
            ]
    return found


def norm_subjects(width: int) -> list[Subject]:
    """Layer norm, RMS norm and the residual add fused into them, forward and backward, in bfloat16."""
    found = []
    for operation, centered, adds in (
        ("layer norm", True, False),
        ("RMS norm", False, False),
        ("add + layer norm", True, True),
        ("add + RMS norm", False, True),
    ):
        runs: list[Run] = [
            (OURS, partial(_our_norm, width, centered, adds), "norm_forward_kernel", "norm_backward_kernel")
        ]
        if _is_installed("liger_kernel"):
            runs += _liger(width, centered, adds)
        for project, run, forward, backward in runs:
            # Its host code asks a tensor on the meta device for multiprocessors, and finds one.
            programs = (lambda rows, processors: processors) if project == LIGER else None
            found += [
                Subject(project, f"{operation} forward N {width}", run, (forward,), width=width),
                Subject(project, f"{operation} backward N {width}", run, (backward,), 0, width, programs),
            ]
    return found


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _our_attention(head_dim: int) -> None:
    query, key, value, options = _our_inputs(head_dim)
    output, logsumexp = gpu.attention(query, key, value, *options)
    gpu.attention_backward(torch.empty_like(output), query, key, value, output, logsumexp, *options)


def _our_forward(head_dim: int, tiles: AttentionTiles) -> None:
    query, key, value, options = _our_inputs(head_dim)
    gpu.attention(query, key, value, *options, tiles=tiles)


def _our_inputs(head_dim: int) -> tuple[Tensor, Tensor, Tensor, AttentionOptions]:
    """Query, key and value [B, H, T, D] in memory (B, T, H, D), and what is asked for."""
    query, key, value = (_meta(B, T, H, head_dim).detach().transpose(1, 2) for _ in range(3))
    return query, key, value, AttentionOptions.plain(True, 1 / math.sqrt(head_dim))


def _our_norm(width: int, centered: bool, adds: bool, rows: int) -> None:
    stream, weight = _meta(rows, width).detach(), _meta(width).detach()
    bias = weight if centered else None
    if adds:
        _, summed, mean, rstd = gpu.add_norm(stream, stream, weight, bias, None, 1, centered, 1e-5, 0.0)
    else:
        _, mean, rstd = gpu.norm(stream, weight, bias, 1, centered, 1e-5)
        summed = stream
    grad_summed = stream if adds else None
    gpu.norm_backward(stream, grad_summed, summed, mean, rstd, weight, bias, None, 1, centered, 0.0)


def _tutorial(file: Path, head_dim: int) -> None:
    """`attention(q, k, v, causal, sm_scale, …)` of Triton's fused-attention tutorial, float16 as it wants."""
    spec = importlib.util.spec_from_file_location("fused_attention_tutorial", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"tutorial is {file}; a Python file is needed")
    module = importlib.util.module_from_spec(spec)  # anew for every target: it asks for the device when it is imported
    spec.loader.exec_module(module)
    query, key, value = (_meta(B, H, T, head_dim, dtype=torch.float16) for _ in range(3))
    parameters = inspect.signature(module._attention.forward).parameters
    rest = [False] * ("warp_specialize" in parameters)
    output = module.attention(query, key, value, True, 1 / math.sqrt(head_dim), *rest)
    output.backward(torch.empty_like(output))


def _flash_attention(folder: Path, head_dim: int) -> None:
    """`flash_attn_func(q, k, v, bias, causal)` of flash-attn's Triton file, with [B, T, H, D]."""
    module = _of_package("flash_attn", folder, "flash_attn.flash_attn_triton")
    query, key, value = (_meta(B, T, H, head_dim) for _ in range(3))
    output = module.flash_attn_func(query, key, value, None, True)
    output.backward(torch.empty_like(output))


def _liger(width: int, centered: bool, adds: bool) -> list[Run]:
    """Liger has no fused add for layer norm."""
    from liger_kernel.ops import LigerFusedAddRMSNormFunction, LigerLayerNormFunction, LigerRMSNormFunction

    def layer_norm(rows: int) -> None:
        _backward(LigerLayerNormFunction.apply(_meta(rows, width), _meta(width), _meta(width), 1e-5))

    def rms_norm(rows: int) -> None:
        _backward(LigerRMSNormFunction.apply(_meta(rows, width), _meta(width), 1e-5))

    def add_rms_norm(rows: int) -> None:
        _backward(*LigerFusedAddRMSNormFunction.apply(_meta(rows, width), _meta(rows, width), _meta(width), 1e-5))

    if centered:
        return [] if adds else [(LIGER, layer_norm, "_layer_norm_forward_kernel", "_layer_norm_backward_kernel")]
    if adds:
        names = ("_fused_add_rms_norm_forward_kernel", "_fused_add_rms_norm_backward_kernel")
        return [(LIGER, add_rms_norm, *names)]
    return [(LIGER, rms_norm, "_rms_norm_forward_kernel", "_rms_norm_backward_kernel")]


def _backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def _of_package(package: str, folder: Path, name: str) -> ModuleType:
    """Import module `name`, anew, of a package that lies in `folder` without what it runs when it is imported itself:
    flash-attn's loads its compiled extension.
    """  # noqa: D205
    for loaded in [each for each in sys.modules if each == package or each.startswith(f"{package}.")]:
        del sys.modules[loaded]
    parent = ModuleType(package)
    parent.__path__ = [str(folder)]
    sys.modules[package] = parent
    return importlib.import_module(name)
