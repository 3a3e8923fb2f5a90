"""Exchanges that are counted in the text of compiled programs."""

import json

from peerjax.planning.collectives import Collective, collectives
from tests.elsewhere import python

OF_ARRAY = 16 * 32 * 4  # bytes of a device


def test_known_exchanges_of_eight_devices():
    """A loop counts as often as it runs, and a conditional as its cheaper branch."""
    result = python("-m", "tests.planning.on_devices", devices=8)
    assert not result.returncode, result.stderr
    found = [Collective(*each) for each in json.loads(result.stdout.splitlines()[-1])]
    assert sorted(found) == [
        Collective("all-gather", "expert", 5, 5 * 3 * OF_ARRAY, 4 * OF_ARRAY),
        Collective("all-reduce", "data", 1, 4, 4),  # the largest number: 2 * 4 bytes * 1/2
        Collective("all-to-all", "data, expert", 1, OF_ARRAY * 7 // 8, OF_ARRAY),
        Collective("collective-permute", "expert", 1, OF_ARRAY, OF_ARRAY),
        Collective("reduce-scatter", "expert", 5, 5 * 3 * OF_ARRAY, 4 * OF_ARRAY),
    ]


# As on TPUs: conditions compare with a constant, computations of other cores stand between, and
# groups are named by axes or listed.
TPU = """
%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %ag = (bf16[8,128]{1,0}, bf16[32,128]{1,0:T(8,128)}) all-gather-start(), replica_groups=[2,4]<=[8]
  %f = bf16[8,128]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
}

%all-reduce-scatter.3 (q: bf16[32,128]) -> bf16[8,128] {
  %ar = bf16[32,128]{1,0} all-reduce(%q), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}

%on_sparse_core (r: s32[]) -> s32[] {
  ROOT %r = s32[] parameter(0)
}, execution_thread="sparsecore"

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(48), metadata={}
  %p = (s32[], bf16[8,128]) parameter(0)
  ROOT %lt = pred[] compare(s32[] %get, s32[] %constant.7), direction=LT
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %while.1 = (s32[], bf16[8,128]) while(%t), condition=%condition, body=%body
  %c = (f32[64], f32[64], u32[]) collective-permute-start(), source_target_pairs={{0,4},{4,0}}
  %one = f32[64] all-reduce(%w), replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_programs_in_the_form_of_tpus():
    mesh = {"data": 2, "fsdp": 1, "expert": 4}
    gathered = 32 * 128 * 2 * 3 // 4
    assert collectives(TPU, mesh) == [
        Collective("all-gather", "expert", 48, 48 * gathered, 32 * 128 * 2),
        Collective("reduce-scatter", "expert", 48, 48 * gathered, 32 * 128 * 2),
        Collective("collective-permute", "data", 1, 256, 256),
    ]
