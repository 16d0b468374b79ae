"""Tasks: how a network is trained for classification, segmentation or detection, and how its answers are scored."""
