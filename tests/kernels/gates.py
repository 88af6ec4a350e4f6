"""Compile the Triton kernels for devices that are not here, and read what the compiler says of them.

Run as a script, it compiles everything that a configuration can choose and writes docs/kernels-triton-resources.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import triton
from negengine.kernels.triton import guidance, guidance_launch, tuning
from negengine.kernels.triton.match import match_kernel
from negengine.kernels.triton.merge import merge_kernel
from negengine.kernels.triton.norms import norms_kernel
from negengine.kernels.triton.rows import FP8, INT8
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

DTYPES = ("fp16", "bf16", "fp32")
WIDTHS = (640, 3072)  # channels, of each a kind of rows configuration
CODES = {"int8": ("i8", INT8.value), "fp8": ("fp8e4nv", FP8.value)}  # type and constant of a quantised search
DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels-triton-resources.md"
GUIDANCE_DOCUMENT = DOCUMENT.with_name("guidance-kernels.md")
# bytes, where ptxas would rather spill than fit one block less
MOST_SPILLED = {"match": 16, "norms": 80, "merge": 80, "guide": 0, "evidence": 0, "nag": 0}
BEGIN, END = "<!-- written by tests/kernels/gates.py -->\n", "<!-- end -->\n"
POINTERS = {  # what each pointer points to, where it is not the dtype of x
    "references": "i32", "candidate_index": "i32", "index": "i32", "moved": "i32", "schedule": "i32",
    "apart": "i8", "flags": "i32",
    "key_error": "fp32", "query_error": "fp32", "query_weight": "fp32",
    "weight": "fp32", "inverse": "fp32", "candidate_score": "fp32", "cosine": "fp32",
    "mask": "i1", "keep": "i1", "alpha": "fp64", "threshold": "fp64", "stats": "i64",
    "strength": "fp64", "guidance": "fp32", "means": "fp64", "partial": "fp32",
}  # fmt: skip
TENSORS = {"x", "y", "bank", "queries", "keys", "snapshot"}
TENSORS |= {"conditional", "negative", "unconditional", "sample", "previous", "positive", "out", "other"}
NUMBERS = {"clip", "gain", "tau", "share", "rest"}  # float32
CODED = {"key_codes", "query_codes"}


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel with its constants and launch options, for an architecture."""

    kernel: str
    architecture: str
    dtype: str
    constants: tuple[tuple[str, int | bool], ...]
    num_warps: int
    num_stages: int
    latents: str = field(default="", repr=False)  # of the evidence, the dtype of its samples where they have another

    @property
    def settings(self) -> dict[str, int | bool]:
        return dict(self.constants)

    def __str__(self) -> str:
        flags = [f"stages{self.num_stages}"] if self.kernel == "match" else []
        flags += [name.lower() for name, value in self.constants if value is True]
        flags += [name for name, (_, constant) in CODES.items() if constant == self.settings.get("QUANTISED")]
        flags += [] if self.settings["VECTOR"] > 1 else ["unaligned"]
        flags += [f"overwritten{self.settings['OVERWRITTEN']}"] if self.kernel == "norms" else []
        flags += [f"{name.lower()}{self.settings[name]}" for name in ("GUIDED", "BLOCK_D") if name in self.settings]
        flags += [self.latents] if self.latents else []
        tile = "x".join(str(self.settings[f"BLOCK_{n}"]) for n in "MNK" if f"BLOCK_{n}" in self.settings)
        return "-".join(filter(None, [self.kernel, self.architecture, self.dtype, tile, *flags]))


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports. ``spilled`` counts bytes per thread; ``needed`` those that it spills with all registers."""

    registers: int
    spilled: int
    needed: int
    shared: int
    instruction: str


KERNELS = {"norms": norms_kernel, "match": match_kernel, "merge": merge_kernel}
KERNELS |= {"guide": guidance.guide_kernel, "evidence": guidance.evidence_kernel, "nag": guidance.nag_kernel}


def variants(architecture: str, everything: bool) -> Iterator[Variant]:
    """What a call can launch; of the flags that change little, without ``everything`` only the heaviest combination.

    float16 stands apart only where its kernel has less to do than that of bfloat16: in the merge, which needs no exact search.
    """
    device = tuning.ARCHITECTURES[architecture]
    for dtype in ["bf16", "fp32", *_quantised_searches(device)]:
        itemsize = 1 if dtype in CODES else 4 if dtype == "fp32" else 2
        for aligned in (True, False) if itemsize > 1 else (True,):
            for config in _untuned(itemsize, device, aligned):
                for release, even in itertools.product((False, True), repeat=2) if everything else ((False, True),):
                    if even or not config.descriptors:  # the accelerator fills up with zeros by itself
                        yield _match_variant(device, dtype, itemsize, aligned, config, release, even)
            for config in tuning.candidates(itemsize, device, aligned) if everything else ():
                yield _match_variant(device, dtype, itemsize, aligned, config, False, True)
    for dtype in DTYPES if everything else ("bf16", "fp32"):
        for aligned in (True, False) if everything else (dtype == "bf16",):
            yield from _rows_variants(architecture, dtype, aligned, everything)


def _untuned(itemsize: int, device: tuning.Architecture, aligned: bool) -> list[tuning.MatchConfig]:
    known = (tuning.known_configs(itemsize, device, aligned, descriptors) for descriptors in (True, False))
    return list(dict.fromkeys(itertools.chain(*known)))


def _match_variant(
    device: tuning.Architecture, dtype: str, itemsize: int, aligned: bool, config: tuning.MatchConfig, release: bool, even: bool
) -> Variant:
    constants = {
        "RELEASE": release, "DESCRIPTORS": config.descriptors, "EVEN_K": even, "VECTOR": 16 // itemsize if aligned else 1,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "GROUP": 8,  # another changes no instruction
        "HALVINGS": config.halvings, "FLATTEN": config.flatten, "SPECIALIZE": config.specialize,
        "QUANTISED": CODES[dtype][1] if dtype in CODES else 0, "PARTIAL": dtype == "fp8" and device.partial_sums,
    }  # fmt: skip
    return _variant("match", device.name, dtype, constants, config.num_warps, config.num_stages)


def _quantised_searches(device: tuning.Architecture) -> list[str]:
    return [search for search in CODES if search in device.searches]


def _rows_variants(architecture: str, dtype: str, aligned: bool, everything: bool) -> Iterator[Variant]:
    """Of norms and merge; masks, dropped tokens and statistics are always there, as without them a kernel is lighter."""
    device, itemsize = tuning.ARCHITECTURES[architecture], 4 if dtype == "fp32" else 2
    vector = 16 // itemsize if aligned else 1
    choices = itertools.product((False, True), [None, *_quantised_searches(device)], WIDTHS)
    for release, search, channels in choices:
        if dtype == "fp16" and (search or not aligned):
            continue
        quantised = CODES[search][1] if search else 0
        norms = tuning.norms_config(channels, itemsize, device, quantised > 0)
        rows = tuning.merge_config(channels, itemsize, device, quantised > 0, aligned)
        # whether the keys are images of x; what of them is overwritten
        kinds = [(False, 0), (False, 3), (True, 0), (True, 2), *([] if release else [(True, 1)])]
        # whether y is written, and is x; whether keys and bank are read from the snapshot
        calls = [(False, True, False, False), (True, False, False, False), (True, True, False, False), (True, True, True, True)]
        calls += [(True, True, True, False)] if release else []
        heaviest = [(True, 2)], [(True, True, True, True)]
        if not everything:
            if release != (dtype == "fp32"):
                continue
            kinds, calls = heaviest
        elif not aligned:
            kinds, calls = heaviest
        for own, overwritten in kinds if dtype != "fp16" else ():
            constants = {
                "RELEASE": release, "MASKED": True, "OVERWRITTEN": overwritten, "QUANTISED": quantised, "OWN": own,
                "VECTOR": vector, "ROWS": norms.rows, "BLOCK_D": norms.block_d,
            }  # fmt: skip
            yield _variant("norms", architecture, dtype, constants, norms.num_warps, 3)
        for merge, in_place, keys_move, bank_moves in calls:
            constants = {
                "RELEASE": release, "MERGE": merge, "IN_PLACE": in_place, "MASKED": True, "KEPT": merge, "COUNTED": merge,
                "KEYS_MOVE": keys_move, "BANK_MOVES": bank_moves, "CAREFUL": bool(quantised) or dtype != "fp16",
                "QUANTISED": quantised, "VECTOR": vector, "ROWS": rows.rows, "BLOCK_D": rows.block_d,
                "BLOCK_N": rows.block_n, "BLOCK_K": rows.block_k,
            }  # fmt: skip
            yield _variant("merge", architecture, dtype, constants, rows.num_warps, 3)


def _variant(kernel: str, architecture: str, dtype: str, constants: dict[str, int | bool], warps: int, stages: int) -> Variant:
    return Variant(kernel, architecture, dtype, tuple(constants.items()), warps, stages)


def _signature(variant: Variant) -> dict[str, str]:
    settings = variant.settings
    types = {}
    for name in KERNELS[variant.kernel].arg_names:
        if name in settings:
            types[name] = "constexpr"
        elif name in POINTERS:
            types[name] = "*" + POINTERS[name]
        elif name in TENSORS | CODED:
            dtype = _type(variant, name)
            types[name] = "*" + dtype
            if settings.get("DESCRIPTORS"):
                rows = settings["BLOCK_M" if name == "queries" else "BLOCK_N"]
                types[name] = f"tensordesc<{dtype}[1, {rows}, {settings['BLOCK_K']}]>"
        else:
            types[name] = "fp32" if name in NUMBERS else "i32"
    return types


def _type(variant: Variant, name: str) -> str:
    """Of what a tensor is made: the dtype of x, or codes, of which the search's variants are named after their kind."""
    if variant.kernel == "evidence" and name in ("sample", "previous"):
        return variant.latents or variant.dtype
    kinds = {constant: kind for kind, constant in CODES.values()}
    quantised = variant.settings.get("QUANTISED", 0)
    if not quantised or (variant.kernel != "match" and name not in CODED):
        return variant.dtype
    kind = kinds[quantised]
    return "fp8e4b8" if kind == "fp8e4nv" and variant.architecture == "gfx942" else kind


