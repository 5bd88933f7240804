"""Model files of ours: the description of the network, the header of safetensors, and the bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from ect.files.checkpoint import load_model
from ect.files.model_file import read_model_file
from ect.models import build
from ect.sampler import levels_after_first
from tests.fuzz.mutations import spoilt, spoilt_json, spoilt_text
from tests.fuzz.snapshots import SPEC

DESCRIPTION = {"format": 1, "spec": SPEC, "info": {"preset": "digits", "nimg": 3, "mid_t": [0.8]}}


def whole(text: str) -> bytes:
    torch.manual_seed(0)
    return save({name: t.contiguous() for name, t in build(SPEC).state_dict().items()}, {"ect": text})


PLAIN = whole(json.dumps(DESCRIPTION))
SIZE = int.from_bytes(PLAIN[:8], "little")
HEADER, BODY = json.loads(PLAIN[8 : 8 + SIZE]), PLAIN[8 + SIZE :]


def joined(header: bytes, body: bytes = BODY) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def described(text: bytes) -> bytes:
    return joined(json.dumps({**HEADER, "__metadata__": {"ect": text.decode("utf-8", "replace")}}).encode())


KWARGS = st.fixed_dictionaries(
    {},
    optional={
        name: st.sampled_from(
            [
                0,
                1,
                2,
                3,
                4,
                7,
                15,
                255,
                65535,
                "a",
                "residual",
                "skip",
                "fourier",
                [],
                [0],
                [1, 0],
                [65535] * 8,
                0.5,
                None,
            ]
        )
        for name in (
            "img_resolution",
            "in_channels",
            "label_dim",
            "augment_dim",
            "model_channels",
            "channel_mult",
            "num_blocks",
            "attn_resolutions",
            "dropout",
            "encoder_type",
            "decoder_type",
            "embedding_type",
            "resample_filter",
            "channel_mult_emb",
            "channel_mult_noise",
            "label_dropout",
            "out_channels",
        )
    },
)
OTHERS = st.builds(
    lambda kwargs, unet: json.dumps(
        {**DESCRIPTION, "spec": {**SPEC, "unet": unet, "kwargs": {**SPEC["kwargs"], **kwargs}}}
    ).encode(),
    KWARGS,
    st.sampled_from(["SongUNet", "DhariwalUNet"]),
)
INPUTS = st.one_of(
    spoilt_text(DESCRIPTION).map(described),
    OTHERS.map(described),
    spoilt_text(HEADER).map(joined),
    spoilt(PLAIN),
    spoilt_json(HEADER, 1).map(lambda header: joined(json.dumps(header).encode())),
)


def read(folder: Path, data: bytes) -> Any:
    path = folder / "file.safetensors"
    path.write_bytes(data)
    read_model_file(path, weights=False)
    _, info = load_model(path)
    return levels_after_first(None, info)
