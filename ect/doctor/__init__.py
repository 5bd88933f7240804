"""The story of a run, told from the files that it left: python -m ect.doctor RUN."""