def target_of(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def assembled(variant: Variant) -> triton.compiler.CompiledKernel:
    """Compiled with the options with which it is launched."""
    kernel = KERNELS[variant.kernel]
    types = _signature(variant)
    aligned = [["tt.divisibility", 16]]
    specialized = [types[p.name].startswith("*") and not p.do_not_specialize_on_alignment for p in kernel.params]
    attributes = {(i,): aligned for i, yes in enumerate(specialized) if yes}
    source = ASTSource(kernel, types, variant.settings, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source, target=target_of(variant.architecture), options=options)


def compiled(variant: Variant) -> Compiled:
    out = assembled(variant)
    if variant.architecture.startswith("gfx"):
        return _read_amd(out)
    return _read_nvidia(out, variant.architecture)


def _read_nvidia(out: triton.compiler.CompiledKernel, architecture: str) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(out.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    ptx = out.asm["ptx"]
    spilled = _spills(ptx, architecture) if stack else 0
    # ptxas would rather spill a few bytes than lose a block per multiprocessor: told not to mind, it shows what it must spill
    needed = _spills(re.sub(r"(\.reqntid \d+)", r"\1\n.maxnreg 255", ptx), architecture) if spilled else 0
    instruction = next((name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx), "fma")
    return Compiled(registers, spilled, needed, out.metadata.shared, instruction)


def _spills(ptx: str, architecture: str) -> int:
    """Bytes of spill stores: a stack may also be there for the slow path of a division or a square root."""
    tool = get_ptxas(int(architecture.removeprefix("sm_")))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = re.findall(r"\.target (\w+)", ptx)[0]
        command = [tool.path, "-v", f"--gpu-name={target}", source, "-o", Path(folder) / "kernel.cubin"]
        run = subprocess.run(command, capture_output=True, text=True)
    said = run.stdout + run.stderr
    if run.returncode:
        raise RuntimeError(said)
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))


