"""From scores to numbers and pictures: metrics, score store, post-processing, detection metrics, plots."""
