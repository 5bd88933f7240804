"""One reader a format of data sets."""
