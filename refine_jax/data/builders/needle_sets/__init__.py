"""RULER's needle sets as a tensorflow-datasets data set, written and read without TensorFlow."""
