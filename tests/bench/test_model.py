"""The static model says what follows from its assumptions."""

import dataclasses

import pytest
import torch

from negengine.bench import guidance_model, launches, model, sass
from negengine.bench.machines import MACHINES, Latencies, Machine
from negengine.bench.shapes import SHAPES, Shape

triton = pytest.importorskip("triton")

H100 = MACHINES["H100 SXM"]


def instruction(name, stall=1, results=None, reads=None, waits=(), operands=""):
    return sass.Instruction(0, name, operands, "", stall, results, reads, waits, None)


def launch(name="match_kernel", programs=132, warps=8, registers=200, shared=200_000, **values):
    usual = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8, "splits": 4}
    return launches.Launch(name, programs, warps, registers, shared, usual | values, b"")


# --- one scheduler -----------------------------------------------------------------------------------------------


def test_stalls_and_lanes():
    full, half = [instruction("FADD")] * 10, [instruction("IADD3")] * 10
    assert model.cycles(full, 1, H100) == 10
    assert model.cycles(half, 1, H100) == 20  # 16 lanes
    assert model.cycles([instruction("FADD", stall=13)] * 10, 1, H100) == 130
    assert model.cycles([instruction("FADD", stall=13)] * 10, 2, H100) == 131  # the other warp issues meanwhile
    assert model.cycles(half, 2, H100) == 40
    assert model.cycles(full, 1, MACHINES["A100 SXM"]) == 20


def test_a_result_is_waited_for():
    load, use = instruction("LDG.E", results=3), instruction("FADD", waits=(3,))
    latency = H100.latencies.cache
    assert model.cycles([load, use], 1, H100) == latency + 1
    assert model.cycles([load, instruction("FADD", waits=(2,))], 1, H100) < latency
    assert model.cycles([load, use], 1, H100, narrow=900) == 901
    wide = instruction("LDG.E.128", results=3)
    assert model.cycles([wide, use], 1, H100, narrow=900, wide=600) == 601


def test_warps_meet_at_a_barrier():
    code = [instruction("FADD", stall=10), instruction("BAR.SYNC.DEFER_BLOCKING"), instruction("FADD")]
    assert model.cycles(code, 2, H100) == 11 + H100.latencies.barrier + 2


def test_asynchronous_products_overlap_until_they_are_waited_for():
    product = instruction("HGMMA.64x256x16.F32.BF16", operands="R24, gdesc[UR4], R24, gsb0")
    wait = instruction("WARPGROUP.DEPBAR.LE", operands="gsb0, 0x0")
    work = [instruction("FADD")] * 100
    each = 2 * 64 * 256 * 16 / H100.products["bf16"]
    assert model.cycles([product, *work], 1, H100) == each
    assert model.cycles([product, wait, *work], 1, H100) == each + 100
    assert model.steady([product, *work], 1, H100) == each


# --- parts of a call ---------------------------------------------------------------------------------------------


def search(epilogue=0, prefetched=True, prologue=()):
    return sass.Search((instruction("HMMA.16816.F32.BF16"),), prologue, (instruction("FADD"),) * epilogue, prefetched)


def seconds(tile, longest=12, steps=48, blocks=1):
    return model.match_seconds(tile, steps, longest, blocks, H100)