def _read_amd(out: triton.compiler.CompiledKernel) -> Compiled:
    text = out.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    spilled = number("private_segment_fixed_size")
    return Compiled(
        number("vgpr_count") + number("agpr_count"),
        spilled,
        spilled,
        out.metadata.shared,
        "mfma" if "v_mfma" in text else "fma",
    )


def expected(variant: Variant) -> str:
    """The matrix instruction that a search of this dtype must use."""
    if variant.architecture == "gfx942":
        return "mfma"
    if variant.dtype == "fp32":
        return "fma"
    return {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}.get(variant.architecture, "mma.sync")


def complaints(variant: Variant, result: Compiled) -> list[str]:
    """What is wrong with a compilation."""
    found = []
    if result.needed or result.spilled > MOST_SPILLED[variant.kernel]:
        found.append(f"spills {result.spilled} bytes")
    if result.shared > tuning.ARCHITECTURES[variant.architecture].shared:
        found.append(f"takes {result.shared} bytes of shared memory")
    if variant.kernel == "match" and result.instruction != expected(variant):
        found.append(f"uses {result.instruction}, not {expected(variant)}")
    return found


def fingerprint() -> str:
    """Of what is compiled, in all its variants: the docs' table names the one that it was made from."""
    digest = hashlib.sha256()
    for file in ("rows", "schedule", "codes", "norms", "match", "exact", "rescore", "merge"):
        digest.update((Path(tuning.__file__).parent / f"{file}.py").read_bytes())
    for architecture in tuning.ARCHITECTURES:
        digest.update(repr([*variants(architecture, True)]).encode())
    return digest.hexdigest()[:16]


