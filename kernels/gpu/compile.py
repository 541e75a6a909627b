"""Compile any launch for any GPU, with no GPU at hand, and read in the machine code what became of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .assembly import Instruction, Program
from .call import Call
from .targets import Target

TRITON_DTYPE = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}

# The instructions that multiply matrices, as they read in SASS or in AMD's assembly. Hopper's and Blackwell's own
# take 64 rows at least; smaller tiles use Ampere's there too.
MATRIX_INSTRUCTION = {
    "sm_80": r"\bHMMA\.",
    "sm_86": r"\bHMMA\.",
    "sm_89": r"\bHMMA\.",
    "sm_90": r"\bHG?MMA\.",
    "sm_100": r"\b(?:UTC\w*MMA|HMMA)\b",
    "sm_120": r"\bHMMA\.",
    "gfx90a": r"\bv_mfma_",
    "gfx942": r"\bv_mfma_",
    "gfx1100": r"\bv_wmma_",
}


# Bytes of the largest global access there is.
WIDE = 16
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(?:load|store)_(\w+)")


@dataclass(frozen=True)
class Compilation:
    """What a compiler made of one launch for one target."""

    registers: int  # 32-bit registers a thread (AMD: vector registers a lane)
    spills: int  # registers spilled to memory, as the compiler counts them
    local_bytes: int  # stack and scratch memory a thread, in bytes
    shared_bytes: int  # shared memory (AMD: LDS) a program, in bytes
    matrix_instructions: int  # tensor-core (AMD: matrix-core) instructions in the machine code
    scalar_dots: int  # matrix products that the compiler did not give to tensor cores
    wide_accesses: int  # global loads and stores of 16 bytes
    narrow_accesses: int  # global loads and stores of fewer
    descriptor_loads: int  # instructions that load a tile by a tensor descriptor
    wide_share: float  # of the bytes that innermost loops access (without loops: all), those that go by 16
    assembly: str  # the machine code's text: SASS, or AMD's assembly

    def __str__(self) -> str:
        return (
            f"{self.registers:3} registers {self.spills:4} spills {self.shared_bytes / 1024:5.1f} KiB "
            f"{self.matrix_instructions:3} products {self.wide_accesses:3}/{self.narrow_accesses:<3} wide/narrow"
        )


def compile_call(call: Call, target: Target) -> Compilation:
    """Compile `call`, whose tensors may lie on the meta device, for `target`.

    Raises:
        triton.CompilationError, RuntimeError: the compiler's own, if it refuses.
    """
    gpu = GPUTarget(target.backend, target.architecture, target.warp_size)
    return read(triton.compile(source_of(call), target=gpu, options=options_of(call)), target)


def options_of(call: Call) -> dict[str, Any]:
    """What Triton is asked for at a launch, beside the arguments."""
    return {**call.options, "enable_fp_fusion": True}


def source_of(call: Call) -> Any:
    """The kernel and the types of its arguments, specialized as Triton specializes them at a launch."""
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(call.kernel.params):
        argument = call.arguments[parameter.name]
        if parameter.is_constexpr:
            types[parameter.name], constants[position,] = "constexpr", argument
        else:
            types[parameter.name] = _type_of(argument, (position,), not parameter.do_not_specialize, constants, hints)
    return ASTSource(call.kernel, types, constants, hints)


def _type_of(
    argument: Any,
    path: tuple[int, ...],
    specialize: bool,
    constants: dict[tuple[int, ...], Any],
    hints: dict[tuple[int, ...], list[list[Any]]],
) -> Any:
    """Triton's type of what lies at `path` in the arguments, with what it is constant or divisible by written down."""
    if isinstance(argument, tuple):  # of which nothing can be exempted from specialization
        types = [_type_of(each, (*path, i), True, constants, hints) for i, each in enumerate(argument)]
        return type(argument)(*types) if hasattr(argument, "_fields") else tuple(types)
    if argument is None or (specialize and isinstance(argument, int) and argument == 1):
        constants[path] = argument
        return "constexpr"
    if isinstance(argument, torch.Tensor):
        hints[path] = [["tt.divisibility", 16]]
        return "*" + TRITON_DTYPE[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    if specialize and argument % 16 == 0:
        hints[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def read(compiled: Any, target: Target) -> Compilation:
    """What Triton compiled for `target`, in numbers."""
    return _read_cuda(compiled, target) if target.backend == "cuda" else _read_hip(compiled, target)


def scalar_dots(ttgir: str) -> int:
    """How many products of Triton's GPU dialect have a result that no tensor core (AMD: matrix core) lays out so.

    Hopper's and Blackwell's own products (warp_group_dot, tc_gen5_mma) are other operations, and never scalar.
    """
    layouts = set(re.findall(r"^(#\w+) = #ttg\.(?:nvidia_mma|amd_mfma|amd_wmma)", ttgir, re.MULTILINE))
    results = re.findall(r"= tt\.dot .*-> tensor<[^#]*(#\w+)>", ttgir)
    return sum(layout not in layouts for layout in results)


def _read_cuda(compiled: Any, target: Target) -> Compilation:
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output_of(tools.cuobjdump.path, "-res-usage", file.name)
        assembly = _output_of(tools.nvdisasm.path, "-c", file.name)
    numbers = {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    program = Program.of(assembly)
    sizes = [_bytes_of(one) for one in program.instructions if _is_access(one)]
    return Compilation(
        registers=numbers["REG"],
        spills=len(re.findall(r"\b(?:STL|LDL)\b", assembly)),
        local_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=len(re.findall(MATRIX_INSTRUCTION[target.name], assembly)),
        scalar_dots=scalar_dots(compiled.asm["ttgir"]),
        wide_accesses=sizes.count(WIDE),
        narrow_accesses=len(sizes) - sizes.count(WIDE),
        descriptor_loads=len(re.findall(r"\bUTMALDG\b", assembly)),
        wide_share=_wide_share(program),
        assembly=assembly,
    )


def _read_hip(compiled: Any, target: Target) -> Compilation:
    assembly = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    program = Program.of(assembly)
    sizes = [_bytes_of(one) for one in program.instructions if _is_access(one)]
    return Compilation(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        local_bytes=number("private_segment_fixed_size"),
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=len(re.findall(MATRIX_INSTRUCTION[target.name], assembly)),
        scalar_dots=scalar_dots(compiled.asm["ttgir"]),
        wide_accesses=sizes.count(WIDE),
        narrow_accesses=len(sizes) - sizes.count(WIDE),
        descriptor_loads=0,
        wide_share=_wide_share(program),
        assembly=assembly,
    )


def _wide_share(program: Program) -> float:
    """What is accessed again and again counts, if anything is; what accesses nothing is as wide as can be."""
    loops = program.loops(_is_access) or [program.instructions]
    sizes = [_bytes_of(one) for loop in loops for one in loop if _is_access(one)]
    return sizes.count(WIDE) * WIDE / sum(sizes) if sizes else 1.0


def _is_access(instruction: Instruction) -> bool:
    """Of global memory; Triton's asynchronous copies (LDGSTS) are loads as well."""
    return instruction.is_in("LDG", "STG", "LDGSTS") or _AMD_ACCESS.match(instruction.opcode) is not None


def _bytes_of(access: Instruction) -> int:
    """What a thread moves with it."""
    found = _AMD_ACCESS.match(access.opcode)
    return _amd_bytes(found.group(1)) if found else _sass_bytes(access.opcode)


def _sass_bytes(access: str) -> int:
    """What a thread moves with LDG, STG or LDGSTS: the last of .U8, .S8, .U16, .64, .128; 4 where none is said."""
    found = re.search(r"\.[US]?(8|16|64|128)\b", access)
    return int(found.group(1)) // 8 if found else 4


def _amd_bytes(access: str) -> int:
    """What a lane moves: dwordx4, b128, ushort, d16_b16, u8, …."""
    if found := re.search(r"dword(?:x(\d))?", access):
        return 4 * int(found.group(1) or 1)
    if "short" in access or "byte" in access:
        return 2 if "short" in access else 1
    bits = re.findall(r"[biu](\d+)", access)
    return int(bits[-1]) // 8 if bits else 4


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