def test_a_perfect_kernel_reaches_the_floor():
    shape = Shape("full", 4, 132 * 128, 4096)
    machine = dataclasses.replace(H100, sustained=1.0, cache=1e18)
    tile = dataclasses.replace(model.tile(search(), launch(), "bf16", machine), exposed=0.0)
    tiles = 3 * 132 * 66
    floor = shape.search_flop / machine.peak("bf16")
    assert model.match_seconds(tile, 64, tiles // 132, 1, machine) == pytest.approx(floor, rel=1e-12)
    assert model.product_seconds(shape, "bf16", machine) - machine.launch == pytest.approx(floor, rel=1e-3)


def test_more_exposed_is_slower_and_half_the_fill_half_as_fast():
    few, many = (model.tile(search(n), launch(), "bf16", H100) for n in (100, 1000))
    assert many.exposed > few.exposed
    assert seconds(many) > seconds(few)
    assert seconds(few, longest=24) == 2 * seconds(few, longest=12)


def test_blocks_hide_what_the_others_expose():
    tile = model.Tile(step=1000.0, limit=1000.0, exposed=8000.0, busy=1000.0)
    assert seconds(tile, longest=6, blocks=2) < seconds(tile, longest=12)
    assert seconds(tile, longest=6, blocks=2) == pytest.approx(12 * 49000 / H100.clock)


def test_a_refill_is_exposed_unless_the_next_tile_is_on_its_way():
    copies = (instruction("UTMALDG.3D", reads=0),)
    late = model.tile(search(prologue=copies, prefetched=False), launch(), "bf16", H100)
    early = model.tile(search(), launch(), "bf16", H100)
    assert late.exposed - early.exposed > H100.latencies.copy


def test_a_slow_cache_limits_a_step():
    slow = dataclasses.replace(H100, cache=H100.cache / 2)
    usual, limited = (model.tile(search(), launch(), "bf16", machine).step for machine in (H100, slow))
    assert limited == pytest.approx(2 * (128 + 256) * 64 * 2 / (H100.cache / H100.clock / 132))
    assert limited > usual


def rows(count=1):
    return sass.Rows((), ((instruction("LDG.E.128", results=0), instruction("FADD", waits=(0,))),) * count)


def test_rows_are_bound_by_memory_or_by_their_chain():
    merge = launch("merge_kernel", 3072, 4, 32, 0, D=384, VECTOR=8, BLOCK_D=256, ROWS=4)
    moved = 200e6
    floor = moved / (H100.memory * H100.streamed)
    assert model.rows_time(rows(), merge, 12288, moved, H100) == pytest.approx(floor)
    heavy = dataclasses.replace(merge, warps=8, registers=255)
    assert model.resident(heavy, H100) == 1
    rounds, chain = 24, 12 * (32 + H100.latencies.memory + 1)  # the second warp of a scheduler waits for the first one's load to go
    assert model.rows_time(rows(), heavy, 12288, 0.0, H100) == pytest.approx(rounds * chain / H100.clock)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"registers": 255, "warps": 8}, 1),
        ({"registers": 128, "warps": 4}, 4),
        ({"registers": 32, "warps": 4}, 16),
        ({"registers": 32, "warps": 1}, 32),
        ({"registers": 32, "warps": 4, "shared": 100_000}, 2),
    ],
)
def test_resident_blocks(change, expected):
    assert model.resident(dataclasses.replace(launch(shared=0), **change), H100) == expected


def test_tiles_are_dealt_as_the_kernel_deals_them():
    shape = SHAPES["flux-1024"]
    assert model.tiles_of(launch(), shape) == (96, 16)
    assert model.dealt(launch(splits=1), shape, 96) == 16
    assert model.dealt(launch(splits=16), shape, 132) == 12  # 1536 tiles


# --- machines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_is_near_its_data_sheet(name):
    """The clock under load, times what a cycle does, is not above the advertised peak, nor far below."""
    sheet = {
        "A100 SXM": 312,
        "RTX A6000": 155,
        "RTX 4090": 165.2,
        "H100 SXM": 989.4,
        "H200 SXM": 989.4,
        "B200": 2250,
        "RTX 5090": 209.5,
    }
    machine = MACHINES[name]
    assert 0.75 <= machine.peak("bf16") / (sheet[name] * 1e12) <= 1.005
    assert 40 < machine.peak("bf16") / machine.memory < 600
    assert machine.cache > machine.memory


