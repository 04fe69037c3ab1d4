"""Data sets written as TFDS array_record: official COCO, a folder of images, embedded digits."""
