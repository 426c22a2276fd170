"""The TFDS dataset `digits`, embedded: its images come inside scikit-learn."""
