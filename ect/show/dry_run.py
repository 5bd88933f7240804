"""The output of --dry-run: the resolved configuration as options that a command line takes back."""

from __future__ import annotations

from ect.config import Config
from ect.options import base, fields, option

_ASKS = ("dry-run", "plan")  # options that train nothing


def describe(cfg: Config) -> str:
    """Return the resolved configuration, an option a line, as `python -m ect.train` takes it. Unset options are comments.

    The last line, a comment too, is the command that a shell takes, with only what differs from the preset or the
    resumed run.
    """
    defaults = {name: value for name, value, _ in fields(base(cfg.preset, cfg.resume))}
    unset = {name for name, value, _ in fields(cfg) if value is None and defaults[name] is None}
    lines = [
        f"# --{name} is not set" if name in unset else option(name, value)
        for name, value, _ in fields(cfg)
        if name not in _ASKS
    ]
    return "\n".join([*lines, f"# {command(cfg)}"])


def command(cfg: Config) -> str:
    """Return the command that a shell takes, with only what differs from the preset or the resumed run.

    Raises UserError where there is no such preset.
    """
    defaults = {name: value for name, value, _ in fields(base(cfg.preset, cfg.resume))}
    changed = [
        option(name, value)
        for name, value, _ in fields(cfg)
        if name not in _ASKS and (value != defaults[name] or (name in ("preset", "resume") and value is not None))
    ]
    return " ".join(["python -m ect.train", *changed])
