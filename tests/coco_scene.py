"""Objects far from each other, and detections of them, in COCO form."""

NAMES = ("cat", "dog", "<tag> & co")


def scene(rng, images=6):
    """Objects far from each other on a coarse grid, of all three classes."""
    annotations = []
    for image in range(1, images + 1):
        for cell in range(6):
            x, y = 150.0 * (cell % 3), 150.0 * (cell // 3)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": 10 * (1 + cell % 3),
                    "bbox": [x, y, *rng.uniform(50, 100, 2)],
                    "area": 5000.0,
                    "iscrowd": 0,
                }
            )
    return {
        "images": [{"id": i + 1, "width": 500, "height": 500} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(NAMES)],
    }


def detections_of(truth, score=0.95):
    keys = ("image_id", "category_id", "bbox")
    return [{key: a[key] for key in keys} | {"score": score} for a in truth["annotations"]]


def other_class(row):
    return {**row, "category_id": row["category_id"] % 30 + 10}


def moved(row, by):
    x, y, w, h = row["bbox"]
    return {**row, "bbox": [x + by * w, y, w, h]}
