"""Loops, collectives, bytes and times of compiled programs, against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from refine_jax.base.errors import ConfigError
from refine_jax.compile_only.estimate import hlo
from refine_jax.compile_only.estimate.chips import CHIPS, parse_topology
from refine_jax.compile_only.estimate.cost import Estimator, convolution_operations
from refine_jax.compile_only.estimate.flops import Kernel
from refine_jax.compile_only.estimate.kernel_time import KernelTimes
from refine_jax.compile_only.estimate.memory import Memory, read_assignment
from refine_jax.compile_only.estimate.network import Collective, Network, parse_group, parse_pairs

RING = Network([(i, 0) for i in range(16)], (16, 1), (True, False), 50e9)


def compiled_module(function, *args):
    return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def loops(module):
    """How often the loops of a module run, in order of size."""
    return sorted(
        module.trips(i, c)
        for c in module.computations.values()
        for i in c.instructions.values()
        if i.opcode == "while"
    )


def estimate(text, kernel_seconds=None, network=RING):
    return Estimator(hlo.parse(text), CHIPS["v5e"], network, kernel_seconds).run()


@pytest.mark.parametrize(
    ("attributes", "shapes", "operations"),
    [
        # [T, D] by [G, L, D], as the TPU's compiler writes it: G slides over an axis of size 1.
        (
            "window={size=12 pad=11_11 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
            ((64, 32, 1), (12, 8, 32), (64, 12, 8)),
            2 * 64 * 32 * 12 * 8,
        ),
        # [T, G, L] by [G, L, D], added up over both.
        (
            "window={size=12}, dim_labels=b0f_0io->bf0",
            ((64, 12, 8), (12, 8, 32), (64, 32, 1)),
            2 * 64 * 32 * 12 * 8,
        ),
        ("dim_labels=bf_oi->bf", ((64, 32), (16, 32), (64, 16)), 2 * 64 * 32 * 16),
        # A short convolution along tokens, and one with steps of two.
        (
            "window={size=4 pad=3_0}, dim_labels=b0f_0io->b0f",
            ((2, 10, 3), (4, 3, 5), (2, 10, 5)),
            2 * 2 * 3 * 5 * (10 * 4 - 6),
        ),
        (
            "window={size=2x1 stride=2x1}, dim_labels=b01f_01io->b01f",
            ((1, 6, 7, 3), (2, 1, 3, 5), (1, 3, 7, 5)),
            2 * 3 * 5 * 6 * 7,
        ),
    ],
)
def test_operations_of_products(attributes, shapes, operations):
    assert convolution_operations(attributes, *shapes) == operations


def test_nested_loops():
    def body(x, _):
        return lax.scan(lambda y, _: (jnp.sin(y @ y), None), x, length=5)[0], None

    def function(x):
        x = lax.scan(body, x, length=7)[0]
        return lax.fori_loop(2, 11, lambda i, y: jnp.cos(y) * i, x)

    assert loops(compiled_module(function, jnp.ones((4, 4)))) == [5, 7, 9]


WHILE = """HloModule loop

