"""Launch configurations and the cache of tuned ones; none of it needs a GPU."""

import dataclasses
import itertools
import json
import math
import multiprocessing

import pytest
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton")

import fills
from negengine.kernels.triton import tuning
from negengine.kernels.triton.tuning import ARCHITECTURES, MatchConfig, Shape
from writing import HERE, write

FLUX, SDXL = Shape(4, 1, 4096, 4096, 3072), Shape(4, 1, 1024, 1024, 1280)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES.values(), tuning.GENERIC], ids=lambda a: a.name)
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("shape", [FLUX, SDXL, Shape(1, 1, 1, 1, 1), Shape(64, 3, 16384, 16384, 64)], ids=str)
def test_a_configuration_fits_and_its_splits_cover_the_keys(architecture, itemsize, shape):
    for aligned, descriptors in itertools.product((False, True) if itemsize > 1 else (True,), (False, True)):
        config = tuning.match_config(shape, itemsize, architecture, aligned, descriptors)
        assert config.shared(itemsize) <= architecture.shared
        assert config.descriptors <= (aligned and descriptors and architecture.descriptors)
        for slots in (1, 5):
            splits = tuning.splits(shape, config, architecture, itemsize, slots)
            assert 1 <= splits <= -(-shape.M // config.block_n)  # every split has a key tile of every image
            least = 1 if slots == 1 else tuning.CROWD
            assert splits <= least or 8 * slots * shape.B * shape.T * splits <= tuning.WORKSPACE
        assert tuning.programs(shape, config, architecture, itemsize, splits) >= 1


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tuning.match_config(FLUX, 2, tuning.GENERIC, False).block_m = 1


@pytest.mark.parametrize(
    "capability,shared,name",
    [
        ((8, 0), 163, "sm_80"), ((8, 6), 99, "sm_86"), ((8, 9), 99, "sm_89"), ((9, 0), 227, "sm_90"), ((10, 0), 227, "sm_100"),
        ((10, 3), 227, "sm_100"),
        ((12, 0), 99, "sm_120"), ((12, 1), 99, "sm_120"), ((8, 7), 163, "sm_80"), ((13, 0), 300, "generic"),
        ((9, 0), 100, "generic"), ("gfx942:sramecc+:xnack-", 64, "gfx942"), ("gfx1100", 64, "generic"),
    ],
)  # fmt: skip
def test_architecture_of_a_device(capability, shared, name):
    found = tuning.architecture_of(capability, shared * 1024, 77)
    assert (found.name, found.processors) == (name, 77)


def test_small_tiles_run_twice_per_processor():
    device = ARCHITECTURES["sm_90"]
    wide, tall, small = tuning.known_configs(2, device, True)
    assert [config.resident(2, device) for config in (wide, tall, small)] == [1, 1, 2]
    assert tuning.programs(FLUX, small, device, 2, 8) == 2 * device.processors
    assert tuning.programs(FLUX, dataclasses.replace(small, persistent=False), device, 2, 8) == 4 * 32 * 8


def test_a_graph_for_every_size_asks_nothing_of_its_sizes():
    """A comparison of a symbol would tie the graph to one size."""
    env = ShapeEnv()
    T = env.create_unbacked_symint()
    device = ARCHITECTURES["sm_90"]
    assert tuning.match_config(Shape(4, 1, T, T, 640), 2, device, True, False) == tuning.known_configs(2, device, True, False)[0]
    assert not env.guards


SLOWER = {  # where smaller tiles would keep the processors busier, and are predicted to take longer all the same
    ("sdxl-64", 148): [2],
    ("flux-768", 148): [4, 5],
    ("flux-1024", 148): [2],
}


@pytest.mark.parametrize("processors", fills.DEVICES)
@pytest.mark.parametrize("name", fills.SHAPES)
def test_processors_are_kept_busy(name, processors):
    """Nine tenths of their time, wherever there are tiles enough for that; exceptions are listed one by one."""
    below = {row.images: row for row in fills.rows(name, processors) if row.fill < 0.9}
    assert [n for n, row in below.items() if row.best >= 0.9] == SLOWER.get((name, processors), [])


def test_the_table_of_fills_in_the_docs():
    assert fills.table() in fills.DOCUMENT.read_text(), "run python tests/kernels/fills.py"


def test_tuning_measures_once_and_remembers(tmp_path):
    cache, seen = tuning.Cache(tmp_path / "deep" / "cache.json"), []

    def milliseconds(config):
        seen.append(config)
        return config.block_m + config.num_stages

    arguments = (FLUX, 2, "bfloat16 paper", ARCHITECTURES["sm_90"], True)
    best = tuning.tune(*arguments, HERE, cache, milliseconds)
    assert best == min(seen, key=lambda c: c.block_m + c.num_stages)
    assert all(c.shared(2) <= ARCHITECTURES["sm_90"].shared for c in seen)
    count = len(seen)
    assert tuning.tune(*arguments, HERE, cache, milliseconds) == best
    assert len(seen) == count
    for other in ("device", "torch", "triton", "kernels"):
        assert cache.get(dataclasses.replace(HERE, **{other: "another"}), tuning.call_key(FLUX, "bfloat16 paper", True)) is None
    for other in ("float16 paper", "bfloat16 release", "int8 paper", "fp8 paper"):
        assert cache.get(HERE, tuning.call_key(FLUX, other, True)) is None


def test_what_a_device_does_not_take_is_not_chosen(tmp_path):
    cache, device = tuning.Cache(tmp_path / "cache.json"), ARCHITECTURES["sm_90"]
    known = tuning.candidates(2, device, True)

    def tuned(taken):
        return tuning.tune(
            FLUX, 2, "bfloat16 paper", device, True, HERE, cache, lambda config: 1.0 if config in taken else math.inf
        )

    assert tuned([]) in known  # and the launch says what is missing
    assert not cache.path.exists()
    assert tuned(known[-1:]) == known[-1]
    assert cache.path.exists()


def test_a_cache_that_cannot_be_read_is_empty(tmp_path):
    cache = tuning.Cache(tmp_path / "cache.json")
    config = MatchConfig(64, 64, 64, 4, 3)
    for text in (b"", b"[]", b'{"half": ', b"\xff\xfe", f'{{"{HERE.key}": []}}'.encode()):
        cache.path.write_bytes(text)
        assert cache.get(HERE, "call") is None
        cache.put(HERE, "call", config)
        assert cache.get(HERE, "call") == config
    for entry in ({"of another version": 1}, dataclasses.asdict(config) | {"block_m": "64"}, [64], None):
        cache.path.write_text(json.dumps({HERE.key: {"call": entry}}))
        assert cache.get(HERE, "call") is None


def test_two_processes_write_at_once(tmp_path):
    path = tmp_path / "cache.json"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    cache = tuning.Cache(path)
    assert all(cache.get(HERE, f"{name} {i}") == MatchConfig(i + 1, 64, 64, 4, 3) for name in "ab" for i in range(25))
    assert {p.name for p in tmp_path.iterdir()} == {"cache.json", "cache.lock"}


def test_tuning_is_opt_in(monkeypatch, tmp_path):
    for setting in (None, "", "0"):
        monkeypatch.delenv("NEGENGINE_TUNE", raising=False)
        if setting is not None:
            monkeypatch.setenv("NEGENGINE_TUNE", setting)
        assert tuning.tuning_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NEGENGINE_TUNE", "1")
    assert tuning.tuning_cache().path == tmp_path / "negengine" / "triton.json"
    monkeypatch.setenv("NEGENGINE_TUNE", str(tmp_path / "mine.json"))
    assert tuning.tuning_cache().path == tmp_path / "mine.json"
