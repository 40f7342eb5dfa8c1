"""The analyser of compiled programs, against XLA's own account and against unrolled programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers.planning.hlo import analyse

L, D, F, B = 5, 256, 512, 128


def compiled(f, *shapes, dtype=jnp.float32):
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, dtype) for s in shapes)).compile()


def layer(x, weights):
    return x + jnp.tanh(x @ weights[0]) @ weights[1]


def scanned(x, up, down):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, (up, down))[0]


def unrolled(x, up, down):
    for i in range(L):
        x = layer(x, (up[i], down[i]))
    return x


SHAPES = (B, D), (L, D, F), (L, F, D)
FORWARD = 2 * L * 2 * B * D * F


@pytest.mark.parametrize("gradient", [False, True])
def test_a_loop_costs_what_its_unrolled_program_does(gradient):
    wrap = lambda f: jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2)) if gradient else f
    loop, flat = (analyse(compiled(wrap(f), *SHAPES).as_text()) for f in (scanned, unrolled))
    assert loop.flops == flat.flops == FORWARD * (3 if gradient else 1)
    if not gradient:  # the gradient's loop stacks what it saves
        assert loop.bytes_accessed == pytest.approx(flat.bytes_accessed, rel=0.15)
    assert loop.open_loops == flat.open_loops == ()


def test_loops_within_loops():
    def nested(x, up, down):
        return jax.lax.fori_loop(0, 7, lambda i, x: scanned(x, up, down), x)

    cost = analyse(compiled(nested, *SHAPES).as_text())
    assert cost.flops == 7 * FORWARD
    assert cost.bytes_accessed == pytest.approx(
        7 * analyse(compiled(scanned, *SHAPES).as_text()).bytes_accessed, rel=0.15
    )


def test_rounds_are_read_off_the_condition_too():
    text = compiled(scanned, *SHAPES).as_text()
    bare, n = re.subn(r'"known_trip_count":\{[^}]*\}', '"x":0', text)
    assert n and analyse(bare) == analyse(text)


@pytest.mark.parametrize("step, rounds", [("%one", 8), ("%two", 4), ("%three", 3)])
def test_a_counter_may_go_up_by_more_than_one(step, rounds):
    loop = f"""\
