"""The fields of a slab do not overlap, and a spec that comes from a socket is checked."""

import pytest
import torch

from shared.stream import ALIGNMENT, SLAB_UNIT, ObsSpec, StreamSpec, evaluation_columns, plan_layout, ring_views

SPEC = StreamSpec(3, {"policy": ObsSpec((5,), "float32"), "pixels": ObsSpec((64, 64, 3), "uint8")}, 2)


def test_every_field_has_its_own_aligned_block():
    layout = plan_layout(SPEC, capacity=7)
    slab = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = ring_views(slab, layout)
    assert layout.num_bytes % SLAB_UNIT == 0
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    for order, entry in enumerate(layout.fields, start=1):
        views.get(entry.key).copy_(torch.tensor(order % 2 if entry.dtype == "bool" else order))
    for order, entry in enumerate(layout.fields, start=1):
        view = views[entry.key]
        assert view.shape == layout.shape(entry)
        assert (view == (order % 2 if entry.dtype == "bool" else order)).all(), entry.name


def test_a_chunk_of_rows_is_contiguous_in_every_field():
    layout = plan_layout(SPEC, capacity=8)
    views = ring_views(torch.zeros(layout.num_bytes, dtype=torch.uint8), layout)
    for entry in layout.fields:
        assert views[entry.key][2:6].is_contiguous(), entry.name


def test_a_spec_is_the_same_after_it_was_sent_as_a_dictionary():
    assert StreamSpec.from_dict(SPEC.to_dict()) == SPEC
    assert StreamSpec.from_dict(SPEC.to_dict()).digest() == SPEC.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"num_envs": 0},
        {"num_envs": "many"},
        {"obs": {}},
        {"obs": {"policy": {"shape": [5]}}},
        {"obs": {"policy": {"shape": [5], "dtype": "object"}}},
        {"obs": {"policy": {"shape": [-5], "dtype": "float32"}}},
        {"action_dim": 1 << 40},
        {"obs": [1]},
    ],
)
def test_a_spec_out_of_bounds_is_refused(change):
    with pytest.raises(ValueError):
        StreamSpec.from_dict(SPEC.to_dict() | change)


def test_a_slab_of_the_wrong_size_is_refused():
    layout = plan_layout(SPEC, capacity=7)
    with pytest.raises(ValueError, match="expected uint8"):
        ring_views(torch.zeros(layout.num_bytes - 1, dtype=torch.uint8), layout)


def test_evaluation_environments_are_spread_over_every_block_of_equal_environments():
    blocks = [
        column * 20 // 4096 for column in evaluation_columns(4096, 40)
    ]  # 20 blocks, as Isaac Lab has for types of terrain
    assert sorted(blocks) == [kind for kind in range(20) for _ in range(2)]
    assert evaluation_columns(8, 1) == [7] and evaluation_columns(8, 0) == []
    assert evaluation_columns(8, 8) == list(range(8))
