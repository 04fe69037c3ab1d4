"""Errors of a detector: by type, by score (calibration), and confusions between classes.

Computed by hotcoco at IoU 0.5: TIDE (Bolya et al., "TIDE: A General Toolbox for
Identifying Object Detection Errors", ECCV 2020), confusion matrix and calibration.
"""

import contextlib
import io
from typing import Any

import numpy as np

SCORE_BINS = 20
CONFUSION_MIN_SCORE = 0.3
"""Detections below this score are not in the confusion matrix."""

_IOU = ("0.50", "0.75", "0.90")  # of the precision-recall curves


def error_analysis(truth: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, Any]:
    """Error statistics of detections.

    Args:
        truth: COCO instances.
        detections: COCO results.

    Returns:
        JSON data; the values are None if there are no detections or no objects:
            tide: `ap` at IoU 0.5; `delta_ap`, the AP gained if all errors of a type were fixed, by
                type: Cls, Loc, Both, Dupe, Bkg, Miss, FP, FN; `counts` of the first six.
            precision_recall: `recall` [101], and `precision` by IoU, means over the classes.
            scores: `correct` and `wrong`: number of detections in each of 20 equal bins of score.
            calibration: `ece` (expected calibration error: mean distance between score and
                precision), `mce` (the maximum) and ten `bins`: score_from, score_to, score,
                precision, count.
            confusion: `names`, `min_score` and `matrix` [K + 1][K + 1]: true class by detected
                class; the last row holds detections of background, the last column missed objects.
    """
    objects = [a for a in truth["annotations"] if not a.get("iscrowd")]
    if not detections or not objects:
        keys = ("tide", "precision_recall", "scores", "calibration", "confusion")
        return dict.fromkeys(keys)
    evaluation = _evaluated(truth, detections)
    tide = evaluation.tide_errors()
    curves = evaluation.report()["curves"]
    return {
        "tide": {"ap": tide["ap_base"], "delta_ap": tide["delta_ap"], "counts": tide["counts"]},
        "precision_recall": {
            "recall": [float(x) for x in curves["rec_thrs"]],
            "precision": {iou: [float(x) for x in curves[f"pr@{iou}"]] for iou in _IOU},
        },
        "scores": _scores(evaluation, detections),
        "calibration": _calibration(evaluation),
        "confusion": _confusion(evaluation),
    }


def _evaluated(truth: dict[str, Any], detections: list[dict[str, Any]]) -> Any:
    from hotcoco import COCO, COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = {"info": {}, **truth}
        ground.createIndex()
        evaluation = COCOeval(ground, ground.loadRes(detections), "bbox")
        evaluation.run()
    return evaluation


def _scores(evaluation: Any, detections: list[dict[str, Any]]) -> dict[str, list[int]]:
    status = evaluation.image_diagnostics()["dt_status"]  # by index, from 1
    scores = np.array([row["score"] for row in detections])
    kinds = np.array([status.get(i + 1, "") for i in range(len(scores))])
    return {
        name: np.histogram(scores[kinds == kind], SCORE_BINS, (0, 1))[0].tolist()
        for name, kind in (("correct", "tp"), ("wrong", "fp"))
    }


def _calibration(evaluation: Any) -> dict[str, Any]:
    found = evaluation.calibration(n_bins=10)
    names = {
        "score_from": "bin_lower",
        "score_to": "bin_upper",
        "score": "avg_confidence",
        "precision": "avg_accuracy",
        "count": "count",
    }
    bins = [{ours: each[theirs] for ours, theirs in names.items()} for each in found["bins"]]
    return {"ece": found["ece"], "mce": found["mce"], "bins": bins}


def _confusion(evaluation: Any) -> dict[str, Any]:
    found = evaluation.confusion_matrix(min_score=CONFUSION_MIN_SCORE)
    return {
        "names": list(found["cat_names"]),
        "min_score": CONFUSION_MIN_SCORE,
        "matrix": np.asarray(found["matrix"]).astype(int).tolist(),
    }