%body (p: (s32[], pred[], f32[4])) -> (s32[], pred[], f32[4]) {
  %p = (s32[], pred[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %alive = pred[] get-tuple-element(%p), index=1
  %x = f32[4] get-tuple-element(%p), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %out = (s32[], pred[], f32[4]) tuple(%next, %alive, %x)
}

%condition (q: (s32[], pred[], f32[4])) -> pred[] {
  %q = (s32[], pred[], f32[4]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(13)
  %more = pred[] compare(%j, %limit), direction=LT
  %still = pred[] get-tuple-element(%q), index=1
  ROOT %both = pred[] and(%more, %still)
}

ENTRY %main (x0: f32[4], a0: pred[]) -> f32[4] {
  %x0 = f32[4] parameter(0)
  %a0 = pred[] parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], pred[], f32[4]) tuple(%zero, %a0, %x0)
  %loop = (s32[], pred[], f32[4]) while(%start), condition=%condition, body=%body
  ROOT %end = f32[4] get-tuple-element(%loop), index=2
}
"""


def test_a_loop_that_may_end_early_counts_in_full_steps_of_two():
    assert loops(hlo.parse(WHILE)) == [7]


def test_a_loop_without_a_known_end_is_counted_once_and_said_to_be():
    text = WHILE.replace("ROOT %both = pred[] and(%more, %still)", "ROOT %s = pred[] copy(%still)")
    cost = estimate(text)
    assert cost.unknown == 1
    assert cost.seconds >= 0


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 simulated devices")
def test_collectives_of_a_sharded_program():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))

    def part(x):  # [16, 8] float32 on a device, 512 bytes
        def step(x, _):
            return lax.psum(x, "b") * 0.5, None

        x = lax.scan(step, x, length=3)[0]
        y = lax.all_gather(x, "a", tiled=True)
        z = lax.psum_scatter(y, ("a", "b"), tiled=True)
        w = lax.ppermute(z, "b", [(i, (i + 1) % 4) for i in range(4)])
        return lax.all_to_all(w, "b", split_axis=1, concat_axis=0, tiled=True)

    spec = PartitionSpec(("a", "b"))
    mapped = jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones((128, 8))).compile().as_text()
    found = Estimator(hlo.parse(text), CHIPS["v5e"], RING, None).run()
    assert dict(found.counts) == {
        "all-reduce": 3,
        "all-gather": 1,
        "reduce-scatter": 1,
        "collective-permute": 1,
        "all-to-all": 1,
    }
    # Of the whole array on a device: 2 (n - 1) / n, (n - 1) / n, all of it.
    assert found.sent["all-reduce"] == 3 * 2 * 512 * 3 / 4
    assert found.sent["all-gather"] == 1024 / 2
    assert found.sent["reduce-scatter"] == 1024 * 7 / 8
    assert found.sent["collective-permute"] == 128
    assert found.sent["all-to-all"] == 128 * 3 / 4


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups=[4,2]<=[8], x=1", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x=1", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x=1", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("channel_id=1", tuple(range(8))),
    ],
)
def test_replica_groups(text, group):
    assert parse_group(text, 8) == group


def test_times_of_collectives():
    line = Network([(i, 0) for i in range(4)], (4, 1), (False, False), 50e9)
    square = Network([(i, j) for i in range(4) for j in range(4)], (4, 4), (False, False), 50e9)
    group, size = tuple(range(4)), 4e8
    # A line sends 3/4 of the array over one link; 3 hops.
    gather = Collective("all-gather", size, group)
    assert line.seconds(gather) == pytest.approx(3e8 / 50e9 + 3e-6)
    # A ring of 16 both ways, 8 hops.
    gather = Collective("all-gather", size, tuple(range(16)))
    assert RING.seconds(gather) == pytest.approx(size * 15 / 16 / 100e9 + 8e-6)
    # Four of a ring are a line.
    assert RING.seconds(Collective("all-gather", size, group)) == pytest.approx(3e8 / 50e9 + 3e-6)
    # Both axes of a square without wrapping links.
    reduce = Collective("all-reduce", size, tuple(range(16)))
    assert square.seconds(reduce) == pytest.approx(2 * size * 15 / 16 / 100e9 + 6e-6)
    # From end to end of a line, but to the neighbour of a ring.
    pairs = parse_pairs("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}")
    shift = Collective("collective-permute", size, group, pairs)
    assert line.seconds(shift) == pytest.approx(3 * size / 50e9 + 3e-6)
    around = Collective("collective-permute", size, (), ((15, 0), (0, 1)))
    assert RING.seconds(around) == pytest.approx(size / 50e9 + 1e-6)
    # Half of all data crosses the middle of a line, by one link.
    swap = Collective("all-to-all", size, group)
    assert line.seconds(swap) == pytest.approx(size * 4 / 4 / 50e9 + 3e-6)
    assert RING.seconds(Collective("all-reduce", size, (3,))) == 0


SCHEDULE = """HloModule schedule, is_scheduled=true

%slice (a: f32[8,1000], i: s32[]) -> f32[1000] {
  %a = f32[8,1000]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,1000]{1,0} dynamic-slice(%a, %i, %z), dynamic_slice_sizes={1,1000}
  ROOT %b = f32[1000]{0} bitcast(%s)
}

%write (a.1: f32[8,1000], v: f32[1000], i.1: s32[]) -> f32[8,1000] {
  %a.1 = f32[8,1000]{1,0} parameter(0)
  %v = f32[1000]{0} parameter(1)
  %i.1 = s32[] parameter(2)
  %z.1 = s32[] constant(0)
  %r = f32[1,1000]{1,0} bitcast(%v)
  ROOT %u = f32[8,1000]{1,0} dynamic-update-slice(%a.1, %r, %i.1, %z.1)
}

