"""Why a detector is not perfect: kinds of errors, what its scores are worth, what it confuses.

The arithmetic is hotcoco's, at IoU 0.5: TIDE (Bolya et al., "TIDE: A General Toolbox for
Identifying Object Detection Errors", ECCV 2020), confusion matrix and calibration.
"""

import contextlib
import io
from typing import Any

import numpy as np

SCORE_BINS = 20
CONFUSION_MIN_SCORE = 0.3
"""Detections below it are left out of the confusion matrix, where each would be one error."""

_IOU = ("0.50", "0.75", "0.90")  # of the precision-recall curves


def error_analysis(truth: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, Any]:
    """What is wrong with detections; None where there is nothing to analyse.

    Args:
        truth: COCO instances.
        detections: COCO results.

    Returns:
        A dict that JSON can hold, or None values in it when there are no detections or no objects:
            tide: `ap` at IoU 0.5, `delta_ap` (by how much that would rise if all errors of a kind
                were mended) and `counts`, each by kind: Cls, Loc, Both, Dupe, Bkg, Miss; the first
                also FP and FN.
            precision_recall: `recall` [101], and `precision` by IoU, means over the classes.
            scores: `correct` and `wrong`: detections in each of 20 bins of score over [0, 1].
            calibration: `ece` (expected error: mean distance of score and precision), `mce` (the
                largest) and `bins`: score_from, score_to, score, precision, count of each of ten.
            confusion: `names`, `min_score` and `matrix` [K + 1][K + 1]: true class by detected
                class; the last row holds detections of nothing, the last column missed objects.
    """
    objects = [a for a in truth["annotations"] if not a.get("iscrowd")]
    if not detections or not objects:
        parts = ("tide", "precision_recall", "scores", "calibration", "confusion")
        return dict.fromkeys(parts)
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
    status = evaluation.image_diagnostics()["dt_status"]  # by number, from 1
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
    bins = [{ours: part[theirs] for ours, theirs in names.items()} for part in found["bins"]]
    return {"ece": found["ece"], "mce": found["mce"], "bins": bins}


def _confusion(evaluation: Any) -> dict[str, Any]:
    found = evaluation.confusion_matrix(min_score=CONFUSION_MIN_SCORE)
    return {
        "names": list(found["cat_names"]),
        "min_score": CONFUSION_MIN_SCORE,
        "matrix": np.asarray(found["matrix"]).astype(int).tolist(),
    }
