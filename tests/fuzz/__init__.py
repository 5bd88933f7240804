"""Hypothesis on every reader of a stranger's file: `bounded` watches one read, `mutations` spoils what is valid, and each other
module has the files of one kind of reader."""