ENTRY %main (x: f32[8,1000], i.2: s32[], w: f32[400000]) -> f32[8,1000] {
  %x = f32[8,1000]{1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %w = f32[400000]{0} parameter(2)
  %go = (f32[400000], f32[6400000]) all-gather-start(%w),
    replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}
  %one = f32[1000]{0:S(1)} fusion(%x, %i.2), kind=kLoop, calls=%slice,
    backend_config={"window_config":{"estimated_cycles":"150000"}}
  %k = f32[1000]{0} custom-call(%one), custom_call_target="tpu_custom_call",
    metadata={op_name="jit(f)/my_kernel/pallas_call"},
    backend_config={"used":{}}
  %put = f32[8,1000]{1,0} fusion(%x, %k, %i.2), kind=kLoop, calls=%write,
    backend_config={"window_config":{"estimated_cycles":"18446744073709551615"}}
  %all = f32[6400000]{0} all-gather-done(%go)
  ROOT %end = f32[8,1000]{1,0} copy(%put),
    backend_config={"window_config":{"estimated_cycles":"1500"}}
}
"""


def test_the_estimate_by_hand():
    calls = []

    def kernel_seconds(*call):
        calls.append(call)
        return 2e-5

    cost = estimate(SCHEDULE, kernel_seconds)
    # Of 32,000 bytes the slice reads 4,000 (and a number) and writes to vector memory.
    small = 4
    slice_, kernel, write, copy = 4000 + small, 4000, 8000 + small, 64000
    assert cost.bytes == slice_ + kernel + write + copy
    assert calls == [("my_kernel", ((1000,),), 4000)]
    # 150,000 cycles at 1.5 GHz, the kernel, bytes where the compiler has no estimate, the copy.
    run = [1e-4, write / (0.38 * 819e9), 1e-6]
    assert cost.xla == pytest.approx(sum(run))
    assert cost.kernels == 2e-5
    # 24 MB over both directions of the ring, 8 hops; the rest of it is waited for before the copy.
    links = 25.6e6 * 15 / 16 / 100e9 + 8e-6
    assert cost.links == pytest.approx(links)
    assert cost.waits == pytest.approx(links - 1e-4 - 2e-5 - write / (0.38 * 819e9))
    assert cost.seconds == pytest.approx(links + 1e-6)


TWO_GATHERS = """HloModule two, is_scheduled=true

