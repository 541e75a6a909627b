"""What a norm moves, read in Triton's own dialect."""

import pytest
from trilby.bench.static.traffic import Traffic, traffic

KERNEL = """module {
  tt.func public @kernel(%x: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x"(#loc)), %rows: i32 loc("r"(#loc))) {
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c512_i32 = arith.constant 512 : i32 loc(#loc1)
    %c2000_i32 = arith.constant 2000 : i32 loc(#loc1)
    %w = tt.load %1, %mask, %cst : tensor<512x!tt.ptr<f32>> loc(#loc2)
    scf.for %row = %0 to %rows step %1  : i32 {
      %y = tt.load %2, %mask, %cst : tensor<512x!tt.ptr<bf16>> loc(#loc3)
      %sum:2 = scf.for %column = %c0_i32 to %c2000_i32 step %c512_i32 iter_args(%a = %b) -> (f32)  : i32 {
        %z = tt.load %3 : tensor<16x32x!tt.ptr<i8>> loc(#loc4)
        scf.yield %a : f32 loc(#loc4)
      } loc(#loc5)
      tt.store %4, %mean : !tt.ptr<f32> loc(#loc6)
    } loc(#loc7)
    tt.store %5, %sum, %mask : tensor<512x!tt.ptr<f32>> loc(#loc8)
    tt.return loc(#loc9)
  } loc(#loc)
} loc(#loc)
"""


def test_what_is_moved_in_the_loop_over_rows_and_outside_of_it():
    assert traffic(KERNEL) == Traffic(per_row=512 * 2 + 4 * 512 + 4, once=2 * 512 * 4)
    assert Traffic(10, 3).total(rows=100, programs=7) == 1021


def test_a_loop_that_takes_several_rows_moves_less_for_each():
    assert traffic(KERNEL, rows=2) == Traffic(traffic(KERNEL).per_row // 2, traffic(KERNEL).once)


def test_a_kernel_without_a_loop_moves_all_once():
    straight = KERNEL.replace("%0 to %rows step %1", "%c0_i32 to %c512_i32 step %c512_i32")
    assert traffic(straight).per_row == 0


@pytest.mark.parametrize("line", ["tt.load", "tt.store"])
def test_a_mutant_that_overlooks_an_access_is_noticed(line):
    assert traffic(KERNEL.replace(line, "tt.other", 1)) != traffic(KERNEL)