def test_every_architecture_has_a_machine():
    from negengine.kernels.triton import tuning

    found = {machine.architecture for machine in MACHINES.values()}
    assert found == set(tuning.ARCHITECTURES) - {"gfx942"}
    for machine in MACHINES.values():
        known = tuning.ARCHITECTURES[machine.architecture]
        assert (machine.processors, known.shared) == (known.processors, machine.shared - 1024)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clock": 0.0}, "clock must be positive"),
        ({"memory": float("nan")}, "memory must be positive and finite"),
        ({"sustained": 1.2}, "share of the peak"),
        ({"products": {"bf16": -1}}, "products must be positive"),
        ({"products": {}}, "names no dtype"),
    ],
)
def test_impossible_machines(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(H100, **change)


def test_a_dtype_without_matrix_units():
    with pytest.raises(ValueError, match="no matrix units for fp8, only for bf16, fp16, int8"):
        MACHINES["A100 SXM"].peak("fp8")
    assert isinstance(H100, Machine)
    assert Latencies().cache < Latencies().memory


# --- the kernels -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter replaces the compiler")
def test_the_kernels_are_recorded_and_predicted():
    """One architecture; `make predict` does all."""
    shape = SHAPES["sdxl-64"]
    found = launches.recorded(shape, torch.bfloat16, "sm_90")
    assert [one.name for one in found] == ["norms_kernel", "match_kernel", "merge_kernel"]
    assert found[1].values["D"] * found[1].values["VECTOR"] == shape.channels
    parts = sass.search_of(sass.instructions(sass.disassembled(found[1].cubin)))
    m, n = found[1].values["BLOCK_M"], found[1].values["BLOCK_N"]
    flop = sum(2 * 64 * int(one.name.split("x")[1]) * 16 for one in parts.step if one.multiplies)
    assert flop * found[1].warps // 4 == 2 * m * n * found[1].values["BLOCK_K"]
    predicted = model.predict(found, shape, "bf16", H100)
    floor = shape.search_flop / H100.peak("bf16")
    assert floor < predicted.product < predicted.whole < 10 * floor
    assert 0 < predicted.ratio < 1
    assert 0.5 < predicted.fill <= 1
    everything = model.predict(found, shape, "bf16", H100, share=1.0)
    assert everything.merge >= predicted.merge
    crowded = model.predict(found, shape, "bf16", H100, lambda *_: 2 * model.dealt(*_))
    assert crowded.match == pytest.approx(2 * predicted.match)
    with pytest.raises(ValueError, match="one launch each of norms, match and merge"):
        model.predict(found[:2], shape, "bf16", H100)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("operator, shape", [("guide", (2, 4, 64, 64)), ("evidence", (2, 4, 64, 64)), ("nag", (2, 512, 640))])
def test_the_kernels_of_guidance_are_predicted(operator, shape):
    call = (operator, shape, torch.bfloat16)
    launch_ = launches.recorded_guidance(*call, "sm_90")
    assert launch_.name == f"{operator}_kernel"
    programs = 2 * 512 if operator == "nag" else 2 * 4 * 64 * 64 // launch_.values["BLOCK"]
    assert launch_.programs == programs
    floor = guidance_model.floor(*call, H100)
    assert floor == pytest.approx((3 if operator == "nag" else 5) * 2 * torch.Size(shape).numel() / (3.35e12 * 0.9))
    predicted = guidance_model.predict(*call, H100)
    assert floor + H100.launch <= predicted < 1e-4
    slow = dataclasses.replace(H100, memory=H100.memory / 100)
    assert guidance_model.predict(*call, slow) == pytest.approx(guidance_model.floor(*call, slow) + H100.launch)


def test_nothing_is_recorded_under_the_interpreter(monkeypatch):
    from negengine.kernels.triton import rows

    monkeypatch.setattr(rows, "INTERPRETED", triton.language.constexpr(True))
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        launches.recorded(SHAPES["sdxl-32"], torch.bfloat16, "sm_90")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        launches.recorded_guidance("nag", (1, 2, 64), torch.bfloat16, "sm_90")