ENTRY %main (x: f32[400000]) -> f32[1600000] {{
  %x = f32[400000]{{0}} parameter(0)
  %go = (f32[400000], f32[1600000]) all-gather-start(%x),
    replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  %go.1 = (f32[400000], f32[1600000]) all-gather-start(%x),
    replica_groups={{{group}}}, dimensions={{0}}
  %all = f32[1600000]{{0}} all-gather-done(%go)
  ROOT %all.1 = f32[1600000]{{0}} all-gather-done(%go.1)
}}
"""


@pytest.mark.parametrize(
    ("group", "times"), [("{4,5,6,7}", 2), ("{0,4,8,12}", 1), ("{0,1,4,5}", 1.5)]
)
def test_collectives_along_different_axes_go_at_the_same_time(group, times):
    """Rows after rows, beside columns, and after rows for four devices of both axes."""
    square = Network([(i, j) for i in range(4) for j in range(4)], (4, 4), (False, False), 50e9)
    one = 4.8e6 / 50e9  # 3/4 of 6.4 MB over one link; over two links half
    cost = estimate(TWO_GATHERS.format(group=group), network=square)
    assert cost.seconds == pytest.approx(times * one, rel=0.1)  # and some hops


def test_a_kernel_that_reads_parts_of_arrays_says_how_much():
    calls = []

    def kernel_seconds(*call):
        calls.append(call)
        return 2e-5

    stated = '{"custom_call_config":{"cost_estimate":{"flops":"0","bytes_accessed":"3000"}}}'
    cost = estimate(SCHEDULE.replace('{"used":{}}', stated), kernel_seconds)
    assert calls == [("my_kernel", ((1000,),), 3000)]
    assert cost.bytes == estimate(SCHEDULE, kernel_seconds).bytes - 1000


_GATHER = """{name} (a{n}: f32[400000]) -> f32[6400000] {{
  %a{n} = f32[400000]{{0}} parameter(0)
  %g{n} = f32[6400000]{{0}} all-gather(%a{n}), channel_id=3, dimensions={{0}},
    replica_groups={{{{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}}},
    frontend_attributes={{chain_id="7"}}
  {rest}
}}

"""
_PARTS = {
    "%start": 'ROOT %s = f32[6400000] custom-call(%g1), custom_call_target="AsyncCollectiveStart"',
    "%beside": "ROOT %b = f32[6400000] copy(%g2)",
    "%finish": 'ROOT %d = f32[6400000] custom-call(%g3), custom_call_target="AsyncCollectiveDone"',
}
CHAIN = "HloModule chain, is_scheduled=true\n\n"
CHAIN += "".join(_GATHER.format(name=k, n=i, rest=v) for i, (k, v) in enumerate(_PARTS.items(), 1))
CHAIN += """ENTRY %main (w: f32[400000]) -> f32[6400000] {
  %w = f32[400000]{0} parameter(0)
  %one = f32[6400000]{0} fusion(%w), kind=kCustom, calls=%start
  %two = f32[6400000]{0} fusion(%w), kind=kCustom, calls=%beside,
    backend_config={"window_config":{"estimated_cycles":"150000"}}
  ROOT %three = f32[6400000]{0} fusion(%two), kind=kCustom, calls=%finish
}
"""


def test_a_collective_that_is_divided_among_fusions_counts_once():
    cost = estimate(CHAIN)
    size = 4 * 6400000
    assert dict(cost.counts) == {"all-gather": 1}
    assert cost.sent["all-gather"] == size * 15 / 16
    links = size * 15 / 16 / 100e9 + 8e-6
    # The fusion between runs beside it.
    assert cost.xla == pytest.approx(1e-4)
    assert cost.seconds == pytest.approx(links)
    assert cost.waits == pytest.approx(links - 1e-4)


HANDED_ON = """HloModule handed_on, is_scheduled=true

%beside (a: f32[400000], g: f32[6400000], x: f32[1000]) -> (f32[1000], f32[400000], f32[6400000]) {
  %x = f32[1000]{0} parameter(2)
  %y = f32[1000]{0} negate(%x)
  %a = f32[400000]{0} parameter(0)
  %g = f32[6400000]{0} parameter(1)
  %all = f32[6400000]{0} all-gather(%a), channel_id=3, dimensions={0},
    replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, frontend_attributes={chain_id="7"}
  ROOT %t = (f32[1000]{0}, f32[400000]{0}, f32[6400000]{0}) tuple(%y, %a, %g)
}

ENTRY %main (w: f32[400000], g: f32[6400000], x: f32[1000]) -> f32[1000] {
  %w = f32[400000]{0} parameter(0)
  %g = f32[6400000]{0} parameter(1)
  %x = f32[1000]{0} parameter(2)
  %two = (f32[1000]{0}, f32[400000]{0}, f32[6400000]{0}) fusion(%w, %g, %x), kind=kCustom,
    calls=%beside
  ROOT %out = f32[1000]{0} get-tuple-element(%two), index=0
}
"""


def test_what_a_fusion_hands_on_to_a_collective_is_not_its_traffic():
    cost = estimate(HANDED_ON)
    assert cost.bytes == 2 * 4000
    assert cost.xla == pytest.approx(2 * 4000 / (0.38 * 819e9))


def test_times_of_kernels():
    chip = CHIPS["v5e"]
    small = Kernel("delta_rule_forward", ((4,),), 1e9)
    large = Kernel("delta_rule_forward", ((8,),), 2e9)
    times = KernelTimes([small, large], "v5e", chip)
    share = times.share("delta_rule_forward")
    assert 0.5 < share < 1
    assert times("delta_rule_forward", ((4,),), 0) == pytest.approx(1e9 / (share * 197e12))
    assert times("delta_rule_forward", ((8,),), 0) == pytest.approx(2e9 / (share * 197e12))
    assert times("delta_step", ((2,),), 819e6) == pytest.approx(1e-3)


ASSIGNMENT = """BufferAssignment:
allocation 0: size 32000, parameter 0, shape |f32[8,1000]| at ShapeIndex {}, maybe-live-out:
 value: <1 x @0> (size=32000,offset=0): f32[8,1000]{1,0:T(8,128)}
allocation 1: size 1600000, parameter 2, shape |f32[400000]| at ShapeIndex {}:
 value: <2 w @0> (size=1600000,offset=0): f32[400000]{0}
allocation 2: size 512, thread-local:
 value: <3 z @0> (size=512,offset=0): s32[]
allocation 3: size 70000, preallocated-temp:
 value: <4 put @0> (size=32000,offset=0): f32[8,1000]{1,0}
 value: <5 k @0> (size=4000,offset=0): f32[1000]{0}
 value: <6 k{0} (phi) @0> (size=4000,offset=32000): f32[1000]{0}
allocation 4: size 9000, color 1, preallocated-temp:
 value: <7 one @1> (size=4000,offset=0): f32[1000]{0:S(1)}
"""


def test_memory_and_buffers_of_an_assignment():
    memory, buffers = read_assignment(ASSIGNMENT, hlo.parse(SCHEDULE))
    assert memory == Memory(1632000, 32000, 32000, 70000)
    assert memory.peak == 1702000
    assert [b.bytes for b in buffers] == [1600000, 32000, 32000, 4000]
    assert buffers[-1].source == "jit(f)/my_kernel/pallas_call"
    assert buffers[0].shape == "f32[400000]"


def test_topologies():
    pod = parse_topology("v5p:4x4x8")
    assert (pod.devices, pod.wraps, pod.options) == (128, (True, True, True), {})
    assert parse_topology("v5p:2x4x4").wraps == (False, False, False)
    assert parse_topology("v5e:16x8").wraps == (True, False)
    assert parse_topology("tpu7x:2x2x1").devices == 8
    assert parse_topology("v6e:1x1").options == {"chips_per_host_bounds": [1, 1, 1]}
    for name in (None, "v9:4x4", "v5e", "v5e:4x4x4", "v5p:0x2x2", "v5e:4"):
        with pytest.raises(ConfigError, match=r"--topology.*example.*Got: "):
            parse_topology(name)


# Between slices

TWO_SLICES = Network(
    [(i, 0) for i in range(4)] * 2, (4, 1), (False, False), 50e9, [0] * 4 + [1] * 4, 2e9
)


@pytest.mark.parametrize(
    ("collective", "across"),
    [
        # The four chips of a slice share its 8 MB: 2 MB each go there, and 2 MB come back.
        (Collective("all-reduce", 8e6, tuple(range(8))), 2 * 8e6 / 2 / 4),
        (Collective("all-reduce", 8e6, (0, 4)), 2 * 8e6 / 2),
        (Collective("all-gather", 8e6, tuple(range(8))), 8e6 / 2 / 4),
        (Collective("all-reduce", 8e6, (0, 1, 2, 3)), 0.0),
        (Collective("collective-permute", 8e6, (), ((0, 1), (1, 4))), 8e6),
        (Collective("collective-permute", 8e6, (), ((0, 1), (4, 5))), 0.0),
    ],
)
def test_bytes_and_time_between_slices(collective, across):
    assert TWO_SLICES.sent_across(collective) == across
    within = dataclasses.replace(
        collective, group=tuple(d for d in collective.group if d < 4), pairs=()
    )
    inside = TWO_SLICES.seconds(within) if within.group and across else 0.0
    if across:
        assert TWO_SLICES.seconds(collective) == pytest.approx(across / 2e9 + inside)
    else:
        alone = dataclasses.replace(TWO_SLICES, slices=())
        assert TWO_SLICES.seconds(collective) == alone.seconds(collective)


def test_what_libtpu_sends_between_slices_goes_on_beside_the_program():
    """A receive may be written before its send; the wait is at the end of the receive."""
    attributes = (
        'frontend_attributes={_xla_host_transfer_rendezvous="r0",'
        '_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (p: f32[1000,1000]) -> f32[1000,1000] {{
  %p = f32[1000,1000]{{1,0}} parameter(0)
  %token = token[] after-all()
  %recv = (f32[1000,1000]{{1,0}}, u32[], token[]) recv(%token), channel_id=1, {attributes}
  %send = (f32[1000,1000]{{1,0}}, u32[], token[]) send(%p, %token), channel_id=2, {attributes}
  %send-done = token[] send-done(%send), channel_id=2
  %work = f32[1000,1000]{{1,0}} multiply(%p, %p)
  %recv-done = (f32[1000,1000]{{1,0}}, token[]) recv-done(%recv), channel_id=1
  ROOT %sum = f32[1000,1000]{{1,0}} get-tuple-element(%recv-done), index=0
}}
"""
    cost = estimate(text, network=TWO_SLICES)
    assert cost.sent == {"all-reduce between slices": 4e6}
    assert cost.counts == {"all-reduce between slices": 1}
    assert cost.dcn == pytest.approx(4e6 / 2e9)
    assert cost.xla > 0 and cost.waits == pytest.approx(4e6 / 2e9 - cost.xla)
    assert cost.seconds == pytest.approx(4e6 / 2e9)


def test_slices_of_a_topology():
    topology = parse_topology("v5e:4x4", 2)
    assert topology.devices == 32 and topology.options == {"num_slices": 2}
    assert str(topology) == "2 slices of v5e:4x4"
    with pytest.raises(ConfigError, match="--slices must be from 1"):
        parse_topology("v5e:4x4", 0)