def guidance_variants(architecture: str) -> Iterator[Variant]:
    """Of the kernels of guidance, which depend on no architecture. The heaviest of each flag; tokens of every kind of width."""
    for dtype, aligned in itertools.product(DTYPES, (True, False)):
        vector = (16 // (4 if dtype == "fp32" else 2)) if aligned else 1
        config = guidance_launch.ElementsConfig()
        block = {"VECTOR": vector, "BLOCK": config.block}
        for guided in (guidance.UNGUIDED.value, guidance.BASE.value, guidance.ALL.value):
            yield _variant("guide", architecture, dtype, {"GUIDED": guided, **block}, config.num_warps, 3)
            for latents in ("", "fp32") if dtype == "bf16" else ("",):
                constants = {"GUIDED": guided, "CLIPPED": True, **block}
                found = _variant("evidence", architecture, dtype, constants, config.num_warps, 3)
                yield dataclasses.replace(found, latents=latents)
        for channels in (320, 640, 1280, 3072, 4096, 5120):
            tokens = guidance_launch.token_config(channels)
            constants = {"BOTH": True, "WHOLE": tokens.block_d >= channels, "VECTOR": vector, "BLOCK_D": tokens.block_d}
            yield _variant("nag", architecture, dtype, constants, tokens.num_warps, 3)


def guidance_fingerprint() -> str:
    digest = hashlib.sha256()
    for file in ("rows", "guidance"):
        digest.update((Path(tuning.__file__).parent / f"{file}.py").read_bytes())
    for architecture in tuning.ARCHITECTURES:
        digest.update(repr([*guidance_variants(architecture)]).encode())
    return digest.hexdigest()[:16]


def guidance_table(results: dict[Variant, Compiled]) -> str:
    """One row for each kernel, architecture and block: the heaviest of its variants."""
    lines = [
        f"{len(results):,} variants of the kernels {guidance_fingerprint()}, Triton {triton.__version__}. Of each block the"
        " heaviest: registers per thread, bytes of spills per thread, bytes of shared memory per block.\n",
        "| kernel | architecture | block | warps | registers | spills | shared |",
        "|" + " --- |" * 7,
    ]
    rows: dict[tuple[str, ...], list[Compiled]] = {}
    for variant, result in results.items():
        block = variant.settings.get("BLOCK", variant.settings.get("BLOCK_D"))
        rows.setdefault((variant.kernel, variant.architecture, str(block), str(variant.num_warps)), []).append(result)
    for key, found in rows.items():
        worst = [str(max(getattr(r, name) for r in found)) for name in ("registers", "spilled", "shared")]
        lines.append(f"| {' | '.join([*key, *worst])} |")
    return "\n".join(lines) + "\n"


def table(results: dict[Variant, Compiled]) -> str:
    columns = ["kernel", "architecture", "dtype", "tile", "warps", "stages", "descriptors"]
    columns += ["registers", "spills", "needed", "shared", "instruction"]
    lines = [
        f"{len(results):,} variants of the kernels {fingerprint()}, Triton {triton.__version__}. Registers per thread (on gfx942"
        " vector and accumulation registers together), bytes of spills per thread and those needed even where it may have all"
        " registers (otherwise ptxas spills them to fit one more block per multiprocessor), bytes of shared memory per block; of"
        " variants that differ in flags only, the heaviest.\n",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    rows: dict[tuple[str, ...], list[Compiled]] = {}
    for variant, result in results.items():
        tile = " x ".join(str(variant.settings[n]) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if n in variant.settings)
        if variant.kernel != "match":
            tile = f"{variant.settings['ROWS']} x {variant.settings['BLOCK_D']}"
        descriptors = "yes" if variant.settings.get("DESCRIPTORS") else "no"
        launch = (str(variant.num_warps), str(variant.num_stages), descriptors)
        key = (variant.kernel, variant.architecture, variant.dtype, tile, *launch)
        rows.setdefault(key, []).append(result)
    for key, found in rows.items():
        worst = [max(getattr(r, f.name) for r in found) for f in dataclasses.fields(Compiled)]
        lines.append(f"| {' | '.join([*key, *map(str, worst)])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", nargs="*", default=[*tuning.ARCHITECTURES])
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--some", action="store_true", help="only what the tests compile")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--guidance", action="store_true", help="only the kernels of guidance, a minute; without, only the others")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}, or {GUIDANCE_DOCUMENT.name}")
    arguments = parser.parse_args()
    names = arguments.architecture
    choice = guidance_variants if arguments.guidance else lambda a: variants(a, not arguments.some)
    todo = list(dict.fromkeys(v for a in names for v in choice(a) if arguments.only in str(v)))
    results, bad = {}, 0
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for variant, result in zip(todo, pool.map(compiled, todo), strict=True):
            results[variant] = result
            wrong = complaints(variant, result)
            bad += bool(wrong)
            print(variant, result, *wrong, flush=True)
    if arguments.write:
        document, text = (GUIDANCE_DOCUMENT, guidance_table(results)) if arguments.guidance else (DOCUMENT, table(results))
        before, rest = document.read_text().split(BEGIN)
        document.write_text(before + BEGIN + text + END + rest.split(END, 1)[1])
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