%body (p: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {{
  %p = (u32[], f32[8,8]{{1,0}}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{{1,0}} get-tuple-element(%p), index=1
  %one = u32[] constant(1)
  %two = u32[] constant(2)
  %three = u32[] add(%one, %two)
  %j = u32[] add(%i, {step})
  %y = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (u32[], f32[8,8]{{1,0}}) tuple(%j, %y)
}}

%cond (p: (u32[], f32[8,8])) -> pred[] {{
  %p = (u32[], f32[8,8]{{1,0}}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %n = u32[] constant(8)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}}
"""
    body = """\
  %a = (u32[], f32[8,8]{1,0}) parameter(0)
  ROOT %w = (u32[], f32[8,8]{1,0}) while(%a), condition=%cond, body=%body
"""
    assert analyse(module(body, loop)).flops == rounds * 2 * 8**3


def test_a_loop_of_unknown_rounds_counts_as_often_as_the_caller_says():
    def until(x, up, down, n):
        return jax.lax.fori_loop(0, n[0].astype(int), lambda i, x: scanned(x, up, down), x)

    text = compiled(until, *SHAPES, (1,)).as_text()
    once = analyse(text)
    assert once.flops == FORWARD
    assert len(once.open_loops) == 1 and once.open_loops[0].startswith("jit(until)/while")
    assert analyse(text, rounds=lambda name: 11 if "until" in name else 1).flops == 11 * FORWARD


def test_without_loops_it_agrees_with_xla():
    program = compiled(unrolled, *SHAPES)
    cost, xla = analyse(program.as_text()), program.cost_analysis()
    assert cost.flops == pytest.approx(xla["flops"], rel=0.01)
    assert cost.bytes_accessed == pytest.approx(xla["bytes accessed"], rel=0.01)


@pytest.mark.parametrize(
    "strides, padding, holes, reach, groups",
    [
        ((1, 1), "SAME", (1, 1), (1, 1), 1),
        ((2, 3), "VALID", (1, 1), (1, 2), 1),
        ((1, 1), ((2, 1), (0, 3)), (2, 3), (1, 1), 1),
        ((1, 2), "SAME", (1, 1), (1, 1), 4),
    ],
)
def test_convolutions_count_products_with_the_input_alone(strides, padding, holes, reach, groups):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            lhs_dilation=holes,
            rhs_dilation=reach,
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    # Not optimised, since XLA for CPU makes products of some.
    low = jax.jit(convolve).lower(np.ones((2, 9, 11, 8)), np.ones((3, 4, 8 // groups, 12)))
    text = low.compiler_ir("hlo").as_hlo_text()
    assert analyse(text).flops == low.cost_analysis()["flops"]


def test_slices_and_updates_in_place_touch_no_more_than_they_move():
    def step(cache, new, at):
        cache = jax.lax.dynamic_update_slice(cache, new, (at[0].astype(int), 0))
        return cache, jax.lax.dynamic_slice(cache, (at[1].astype(int), 0), (2, 1024))

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4096, 1024), (1, 1024), (2,))]
    program = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    assert analyse(program.as_text()).bytes_accessed < 10 * 4096


def test_a_fusion_that_only_renames_an_array_hides_no_reading():
    fused = """\
%rename (r: f32[1000,32]) -> f32[32000] {
  %r = f32[1000,32]{1,0} parameter(0)
  ROOT %b = f32[32000]{0} bitcast(%r)
}
%work (w: f32[1000,32]) -> f32[] {
  %w = f32[1000,32]{1,0} parameter(0)
  %x = f32[32000]{0} fusion(%w), kind=kLoop, calls=%rename
  ROOT %y = f32[] reduce(%x), dimensions={0}, to_apply=%add
}
"""
    body = ARGUMENT + "  ROOT %f = f32[] fusion(%p), kind=kLoop, calls=%work\n"
    assert analyse(module(body, fused)).bytes_accessed == 128000 + 4


def module(body, fused="", devices=8):
    return (
        f"HloModule m, num_partitions={devices}\n\n{fused}\nENTRY %main () -> f32[] {{\n{body}}}\n"
    )


ARGUMENT = "  %p = f32[1000,32]{1,0:T(8,128)} parameter(0)\n"


@pytest.mark.parametrize(
    "groups, n",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[2,4]<=[2,2,2]T(1,0,2)", 4),
        ("mesh['x'=2,'y'=4] {'y'}", 4),
        ("mesh['x'=2,'y'=4] {'x','y'}", 8),
        ("mesh['x'=2,'y'=4] {'y':(2)2}", 2),
        ("{}", 8),
    ],
)
@pytest.mark.parametrize(
    "kind, result, sent",
    [
        ("all-gather", "f32[1000,64]", lambda n: n - 1),
        ("all-reduce", "f32[1000,32]", lambda n: 2 * (n - 1) / n),
        ("reduce-scatter", "f32[1000,16]", lambda n: (n - 1) / n),
        ("all-to-all", "f32[1000,32]", lambda n: (n - 1) / n),
        ("collective-permute", "f32[1000,32]", lambda n: 1),
    ],
)
def test_a_collective_sends_what_rings_do(kind, result, sent, groups, n):
    options = f"channel_id=3, replica_groups={groups}, use_global_device_ids=true"
    line = f"  ROOT %c = {result}{{1,0}} {kind}(%p), {options}\n"
    cost = analyse(module(ARGUMENT + line))
    assert cost.collectives == {kind: pytest.approx(128000 * sent(n))}
    assert cost.collective_bytes == pytest.approx(128000 * sent(n))
    pair = (
        f"  %s = (f32[1000,32]{{1,0}}, {result}{{1,0}}) {kind}-start(%p), {options}\n"
        f"  ROOT %c = {result}{{1,0}} {kind}-done(%s)\n"
    )
    assert analyse(module(ARGUMENT + pair)).collectives == cost.collectives


FUSED = """\
%begin (a: f32[1000,32]) -> (f32[1000,32], f32[4000,32]) {
  %a = f32[1000,32]{1,0} parameter(0)
  %g = f32[4000,32]{1,0} all-gather(%a), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %r = (f32[1000,32]{1,0}, f32[4000,32]{1,0}) custom-call(%a, %g), custom_call_target="Start"
}

%meanwhile (a: f32[1000,32], g: f32[4000,32], x: f32[64,64]) -> (f32[64,64], f32[4000,32]) {
  %a = f32[1000,32]{1,0} parameter(0)
  %gg = f32[4000,32]{1,0} parameter(1)
  %x = f32[64,64]{1,0} parameter(2)
  %g = f32[4000,32]{1,0} all-gather(%a), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (f32[64,64]{1,0}, f32[4000,32]{1,0}) tuple(%d, %g)
}

%end (a: f32[1000,32], g: f32[4000,32]) -> f32[4000,32] {
  %a = f32[1000,32]{1,0} parameter(0)
  %gg = f32[4000,32]{1,0} parameter(1)
  %g = f32[4000,32]{1,0} all-gather(%a), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %r = f32[4000,32]{1,0} custom-call(%gg, %g), custom_call_target="Done"
}
"""

OVERLAPPED = """\
  %a = f32[1000,32]{1,0} parameter(0)
  %x = f32[64,64]{1,0} parameter(1)
  %s = (f32[1000,32]{1,0:S(1)}, f32[4000,32]{1,0}) fusion(%a), kind=kCustom, calls=%begin
  %s0 = f32[1000,32]{1,0:S(1)} get-tuple-element(%s), index=0
  %s1 = f32[4000,32]{1,0} get-tuple-element(%s), index=1
  %w = (f32[64,64]{1,0}, f32[4000,32]{1,0}) fusion(%s0, %s1, %x), kind=kOutput, calls=%meanwhile
  %w1 = f32[4000,32]{1,0} get-tuple-element(%w), index=1
  ROOT %e = f32[4000,32]{1,0} fusion(%s0, %w1), kind=kCustom, calls=%end
"""


def test_a_collective_under_way_beside_other_work_counts_once():
    cost = analyse(module(OVERLAPPED, FUSED))
    assert cost.collectives == {"all-gather": 3 * 128000}
    assert cost.flops == 2 * 64**3
    # The shard is read, the whole written; the product reads and writes its own.
    assert cost.bytes_accessed == 128000 + 4 * 128000 + 2 * 64 * 64 * 4


def test_a_reduce_scatter_may_be_called_an_all_reduce_and_a_slice():
    fused = """\
%all-reduce-scatter.1 (a: f32[1000,32]) -> f32[250,32] {
  %a = f32[1000,32]{1,0} parameter(0)
  %i = s32[] constant(0)
  %r = f32[1000,32]{1,0} all-reduce(%a), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %d = f32[250,32]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={250,32}
}
"""
    line = "  ROOT %f = f32[250,32]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1\n"
    assert analyse(module(ARGUMENT + line, fused)).collectives == {"reduce-scatter": 96000}
    # Another one may have the same channel.
    again = line.replace("ROOT %f", "%g").replace(".1", ".2") + line
    both = fused + fused.replace("scatter.1", "scatter.2")
    assert analyse(module(ARGUMENT + again, both)).collectives == {"reduce-scatter": 192000}


KERNEL = (
    '  ROOT %k = (bf16[8,1000]{1,0}, f32[8]{0}) custom-call(%p), custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(f)/splash"}, backend_config={"custom_call_config":{"body":"AA(=="ESTIMATE}}\n'
)


def test_a_kernel_costs_its_own_estimate_or_the_callers():
    given = ',"cost_estimate":{"flops":"1234","transcendentals":"5","bytes_accessed":"678"}'
    cost = analyse(module(ARGUMENT + KERNEL.replace("ESTIMATE", given)), lambda *_: (1, 1))
    assert (cost.flops, cost.bytes_accessed, cost.kernels) == (1234, 678, {"jit(f)/splash": 1})
    seen = []
    text = module(ARGUMENT + KERNEL.replace("ESTIMATE", ""))
    cost = analyse(
        text, lambda name, arrays: seen.append((name, [a.dims for a in arrays])) or (50, 60)
    )
    assert (cost.flops, cost.bytes_accessed) == (50, 60)
    assert seen == [("jit(f)/splash", [(1000, 32), (8, 1000), (8,)])]
    assert analyse(text).bytes_accessed == 128000 + 16000 + 32


def test_what_stays_on_the_chip_is_no_traffic():
    body = """\
  %p = f32[1000,32]{1,0:T(8,128)} parameter(0)
  %c = (f32[1000,32]{1,0:T(8,128)S(1)}, f32[1000,32]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %d = f32[1000,32]{1,0:T(8,128)S(1)} copy-done(%c)
  %n = f32[1000,32]{1,0:T(8,128)S(1)} negate(%d)
  %s = ((f32[1000,32]{1,0}), f32[10,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:10], [0:32]}
  %t = f32[10,32]{1,0:S(1)} slice-done(%s)
  ROOT %e = f32[1000,32]{1,0:T(8,128)} exponential(%n)
"""
    assert analyse(module(body)).bytes_accessed == 128000 + 1280 + 128000


def test_branches_cost_what_the_dearest_does():
    def either(x, up, down):
        flag = x[0, 0] > 0
        return jax.lax.cond(flag, lambda: scanned(x, up, down), lambda: x)

    assert analyse(compiled(either, *SHAPES).as_text()).flops == FORWARD
