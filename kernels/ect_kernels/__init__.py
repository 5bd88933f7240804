"""The operations of the trainer whose speed matters. This package never imports `ect`."""
