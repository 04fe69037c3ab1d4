"""From a run to detections, COCO figures, and what is wrong with them."""
