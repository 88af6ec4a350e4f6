"""Machine code is read as it is: a listing written here, and kernels compiled here."""

import pytest

from negengine.bench import sass

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

compiles = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter replaces the compiler")


def listing(*lines):
    """As nvdisasm prints it: a label, or (instruction, stall, scoreboards of result and operands, mask of those awaited)."""
    text, address = ['\t.section\t.text.kernel,"ax",@progbits'], 0
    for line in lines:
        if isinstance(line, str):
            text.append(f"{line}:")
            continue
        instruction, stall, *rest = line
        results, reads, waits = [*rest, *(7, 7, 0)[len(rest) :]]
        high = (stall | results << 5 | reads << 8 | waits << 11) << 41 | 0x800
        text.append(f"        /*{address:04x}*/                   {instruction} ;     /* 0x0000000404007c24 */")
        text.append(f"                                              /* 0x{high:016x} */")
        address += 16
    return "\n".join(text)


STEP = [("LDSM.16.M88.4 R4, [R2]", 2, 0), ("HMMA.16816.F32.BF16 R8, R4, R6, R8", 8, 7, 7, 1)]


def nested(*epilogue):
    return listing(
        ("S2R R0, SR_TID.X", 5, 0),
        ".L_x_0",
        ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", 2, 7, 1),
        ("IADD3 R1, R1, 0x1, RZ", 4),
        ".L_x_1",
        *STEP,
        ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", 2, 7, 1),
        ("ISETP.NE.AND P0, PT, R1, RZ, PT", 13),
        ("@P0 BRA `(.L_x_1)", 5),
        *epilogue,
        ("@!P1 BRA `(.L_x_0)", 5),
        ("EXIT", 5),
        ".L_x_2",
        ("BRA `(.L_x_2)", 0),
    )


def test_an_instruction_carries_its_schedule():
    code = sass.instructions(listing(("@!UP0 LDG.E.128 R4, desc[UR4][R2.64]", 13, 2, 5, 0b100001), ("EXIT", 5)))
    one = code[0]
    assert (one.name, one.operation, one.operands, one.predicate) == ("LDG.E.128", "LDG", "R4, desc[UR4][R2.64]", "!UP0")
    assert (one.address, one.stall, one.results, one.reads, one.waits) == (0, 13, 2, 5, (0, 5))
    assert one.wide
    assert (code[1].results, code[1].reads, code[1].waits, code[1].predicate) == (None, None, (), "")


def test_parts_of_nested_loops():
    code = sass.instructions(nested(("FMNMX R4, R4, R5, !PT", 4), ("FMNMX R4, R4, R6, !PT", 4)))
    assert sass.loops(code) == [sass.Loop(1, 10), sass.Loop(3, 7)]
    parts = sass.search_of(code)
    assert [one.operation for one in parts.step] == ["LDSM", "HMMA", "LDGSTS", "ISETP", "BRA"]
    assert [one.operation for one in parts.prologue] == ["LDGSTS", "IADD3"]
    assert [one.operation for one in parts.epilogue] == ["FMNMX", "FMNMX", "BRA"]
    assert not parts.prefetched


def test_what_one_loop_jumps_over_is_done_once_in_a_tile():
    code = sass.instructions(
        listing(
            ".L_x_0",
            ("@P2 BRA `(.L_x_3)", 5),
            ("IADD3 R1, R1, 0x1, RZ", 4),
            ".L_x_3",
            *STEP,
            ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", 2, 7, 1),
            ("@P0 BRA `(.L_x_1)", 5),
            ("FMNMX R4, R4, R5, !PT", 4),
            ("STG.E desc[UR4][R2.64], R4", 4),
            ".L_x_1",
            ("@P1 BRA `(.L_x_0)", 5),
            ("EXIT", 5),
        )
    )
    parts = sass.search_of(code)
    assert [one.operation for one in parts.step] == ["BRA", "LDSM", "HMMA", "LDGSTS", "BRA", "BRA"]
    assert [one.operation for one in parts.epilogue] == ["IADD3", "FMNMX", "STG"]
    assert parts.prologue == ()
    assert parts.prefetched


