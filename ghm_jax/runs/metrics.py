"""The twelve COCO figures that `metrics.json` and `evaluations.jsonl` hold."""

METRICS = {
    "AP": "average precision, mean over IoU 0.50 to 0.95; all classes and sizes",
    "AP50": "AP at IoU 0.50: found, roughly placed",
    "AP75": "AP at IoU 0.75: found and well placed",
    "APs": "AP of small objects, below 32 x 32 pixels",
    "APm": "AP of medium objects, from 32 x 32 to 96 x 96 pixels",
    "APl": "AP of large objects, above 96 x 96 pixels",
    "AR1": "average recall, mean over IoU 0.50 to 0.95; 1 detection per image",
    "AR10": "AR with 10 detections per image",
    "AR100": "AR with 100 detections per image",
    "ARs": "AR100 of small objects, below 32 x 32 pixels",
    "ARm": "AR100 of medium objects, from 32 x 32 to 96 x 96 pixels",
    "ARl": "AR100 of large objects, above 96 x 96 pixels",
}
"""Name -> meaning, in the order of every COCO evaluator; fractions of 1, -1: no such object."""
