"""Points, boxes and masks as people write them: in the documented form, or refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from diffusion_backbones.evaluation import labels, metrics
from diffusion_backbones.evaluation.scenes import load_scenes
from diffusion_backbones.selection import data

POINTS = ([[10, 20], [30, 40]], [[11, 21], [31, 41]])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def matches(photos, source, target, box=None):
    row = {"source": "0.png", "target": "1.png", "source_points": source, "target_points": target}
    if box is not None:
        row["target_box"] = box
    file = photos.parent / "pairs.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([row] * 3).encode())  # as editors on Windows begin a file
    return data.folder(photos, 64, pairs=file).task.matches


def test_points_and_boxes_of_the_documented_form_are_read(photos):
    match = matches(photos, *POINTS, box=[5, 10, 45, 60])[0]
    assert match.source_points.tolist() == POINTS[0]
    assert match.target_points.tolist() == POINTS[1]
    assert match.extent == 50


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        ([[10, 20, 2], [30, 40, 2]], [[11, 21, 2], [31, 41, 2]], "got 2 x 3"),
        ([[10, 20, 2]] * 4, [[11, 21, 2]] * 4, "leave out the third number"),
        ([[10, 30, 50, 9], [20, 40, 60, 9]], [[11, 31, 51, 9], [21, 41, 61, 9]], "are these all x, then all y"),
        ([10, 20, 2, 30, 40, 2], [11, 21, 2, 31, 41, 2], "got 6 in a row"),
        ([10, 20], [11, 21], "got 2 in a row"),
        ([[[10, 20]]], [[[11, 21]]], "got 1 x 1 x 2"),
        ([[10, 20], [float("nan"), 40]], POINTS[1], "finite"),
        ([[10, 20], [None, None]], POINTS[1], "finite"),
        ([[10, 20], [float("inf"), 1]], POINTS[1], "finite"),
        ([[10, 20], [30]], POINTS[1], "must be numbers, 2 for each"),
        ([["10", "20"], ["30", "40"]], POINTS[1], "must be numbers, 2 for each"),
        ([[10**400, 20], [30, 40]], POINTS[1], "must be numbers, 2 for each"),
        ([[True, False], [True, True]], POINTS[1], "must be numbers, 2 for each"),
        ({"x": 1}, POINTS[1], "must be numbers, 2 for each"),
        ([[-10, 20], [30, 40]], POINTS[1], "lies outside the image of 64 x 64"),
        ([[10, 200], [30, 40]], POINTS[1], "lies outside the image of 64 x 64"),
        ([[0.1, 0.2], [0.5, 0.6]], POINTS[1], "shares of the image"),
    ],
)
def test_other_points_are_refused_by_the_name_of_the_pair(photos, source, target, told):
    with pytest.raises(ValueError, match=r"pairs.json, pair 0: source_points") as error:
        matches(photos, source, target)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("box", "told"),
    [
        ([40, 40, 10, 10], "x, y, width, height"),
        ([0, 0, 8, 8], "holds 0% of the object's points"),
        ([10, 10, 10, 10], "x0 < x1 and y0 < y1"),
        ([-500, -500, 5000, 5000], "must lie in its image of 64 x 64 pixels"),
        ([0, 0, 64, 70], "must lie in its image of 64 x 64 pixels"),
        ([0, 0, 30, 30, 0.9], "got 5 in a row"),
        ([[0, 0, 10, 10], [20, 20, 60, 60]], "got 2 x 4"),
        ([0, 0, float("nan"), 10], "finite"),
        ([], "4 for each"),
        ("whole", "4 for each"),
        (7, "4 for each"),
    ],
)
def test_other_boxes_are_refused_by_the_name_of_the_pair(photos, box, told):
    with pytest.raises(ValueError, match=r"pairs.json, pair 0: target_box") as error:
        matches(photos, *POINTS, box=box)
    assert told in str(error.value)


def test_names_of_images_are_texts(photos):
    (photos.parent / "pairs.json").write_text(
        json.dumps([{"source": 3, "target": "1.png", "source_points": [], "target_points": []}])
    )
    with pytest.raises(ValueError, match="pair 0: source must be the path of an image, got 3"):
        data.folder(photos, 64, pairs=photos.parent / "pairs.json")


def test_a_mistyped_key_is_not_passed_over(photos):
    row = {"source": "0.png", "target": "1.png", "source_points": POINTS[0], "target_points": POINTS[1]}
    file = photos.parent / "pairs.json"
    file.write_text(json.dumps([row | {"targetbox": [0, 0, 9, 9]}] * 3))
    with pytest.raises(ValueError, match=r"pair 0 has 'targetbox', which says nothing\. Did you mean target_box"):
        data.folder(photos, 64, pairs=file)
    file.write_text(json.dumps([row | {"category": "cat", "id": 7}] * 3))
    assert len(data.folder(photos, 64, pairs=file).task.matches) == 3


# Masks.


def masks(photos, *arrays):
    folder = photos.parent / "masks"
    folder.mkdir()
    for i, array in enumerate(arrays):
        (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(folder / f"{i}.png")
    return folder


def halves(first: int, second: int) -> np.ndarray:
    return np.repeat(np.uint8([[first] * 32 + [second] * 32]), 64, 0)


def test_masks_are_turned_upright_as_their_images(photos, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    folder = masks(photos, *[halves(0, 1)] * 4)
    Image.fromarray(halves(0, 1)).rotate(90, expand=True).save(folder / "0.png", exif=exif)
    upright = labels.read_mask(folder / "0.png", (64, 64))
    assert np.array_equal(upright, halves(0, 1))


def test_objects_of_255_are_refused(photos):
    with pytest.raises(ValueError, match="hold 0 and 255 alone, and 255 is ignored; write 1"):
        data.folder(photos, 64, masks(photos, *[halves(0, 255)] * 4))


def test_what_is_ignored_may_be_255(photos):
    array = halves(0, 1)
    array[:, 31:33] = 255
    task = data.folder(photos, 64, masks(photos, *[array] * 4)).task
    assert task.classes.tolist() == [0, 1]


def test_masks_that_are_no_images_are_named(photos):
    folder = masks(photos, *[halves(0, 1)] * 4)
    (folder / "2.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"2\.png cannot be read as a mask: cannot identify image file"):
        data.folder(photos, 64, masks=folder)
    Image.new("1", (20_000, 10_000)).save(folder / "2.png")  # beyond Pillow's limit of pixels
    with pytest.raises(ValueError, match=r"2\.png has 20000 x 10000 pixels and its image 64 x 64"):
        data.folder(photos, 64, masks=folder)


def test_a_long_text_costs_no_mask(photos):
    """Pillow reads no PNG with a text of more than a million letters."""
    folder = masks(photos, *[halves(0, 1)] * 4)
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.fromarray(halves(0, 1)).save(folder / "2.png", pnginfo=text)
    assert data.folder(photos, 64, masks=folder).task.classes.tolist() == [0, 1]


@pytest.mark.parametrize("how", ["bilinear", "jpeg", "classes"])
def test_interpolated_edges_are_refused_by_name(photos, how, tmp_path):
    disc = np.uint8(200 * (np.hypot(*np.mgrid[-16:16, -16:16]) < 11))
    if how == "classes":
        disc = disc // 20  # classes 0 and 10, and mixtures of them that are classes too
    mask = Image.fromarray(disc).resize((64, 64), Image.Resampling.BILINEAR)
    if how == "jpeg":
        Image.fromarray(disc).resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "a.jpg", quality=80)
        mask = Image.open(tmp_path / "a.jpg")
    folder = masks(photos, halves(0, 1), mask, halves(0, 1), halves(0, 1))
    with pytest.raises(ValueError, match=r"1\.png.*nowhere more than an edge"):
        data.folder(photos, 64, folder)
    mask = Image.fromarray(disc).resize((64, 64), Image.Resampling.NEAREST)
    mask.save(folder / "1.png")
    assert len(data.folder(photos, 64, folder).task.classes) == 3


def test_masks_of_many_classes_and_thin_lines_are_read():
    labels.check_edges(np.kron(np.arange(100).reshape(10, 10), np.ones((4, 4))).astype(np.uint8), "a")
    lines = np.zeros((64, 64), np.uint8)
    lines[:, 10], lines[20], lines[:, 30:34], lines[40:44] = 1, 2, 3, 4
    labels.check_edges(lines, "a")


# Metrics and scenes.


@pytest.mark.parametrize(
    ("found", "truth", "extent"),
    [
        ([[1, 2, 2]], [[1, 2, 0]], 10),
        ([[1, 2]], [[1, 2], [3, 4]], 10),
        ([[1, 2]], [[1, float("nan")]], 10),
        ([[1, 2]], [[1, 2]], 0),
        ([[1, 2]], [[1, 2]], -30),
        ([[1, 2]], [[1, 2]], float("nan")),
    ],
)
def test_keypoints_that_are_none(found, truth, extent):
    with pytest.raises(ValueError, match="must be"):
        metrics.correct_keypoints(found, truth, extent)


def test_labels_of_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        metrics.mean_iou(np.zeros((4, 4)), np.zeros((4, 1)), [0])
    with pytest.raises(ValueError, match="none of the classes occurs"):
        metrics.mean_iou(np.zeros((4, 4)), np.zeros((4, 4)), [3])


@pytest.mark.parametrize(
    ("truth", "guess", "classes", "told"),
    [
        ([[0, 1]], [[0.2, 0.9]], [0, 1], "guess must be labels, whole numbers from 0"),
        ([[0, 1]], [[float("nan"), 1]], [0, 1], "guess must be labels"),
        ([[-1, 1]], [[0, 1]], [0, 1], "truth must be labels, .* got values from -1"),
        ([["cat", "dog"]], [[0, 1]], [0, 1], "truth must be labels"),
        ([[0, 1]], [[0, 1]], 2, r"classes must be labels, such as range\(21\), got 2"),
    ],
)
def test_what_are_no_labels(truth, guess, classes, told):
    for metric in (metrics.class_iou, metrics.mean_iou):
        with pytest.raises(ValueError, match=told):
            metric(truth, guess, classes)


@pytest.mark.parametrize("alpha", [0, -1, 10, float("nan"), "0.1", True])
def test_a_share_of_the_extent(alpha):
    with pytest.raises(ValueError, match="alpha must be a share of the extent"):
        metrics.correct_keypoints([[1, 2]], [[1, 2]], 10, alpha)


@pytest.mark.parametrize("correct", [[], [np.zeros(0, bool)], [np.array([0.3, 7.0])], [np.array([1, 0])]])
def test_what_is_found_is_true_or_false(correct):
    with pytest.raises(ValueError, match="pck takes truth values of at least one point"):
        metrics.pck(correct)


def test_a_set_of_scenes_with_wrong_points_is_refused(tmp_path):
    (tmp_path / "pairs").mkdir()
    for side in ("source", "target"):
        Image.new("RGB", (64, 64)).save(tmp_path / "pairs" / f"000-{side}.jpg")
    row = {"source_points": [[1, 2, 2]], "target_points": [[1, 2, 2]], "target_box": [0, 0, 9, 9], "split": "style"}
    splits = {key: [] for key in ("probe", "scenes", "identities", "style")}
    (tmp_path / "scenes.json").write_text(json.dumps({"classes": ["a"], "splits": splits, "pairs": [row]}))
    with pytest.raises(ValueError, match="pair 0: source_points must be numbers, 2 for each"):
        load_scenes(tmp_path)
