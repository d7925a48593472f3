"""weights.safetensors is what the format's description demands, so that other programs can read it."""

from __future__ import annotations

import json
import struct

import torch

from learner_proc.weights_file import write_safetensors


def test_header_offsets_and_bytes_follow_the_format(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors = {
        "actor.weight": torch.arange(6.0).reshape(2, 3).t(),
        "count": torch.tensor(7, dtype=torch.int64),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False, True]),
    }
    write_safetensors(path, tensors, {"step": "12"})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    assert length % 8 == 0 and header.pop("__metadata__") == {"step": "12"}
    assert {name: (e["dtype"], e["shape"], e["data_offsets"]) for name, e in header.items()} == {
        "actor.weight": ("F32", [3, 2], [0, 24]),
        "count": ("I64", [], [24, 32]),
        "half": ("BF16", [2], [32, 36]),
        "flag": ("BOOL", [3], [36, 39]),
    }
    assert struct.unpack("<6f", body[:24]) == (0.0, 3.0, 1.0, 4.0, 2.0, 5.0), "row by row, for all strides"
    assert struct.unpack("<q", body[24:32]) == (7,) and body[32:] == b"\xc0\x3f\x00\xc0\x01\x00\x01"
