"""Quality of generated images: `choice.make_evaluator` picks the metrics that suit a data set."""