def test_a_jump_back_from_a_wait_is_no_loop():
    """Waits lie behind the kernel's end and jump back into the middle of the loop."""
    code = sass.instructions(
        listing(
            ("NOP", 1),
            ".L_x_0",
            ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6], R8", 2, 0),
            ("@!P0 BRA `(.L_x_1)", 5),
            ".L_x_2",
            *STEP,
            ("@P1 BRA `(.L_x_0)", 5),
            ("EXIT", 5),
            ".L_x_1",
            ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6], R8", 2, 0),
            ("@!P0 BRA `(.L_x_1)", 5),
            ("BRA `(.L_x_2)", 5),
        )
    )
    assert sass.loops(code) == [sass.Loop(1, 5)]


def test_the_rare_path_is_left_out():
    wide = ("LDG.E.128 R4, desc[UR4][R2.64]", 2, 0)
    row = [wide, ("FADD R8, R8, R4", 4, 7, 7, 1), ("IADD3 R1, R1, 0x1, RZ", 4)]
    code = sass.instructions(
        listing(
            ".L_x_0", *row, ("@P0 BRA `(.L_x_0)", 5),
            ("@P1 BRA `(.L_x_9)", 5),
            ".L_x_1", ("MOV R3, R4", 4), ".L_x_2", *row, ("@P0 BRA `(.L_x_2)", 5), ("@P2 BRA `(.L_x_1)", 5),
            ".L_x_9", ("FMUL R8, R8, R9", 4),
            ".L_x_3", *row, ("STG.E.128 desc[UR4][R2.64], R4", 2), ("@P0 BRA `(.L_x_3)", 5),
            ("EXIT", 5),
        )
    )  # fmt: skip
    parts = sass.rows_of(code)
    assert [len(loop) for loop in parts.loops] == [4, 5]
    assert [one.operation for one in parts.once] == ["BRA", "FMUL", "EXIT"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("\t.section\t.text.kernel\n", "no instruction"),
        (listing(("FADD R1, R1, R1", 4), ("EXIT", 5)), "no loop with matrix instructions"),
        (listing(".L_x_0", *STEP, *STEP, ("@P0 BRA `(.L_x_0)", 5), ("EXIT", 5)), "no loop over tiles"),
    ],
)
def test_what_it_does_not_know_is_an_error(text, message):
    with pytest.raises(sass.Unreadable, match=message):
        sass.search_of(sass.instructions(text))


def test_a_kernel_without_rows_is_an_error():
    with pytest.raises(sass.Unreadable, match="no access to rows"):
        sass.rows_of(sass.instructions(listing(("FADD R1, R1, R1", 4), ("EXIT", 5))))


# --- compiled here -----------------------------------------------------------------------------------------------


@triton.jit
def largest(a, b, out, K, tiles, FLATTEN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for tile in tl.range(0, tiles, flatten=FLATTEN):
        product = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, K, 32):
            left = tl.load(a + row[:, None] * K + start + tl.arange(0, 32)[None, :])
            right = tl.load(b + (tile * BLOCK + row)[None, :] * K + start + tl.arange(0, 32)[:, None])
            product = tl.dot(left, right, product)
        best = tl.maximum(best, tl.max(product, 1))
    tl.store(out + row, best)


@compiles
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("capability, products", [(80, 16), (90, 2)])
def test_parts_of_a_compiled_search(capability, products, flatten):
    """64 x 64 x 32 by four warps: 16 products of 16 x 8 x 16 for each warp, or two of 64 x 64 x 16 for the four."""
    types = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "K": "i32", "tiles": "i32", "FLATTEN": "constexpr", "BLOCK": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(largest, types, {"FLATTEN": flatten, "BLOCK": 64}, aligned)
    out = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 3})
    code = sass.instructions(sass.disassembled(out.asm["cubin"]))
    parts = sass.search_of(code)
    assert sum(one.multiplies for one in parts.step) == products
    assert not any(one.multiplies for one in (*parts.prologue, *parts.epilogue))
    assert any(one.copies for one in parts.step)
    assert parts.prefetched == flatten
    assert any(one.operation.startswith("FMNMX") for one in parts.epilogue)
    assert 0 < sass.registers(out.asm["cubin"]) <= 255
