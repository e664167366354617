"""Compiles a Triton kernel for a GPU that is not here, and reads what became of it from the machine code.

Every instruction carries the source line it came from and the calls it was inlined through, so a promise about one
statement in one branch is checked on exactly its instructions.
"""

from __future__ import annotations

import linecache
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Access:
    """A promise: every access of one statement in one branch is at least this wide.

    Args:
        operation: "load" or "store".
        statement: a part of the source line that makes the access.
        branch: a part of the line from which the statement's function was called, directly or not; empty for any.
        width: bytes of one access.
        block: bytes that a program accesses at once.
    """

    operation: str
    statement: str
    branch: str
    width: int
    block: int

    def allowed(self, threads: int) -> int:
        """The least width that keeps the promise.

        Args:
            threads: of a program.

        Returns:
            `width`, or a thread's whole part of the block where that is less.
        """
        return min(self.width, self.block // threads)


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that its compilation depends on.

    Args:
        kernel: the jit function.
        name: of the specialisation.
        signature: types of the arguments that are known at run time only.
        constants: values of the others.
        num_warps: of a program.
        accesses: that are promised to be wide.
        aligned: arguments whose address Triton knows to be divisible by 16.
        shared: bytes of shared memory that a program may use: lanes that add up their sums meet there.
    """

    kernel: Any
    name: str
    signature: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, object]
    num_warps: int
    accesses: Sequence[Access]
    aligned: Sequence[str] = ()
    shared: int = 0


@dataclass(frozen=True)
class Report:
    """What a variant became on one target.

    Args:
        kernel, variant, target: names.
        promises: the accesses that were promised to be wide, in words.
        widths: bytes of each instruction that serves a promise, ascending, for each promise.
        registers: of a thread.
        stack: bytes of memory that a thread uses besides registers.
        spills: vector registers spilled, where the target's compiler says so.
        shared: bytes of shared memory of a program.
        broken: promises that do not hold, in words.
    """

    kernel: str
    variant: str
    target: str
    promises: tuple[str, ...]
    widths: tuple[tuple[int, ...], ...]
    registers: int
    stack: int
    spills: int
    shared: int
    broken: tuple[str, ...]


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Within it Triton finds nothing that was compiled before, and notes source lines whatever the environment says."""
    with tempfile.TemporaryDirectory() as directory, triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = directory
        triton.knobs.compilation.disable_line_info = False
        yield


def check(variant: Variant, target: str) -> Report:
    """Compile a variant and check its promises.

    Args:
        variant: of a kernel.
        target: a key of `TARGETS`.

    Returns:
        What was found; `broken` is empty if every promise holds, nothing spills or uses local memory, and no more
        shared memory is used than the variant allows.
    """
    gpu = TARGETS[target]
    names = variant.kernel.arg_names
    source = ASTSource(
        variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    compiled = triton.compile(source, target=gpu, options={"num_warps": variant.num_warps})
    found = accesses(compiled.asm["ptx" if gpu.backend == "cuda" else "amdgcn"])
    directory = Path(variant.kernel.fn.__code__.co_filename).parent
    promises, widths, broken = [], [], []
    for access in variant.accesses:
        seen = tuple(sorted(_select(found, directory, access)))
        width = access.allowed(variant.num_warps * gpu.warp_size)
        promises.append(f"{access.operation} {access.statement!r} under {access.branch!r}")
        widths.append(seen)
        if not seen or seen[0] < width:
            what = f"{sorted(set(seen))} bytes" if seen else "nothing"
            broken.append(f"{promises[-1]}: {what} where {width} bytes were promised")
    registers, stack, spills = (_cuda_resources if gpu.backend == "cuda" else _amd_resources)(compiled.asm)
    shared = int(compiled.metadata.shared)
    broken += [f"{amount} {what}" for amount, what in ((stack, "bytes of local memory"), (spills, "spills")) if amount]
    if shared > variant.shared:
        broken.append(f"{shared} bytes of shared memory where {variant.shared} are allowed")
    name = variant.kernel.fn.__name__
    return Report(
        *(name, variant.name, target, tuple(promises), tuple(widths)),
        *(registers, stack, spills, shared, tuple(broken)),
    )


Found = tuple[str, int, tuple[tuple[str, int], ...]]
"""An access to global memory: its operation, its bytes, and its source lines (file, line) from the inside outwards."""


def accesses(assembly: str) -> list[Found]:
    """Every access to global memory in machine code.

    Args:
        assembly: PTX or AMD assembly with line information.

    Returns:
        Operations, widths in bytes and source lines.

    Example:
        >>> accesses(".loc 1 7 3 // kernel.py:7:3 @[ kernel.py:12:5 ]\\n ld.global.v4.b32 {...}, [%rd1];")
        [('load', 16, (('kernel.py', 7), ('kernel.py', 12)))]
    """
    found = []
    places: tuple[tuple[str, int], ...] = ()
    for text in assembly.splitlines():
        if ".loc" in text:
            places = tuple((file, int(line)) for file, line in re.findall(r"([\w.]+):(\d+):\d+", text))
        elif match := re.search(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", text):
            width = int(match[2] or 1) * int(match[3]) // 8
            found.append(("load" if match[1] == "ld" else "store", width, places))
        elif match := re.search(r"\b(?:global|flat|buffer)_(load|store)_(\w+)", text):
            found.append((match[1], _amd_width(match[2]), places))
    return found


def _amd_width(suffix: str) -> int:
    if dwords := re.match(r"dwordx?(\d)?", suffix):
        return 4 * int(dwords[1] or 1)
    if bits := re.match(r"[bui](\d+)", suffix):
        return int(bits[1]) // 8
    return 1 if "byte" in suffix else 2


def _select(found: Sequence[Found], directory: Path, access: Access) -> Iterator[int]:
    for operation, width, places in found:
        # Helpers may stand in another file of the package; a line of Triton's own library is empty here.
        inside, *outside = [linecache.getline(str(directory / file), line) for file, line in places] or [""]
        called_from = not access.branch or any(access.branch in line for line in outside)
        if operation == access.operation and access.statement in inside and called_from:
            yield width


def _cuda_resources(asm: Any) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack, local = (int(_only(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK", "LOCAL"))
    # ptxas spills to the stack, so it has no count of its own.
    return registers, stack + local, 0


def _amd_resources(asm: Any) -> tuple[int, int, int]:
    text = asm["amdgcn"]
    registers, stack, spills = (
        int(_only(rf"\.{name}:\s+(\d+)", text))
        # Scalar registers spill into the lanes of vector registers. Those that go to memory are in the segment's size.
        for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    )
    return registers, stack, spills


def _only(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's report has no {pattern!r}; its form has changed")
    return match[1]
