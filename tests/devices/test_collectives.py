"""What is read of the collectives of a compiled program."""

from collectives import collectives
import pytest


TOGETHER = """
ENTRY %main (a: f32[8], b: f32[4,2]) -> f32[16] {
  %sum = (f32[8]{0}, f32[4,2]{1,0}) all-reduce(%a, %b), to_apply=%add
  %start = (f32[8]{0}, f32[16]{0}) all-gather-start(%a), dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  ROOT %c = f32[16]{0} collective-permute(%done), source_target_pairs={{0,1}}
}
"""

# What a TPU sends beside other work is written where it begins, beside the work, and
# where it ends.
BESIDE_WORK = """
%fused_computation.1 (p: f32[2,4]) -> (f32[2,4], f32[2,64], s32[2], u32[]) {
  %p = f32[2,4]{1,0} parameter(0)
  %all-gather.1 = f32[2,64]{1,0} all-gather(%p), channel_id=1, dimensions={1}
  ROOT %custom-call.1 = (f32[2,4], f32[2,64], s32[2], /*index=3*/u32[]) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: f32[2,4], q: f32[2,64], r: f32[8]) -> f32[2,64] {
  %p = f32[2,4]{1,0} parameter(0)
  %all-gather.2 = f32[2,64]{1,0} all-gather(%p), channel_id=1, dimensions={1}
  ROOT %tuple = (f32[2,4], f32[2,64], f32[8]) tuple(%p, %all-gather.2, %r)
}

%async_collective_fusion.2 (p: f32[2,4], q: f32[2,64], r: f32[3]) -> f32[2,64] {
  %all-gather.3 = f32[2,64]{1,0} all-gather(%p), channel_id=1, dimensions={1}
  %all-reduce.3 = f32[3]{0} all-reduce(%r), channel_id=2, to_apply=%add
  ROOT %custom-call.3 = (f32[3], f32[3], s32[2], u32[]) \
custom-call(%all-reduce.3), custom_call_target="AsyncCollectiveStart"
}

%fused_computation.2 (p: f32[2,4], q: f32[2,64], s: s32[2], u: u32[]) -> f32[2,64] {
  %all-gather.4 = f32[2,64]{1,0} all-gather(%p), channel_id=1, dimensions={1}
  ROOT %custom-call.4 = f32[2,64]{1,0} \
custom-call(%p, %q, %all-gather.4, %s), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[2,4]) -> f32[2,64] {
  %fusion.1 = (f32[2,4], f32[2,64], s32[2], u32[]) fusion(%p), \
calls=%fused_computation.1
  %all-reduce.1 = f32[5]{0} all-reduce(%s), to_apply=%add
  ROOT %fusion.2 = f32[2,64]{1,0} fusion(%fusion.1), calls=%fused_computation.2
}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            TOGETHER,
            [("all-reduce", 16), ("all-gather", 16), ("collective-permute", 16)],
        ),
        (BESIDE_WORK, [("all-gather", 128), ("all-reduce", 3), ("all-reduce", 5)]),
        ("ENTRY %main (a: f32[8]) -> f32[8] {\n  ROOT %a = f32[8] copy(%b)\n}\n", []),
    ],
    ids=["together", "beside work", "none"],
)
def test_a_collective_is_counted_once(text, expected):
    assert collectives(text) == expected
