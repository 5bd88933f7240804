"""The output of --dry-run: the resolved configuration as options that a command line takes back."""

from __future__ import annotations

from ect.config import Config
from ect.options import base, fields, option


def describe(cfg: Config) -> str:
    """Return the resolved configuration, an option a line, as `python -m ect.train` takes it. Unset options are comments.

    The last line, a comment too, is the command that a shell takes, with only what differs from the preset or the
    resumed run.
    """
    lines, changed = [], []
    defaults = {name: value for name, value, _ in fields(base(cfg.preset, cfg.resume))}
    for name, value, _ in fields(cfg):
        if name == "dry-run":
            continue
        if value is None and defaults[name] is None:
            lines.append(f"# --{name} is not set")
            continue
        lines.append(option(name, value))
        if value != defaults[name] or name in ("preset", "resume"):
            changed.append(lines[-1])
    return "\n".join([*lines, "# python -m ect.train " + " ".join(changed)])
