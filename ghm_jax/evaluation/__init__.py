"""From a run to detections, COCO figures and an analysis of its errors."""
