"""Predictions on files: what is written, what is skipped, and that nothing is overwritten."""

import errno
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from tiny import CATEGORIES, SIDE, Listener, draw_image

from ghm_jax import predict as predict_module
from ghm_jax.cli import main
from ghm_jax.exceptions import UserError
from ghm_jax.predict import find_images, predict

pytestmark = pytest.mark.usefixtures("quick_compilation")


def write_images(folder, rng, names, size=(48, 64)):
    folder.mkdir(exist_ok=True)
    for name in names:
        pixels = draw_image(rng, *size, 2)[0]
        (folder / name).write_bytes(
            cv2.imencode(name[name.index(".") :].lower(), pixels)[1].tobytes()
        )
    return folder


def test_every_readable_image_is_drawn_and_listed(finished_run, rng, tmp_path):
    folder = write_images(tmp_path / "in", rng, ["7.png", "12.JPG", "9.jpg"])
    write_images(folder, rng, ["11.png"], size=(96, 200))
    (folder / "10.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either, and not asked for")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    out, listener = tmp_path / "out", Listener()
    done = predict(
        finished_run[0].path, [str(folder)], out, batch_size=2, threshold=0, progress=listener
    )
    assert done.images == 4
    assert len(done.unreadable) == 1
    assert done.unreadable[0] == f"{folder / '10.png'}: is not an image of a known format"
    assert listener.steps == [1, 2, 3, 4, 5, 2, 4]  # headers, then images
    names = {"7.png", "12.jpg", "9.jpg", "11.png", "contact_sheet.jpg", "predictions.json"}
    assert {path.name for path in out.iterdir()} == names
    assert all(cv2.imread(str(out / name)) is not None for name in names if "json" not in name)
    rows = json.loads((out / "predictions.json").read_text())
    assert len(rows) == done.detections
    assert {row["image_id"] for row in rows} == {7, 9, 11, 12}
    assert {row["category_id"] for row in rows} <= set(CATEGORIES)
    assert not listener.lines
    for row in rows:
        width, height = (200, 96) if row["image_id"] == 11 else (64, 48)
        x, y, w, h = row["bbox"]
        assert min(x, y, w, h) >= 0
        assert x + w <= width + 0.01
        assert y + h <= height + 0.01
        assert str(row["image_id"]) in row["file_name"]
    reach = max(row["bbox"][0] + row["bbox"][2] for row in rows if row["image_id"] == 11)
    assert reach > 64  # pixels of the original image, three times those of the network
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(UserError, match=r"^out: .* is not empty"):
        predict(finished_run[0].path, [str(folder)], folder)


