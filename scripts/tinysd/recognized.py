"""Whether a classifier of real photographs recognizes what tinysd draws: 20 classes, so that chance is 5 %.

    python scripts/tinysd/recognized.py DATA --resnet open-nsfw.onnx [--folder FOLDER] [--each 10] [--sheet FILE]

The classes are the 20 with most held-out photographs (``photo_tasks.py``). The classifier is logistic regression on the
averaged features of the photo network (``photo_features.py``), which has nothing to do with tinysd, and learns from
held-out photographs and their mirror images, which the training of tinysd never saw. Its own accuracy on photographs,
each named by a classifier that did not learn from it (five parts), bounds what samples can reach. Samples are drawn for
the captions of the classes, without selection. The bootstrap draws samples, and photographs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import photo_tasks
import sample
from intervals import Outcome, figure, share
from photo_features import Features, features
from PIL import Image, ImageOps
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

CLASSES, PARTS, SIDE = 20, 5, 192


def describe(network: Features, images: Sequence[Image.Image]) -> np.ndarray:
    """(N, C): averaged features of images, all at the photographs' size."""
    sized = (image.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for image in images)
    return photo_tasks.pooled(network, sized).numpy()


def learn(x: np.ndarray, mirrored: np.ndarray, y: np.ndarray) -> Pipeline:
    """The classifier; rare classes weigh as much as frequent ones."""
    classifier = LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000)
    return make_pipeline(StandardScaler(), classifier).fit(np.concatenate([x, mirrored]), np.concatenate([y, y]))


def right(guess: np.ndarray, truth: np.ndarray) -> Outcome:
    """Each sample's success."""
    return Outcome(np.stack([guess == truth, np.ones(len(truth))], 1).astype(int), share)


def own_accuracy(x: np.ndarray, mirrored: np.ndarray, y: np.ndarray) -> Outcome:
    """Of the classifier on photographs that it did not learn from."""
    guess = np.empty_like(y)
    for known, other in StratifiedKFold(PARTS, shuffle=True, random_state=0).split(x, y):
        guess[other] = learn(x[known], mirrored[known], y[known]).predict(x[other])
    return right(guess, y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--resnet", type=Path, metavar="ONNX", required=True, help="open-nsfw.onnx")
    parser.add_argument("--each", type=int, default=10, metavar="N", help="samples of each class (default 10)")
    parser.add_argument("--sheet", type=Path, help="draw the first eight of each class here")
    sample.options(parser)
    parser.set_defaults(side=SIDE)
    args = parser.parse_args()
    folder, network = args.data / "photos192", features("resnet", 0, resnet=args.resnet)
    _, held_out = photo_tasks.rows(folder)
    names = photo_tasks.common(held_out, CLASSES)
    held_out = [row for row in held_out if row["class"] in names]
    images = list(photo_tasks.pictures(folder, held_out))
    x, mirrored = (describe(network, some) for some in (images, [ImageOps.mirror(image) for image in images]))
    y = np.array([names.index(row["class"]) for row in held_out])
    told = "{:44} {:.1f} % [{:.1f}, {:.1f}] of {}"
    print(told.format("photographs recognized", *figure([own_accuracy(x, mirrored, y)]), len(y)), flush=True)
    captions = [photo_tasks.caption(held_out, name) for name in names for _ in range(args.each)]
    truth = np.repeat(np.arange(len(names)), args.each)
    drawn = sample.draw(captions, args)
    guess = learn(x, mirrored, y).predict(describe(network, drawn))
    print(told.format("samples recognized", *figure([right(guess, truth)]), len(truth)))
    for i, name in enumerate(names):
        taken = np.bincount(guess[truth == i], minlength=len(names))
        most = names[taken.argmax()]
        print(f"  {name:24} {taken[i]:3} of {args.each}, most often taken for {most} ({taken.max()})")
    if args.sheet:
        shown = [i for i in range(len(drawn)) if i % args.each < sample.COLUMNS]
        columns = min(args.each, sample.COLUMNS)
        sample.sheet([drawn[i] for i in shown], [captions[i] for i in shown], columns).save(args.sheet, quality=90)
        print(args.sheet)


if __name__ == "__main__":
    main()
