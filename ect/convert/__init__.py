"""EDM and ECT snapshots become the files that everything here reads."""