def test_without_a_readable_image_there_is_one_line_and_no_output(finished_run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 1 files .*a\.png"):
        predict(finished_run[0].path, [str(tmp_path / "a.png")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line(finished_run, rng, tmp_path, monkeypatch):
    folder, write = write_images(tmp_path / "in", rng, ["1.png", "2.png"]), Path.write_bytes

    def fills_up(path, content):
        write(path, content[:9])
        if path.name != "1.png":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fills_up)
    with pytest.raises(UserError, match=r"^out: .*2.png cannot be written \(No space left on d"):
        predict(finished_run[0].path, [str(folder)], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.png"]


def test_names_on_the_sheet_of_a_large_image_are_as_large_as_on_a_small_one(
    finished_run, rng, tmp_path, monkeypatch
):
    widths, draw = [], predict_module.draw_boxes

    def spy(*args, **settings):
        drawn = draw(*args, **settings)
        widths.append(drawn.shape[1])
        return drawn

    monkeypatch.setattr(predict_module, "draw_boxes", spy)
    folder = write_images(tmp_path / "in", rng, ["1.jpg"], size=(1500, 2000))
    predict(finished_run[0].path, [str(folder)], tmp_path / "out", threshold=0)
    assert widths == [1600, 480]  # text has one size in pixels and is never scaled
    assert cv2.imread(str(tmp_path / "out" / "contact_sheet.jpg")).shape[1] == 480


def test_files_of_overlapping_sources_are_listed_once(rng, tmp_path):
    a = write_images(tmp_path / "a", rng, ["1.png", "2.jpg"])
    b = write_images(tmp_path / "b", rng, ["1.png"])
    shutil.copy(b / "1.png", b / "sub.tiff")
    assert find_images([str(a)]) == [a / "1.png", a / "2.jpg"]
    found = find_images([str(b / "1.png"), str(tmp_path / "*" / "*.png"), str(b)])
    assert found == [b / "1.png", a / "1.png", b / "sub.tiff"]
    for nothing in (tmp_path / "gone.jpg", tmp_path / "*.gif"):
        with pytest.raises(UserError, match="no such file"):
            find_images([str(nothing)])


def test_in_a_folder_every_ending_of_an_image_counts_and_own_names_win_over_links(rng, tmp_path):
    folder = write_images(tmp_path / "in", rng, ["b.jpg", "C.PNG", "d.Tiff", "e.webp"])
    for name in ("f.gif", "g.jfif", "h.jp2", "i.DIB", "j.pgm"):
        Image.fromarray(rng.integers(0, 256, (48, 64), np.uint8)).save(folder / name)
    write_images(tmp_path / "elsewhere", rng, ["far.png"])
    (folder / "a.jpg").symlink_to("b.jpg")
    (folder / "z.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (folder / "lost.png").symlink_to("gone.png")
    (folder / "folder.png").mkdir()
    for name in ("notes.txt", "phone.heic", "none", ".hidden.png"):
        (folder / name).write_bytes(b"")
    names = ["C.PNG", "b.jpg", "d.Tiff", "e.webp", "f.gif", "g.jfif", "h.jp2", "i.DIB", "j.pgm"]
    assert sorted(p.name for p in find_images([str(folder)])) == [*names, "lost.png", "z.png"]
    both = [str(folder / "a.jpg"), str(folder / "z.png"), str(tmp_path / "*" / "far.png")]
    found = find_images([*both, str(folder / "b.jpg")])
    assert found == [folder / "b.jpg", tmp_path / "elsewhere" / "far.png"]
    assert find_images([str(folder / "a.jpg")]) == [folder / "a.jpg"]


def test_the_command_names_what_it_skips_and_says_that_images_are_not_turned(
    finished_run, rng, tmp_path, capsys
):
    folder = write_images(tmp_path / "in", rng, ["1.png"])
    tags = Image.Exif()
    tags[0x0112] = 6  # "turn by 90 degrees to show"
    photo = Image.fromarray(draw_image(rng, 48, 64, 2)[0])
    photo.save(folder / "2.jpg", exif=tags)
    photo.save(folder / "3.jpg")
    (folder / "4.heic").write_bytes(b"no image that is read here")
    (folder / "5.gif").write_bytes(b"GIF89a")
    (folder / "6.png").symlink_to("7.png")
    command = ["predict", str(finished_run[0].path), str(folder), "--threshold", "0"]
    main([*command, "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    lines = err.replace("\r", "\n").splitlines()
    for name, why in (("4.heic", ".heic"), ("5.gif", ""), ("6.png", "No such file")):
        (line,) = (line for line in lines if line.startswith(f"skipped {folder / name}: "))
        assert why in line.split(name, 1)[1]
    assert "on 3 images; skipped 3 files\n" in out
    assert any(line.startswith("1 images have an orientation tag") for line in lines)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    tagged, plain = (
        [row["bbox"] for row in rows if row["file_name"].endswith(name)]
        for name in ("2.jpg", "3.jpg")
    )
    assert tagged
    assert tagged == plain  # the pixels as stored, whatever the tag says


@pytest.mark.slow
def test_detections_on_an_image_do_not_depend_on_other_files(finished_run, rng, tmp_path):
    """Two of the three share a bucket; for the high ones the run has none."""
    run = tmp_path / "run"
    shutil.copytree(finished_run[0].path, run)
    config = json.loads((run / "config.json").read_text())
    config["data"] |= {"buckets": [[32, SIDE]], "dir": str(tmp_path / "gone")}
    (run / "config.json").write_text(json.dumps(config))
    a = write_images(tmp_path / "a", rng, ["x.png"])
    write_images(a, rng, ["y.png"], size=(28, 64))
    b = write_images(tmp_path / "b", rng, ["x.png"], size=(60, 40))
    listener = Listener()
    predict(run, [str(a), str(b)], tmp_path / "out", threshold=0, progress=listener)
    together = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [row["image_id"] for row in together] == sorted(row["image_id"] for row in together)
    for image_id, path in enumerate((a / "x.png", a / "y.png", b / "x.png"), start=1):
        out = tmp_path / str(image_id)
        predict(run, [str(path)], out, threshold=0)
        alone = json.loads((out / "predictions.json").read_text())
        rows = [row for row in together if row["file_name"] == str(path)]
        assert len(rows) == len(alone) > 0
        assert {row["image_id"] for row in rows} == {image_id}
        for key in ("bbox", "score"):
            found, expected = ([row[key] for row in some] for some in (rows, alone))
            np.testing.assert_allclose(found, expected, atol=2e-3)
    # Without the data set its ids are not known; both files named x are kept.
    assert {row["category_id"] for row in together} <= {1, 2, 3}
    assert [line for line in listener.lines if "category ids are derived from class names" in line]
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"x.png", "y.png", "x-2.png"}
    assert cv2.imread(str(tmp_path / "out" / "x.png")).shape == (48 * 7, 64 * 7, 3)
