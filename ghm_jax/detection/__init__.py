"""From anchors and boxes to targets, losses and detections: pure functions of static shapes."""
