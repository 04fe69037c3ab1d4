"""RetinaNet training steps of other libraries beside ours: `python -m experiments.peers`."""
