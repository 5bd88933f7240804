"""config.json of a run folder: today's form and that of version 0.1; what a resume does with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ect.config import Config
from ect.files.resume import ChangedMaths, refuse_changed_maths
from ect.files.run_folder import CONFIG, load, resolved, run_folder, to_dict
from ect.options import check
from ect.presets import PRESETS
from ect.show.dry_run import describe
from tests.fuzz.mutations import spoilt_text

TODAY = {**to_dict(PRESETS["digits"]), "resolved": {"compile": False, "ops": {"perturb": "triton"}}}
_OLD = json.loads(json.dumps(asdict(Config())))
_OLD["optim"]["ema_beta"] = 0.9999
del _OLD["optim"]["emas"], _OLD["pretrain"], _OLD["pretrain_kimg"]
OLD = {**_OLD, "pretrain": {"total_kimg": 76.8, "objective": _OLD["objective"], "optim": _OLD["optim"]}}
INPUTS = st.one_of(spoilt_text(TODAY), spoilt_text(OLD), st.binary(max_size=40))


def read(folder: Path, data: bytes) -> Any:
    (folder / CONFIG).write_bytes(data)
    cfg = load(run_folder(folder))
    check(cfg)
    resolved(folder)
    describe(cfg)
    try:
        refuse_changed_maths(to_dict(cfg), to_dict(PRESETS["digits"]))
    except ChangedMaths:  # as it should be, in several lines
        return None
    return cfg
