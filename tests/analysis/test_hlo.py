"""Costs read from the text of programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from ghm_jax.analysis.hlo import arrays, parse

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p0: f32[8,128], p1: f32[8,128]) -> f32[8,128] {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p1 = f32[8,128]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %add.1 = f32[8,128]{1,0:T(8,128)} add(%p0, %p1)
}

%body (carry: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %carry = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(2)} get-tuple-element(%carry), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %y = f32[8,128]{1,0:T(8,128)} negate(%x), metadata={op_name="jit(f)/matching/while/body/neg"}
  ROOT %next = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %y)
}

%condition (carry: (s32[], f32[8,128])) -> pred[] {
  %carry = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(2)} get-tuple-element(%carry), index=0
  ROOT %less = pred[]{:T(512)S(2)} compare(%i, %i), direction=LT
}

ENTRY %main (a: f32[8,128], b: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} parameter(1)
  %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%b)
  %done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %sum = f32[8,128]{1,0:T(8,128)} fusion(%a, %done), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/optimizer/add"}
  %all = f32[8,128]{1,0:T(8,128)} all-reduce(%sum), replica_groups={{0,1}}, to_apply=%fused, metadata={op_name="jit(f)/gradients/psum"}
  %zero = s32[]{:T(128)S(2)} constant(0)
  %init = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %all)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_only_main_memory_counts_and_loops_count_every_pass():
    costs = {cost.instruction.name: cost for cost in parse(PROGRAM).costs()}
    array = 8 * 128 * 4
    assert {name: cost.bytes for name, cost in costs.items()} == {
        "start": array,  # read; it is written to memory on the chip
        "sum": 2 * array,  # one operand is on the chip
        "all": 2 * array,
        "y": 5 * 2 * array,
    }
    assert costs["start"].scope == "jit(f)/optimizer/add"  # that of what it is copied for
    assert costs["all"].scope == "jit(f)/gradients/psum"
    assert costs["y"].times == 5


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing")


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2046,4]{1,0:T(8,128)}", 2048 * 128 * 4),  # both axes are padded to the tile
        ("f32[2046,4]{0,1:T(4,128)}", 2048 * 4 * 4),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
        ("pred[7]{0}", 7),
        ("f32[]", 4),
        ("(f32[2]{0}, s8[3]{0})", 8 + 3),
    ],
)
def test_bytes_include_the_padding_of_tiles(shape, size):
    assert sum(array.bytes for array in arrays(shape)) == size


def flops(function, *shapes) -> float:
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = parse(jax.jit(function).lower(*inputs).as_text("hlo"))
    return sum(cost.flops for cost in program.costs())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spread", [1, 2])
def test_products_of_a_convolution_with_padding_are_not_counted(rng, groups, spread):
    stride, dilation = rng.integers(1, 4, 2).tolist(), rng.integers(1, 3, 2).tolist()
    size, kernel = rng.integers(9, 14, 2).tolist(), rng.integers(1, 4, 2).tolist()
    pads = rng.integers(0, 3, (2, 2)).tolist()

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, stride, pads, (spread, spread), dilation,
            ("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    shapes = (2, *size, 6), (*kernel, 6 // groups, 4)
    products = convolve(*map(jnp.ones, shapes)).sum()  # each is 1
    assert flops(convolve, *shapes) == 2 * products


def test_operations_of_a_matrix_product():
    assert flops(jnp.matmul, (48, 160), (160, 96)) == 2 * 48 * 160 * 96
