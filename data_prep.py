"""Prepares all that dipr1.py reads: scenes, a tiny checkpoint, and real annotations as one JSONL.

    python data_prep.py synthetic --out data/synthetic                        crowds drawn by Pillow
    python data_prep.py tiny --out data/tiny                                  a random Qwen2.5-VL, 1M
    python data_prep.py crowdhuman CROWDHUMAN --split train --out data/train.jsonl --draw 4
    python data_prep.py --help                                                all sources

One line of the JSONL is one image, in pixels of the original image, boxes as x1, y1, x2, y2:

    {"image": path relative to the file, "width": W, "height": H, "target": "person",
     "boxes": [[x1, y1, x2, y2], ...], "ignore": [...]}

In an `ignore` region an unmatched detection is neither right nor wrong (a crowd too dense to annotate).
A class is a question: where there are several, an image has a line for each, with the class as its target.
Perception-R1's other tasks name their "task": "grounding" has one box, "counting" has "points" or only a
"count", "ocr" has a "transcript". Files in one folder may be concatenated.
"""
import argparse
import colorsys
import contextlib
import functools
import inspect
import itertools
import json
import os
import pickle
import random
import re
import sys
from collections import Counter, defaultdict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from scipy.io import loadmat
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Files and images: what enters or leaves is checked here, and an error says where it is


def reason(error):
    """What an exception says, as part of a one-line message."""
    if isinstance(error, (OSError, ValueError)):
        return getattr(error, "strerror", None) or str(error)
    return f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def reading(path, place=""):
    """Turn whatever a malformed file raises into one line that says where the fault is."""
    try:
        yield
    except Exception as error:  # readers of JSON, pickles, Matlab's files and images raise nearly anything
        raise SystemExit(f"{path}{place and ', '}{place}: {reason(error)}") from None


@contextlib.contextmanager
def written_whole(path):
    """A text file to write, renamed to `path` once it is complete; after an error nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def text_lines(path, parse=str):
    """Yield ("line N", parse(text)) of the lines that are not blank; one line in memory at a time."""
    with reading(path), open(path, "rb") as file:  # bytes: a line ends at a line feed, at no other separator
        for number, line in enumerate(file, 1):
            with reading(path, f"line {number}"):
                text = line.decode("utf-8-sig").strip()  # without a byte order mark
                if text:
                    yield f"line {number}", parse(text)


def json_object(text):
    """A dict from its JSON."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is expected, not {value!r:.40}")
    return value


def read_jsonl(path, check):
    """Read JSON lines -> [check(object), ...]. SystemExit names a line that is malformed or that fails."""
    return [checked for _, checked in text_lines(path, lambda text: check(json_object(text)))]


def count(number):
    """A whole number of at least 1, from the command line."""
    if int(number) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return int(number)


def check_text(value):
    """A text, without surrounding space. ValueError for all else, and for one that no prompt can hold."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"a text is expected, not {value!r:.40}")
    value.encode()  # ValueError for half a surrogate pair, which no tokenizer can encode
    if token := re.search(r"<\|[^|]*\|>", value):
        raise ValueError(f"remove {token[0]:.40} from the text: it is a special token of Qwen's")
    return value.strip()


def check_rows(name, rows, k, width=None, height=None, predicted=False):
    """Check that each row has k numbers below 10^6 -> (n, k) array. ValueError names the first at fault.
    With the size of an image, rows are boxes (k = 4; x1 < x2, y1 < y2) or points (k = 2) in its pixels, and
    an overhang of a pixel, as rounding causes it, is clipped. What a model `predicted` may overhang by a
    tenth of the image, and be empty."""
    def require(good, why):
        if not all(good):
            first = list(good).index(False)
            raise ValueError(f"{name}, row {first + 1}: {rows[first]!r:.80} {why}")

    if not isinstance(rows, (list, tuple)):
        raise ValueError(f"{name} must be a list of rows, not {rows!r:.80}")
    are_numbers = [isinstance(row, (list, tuple)) and len(row) == k
                   and all(type(v) in (int, float) and abs(v) < 1e6 for v in row)  # no NaN, no True
                   for row in rows]
    require(are_numbers, f"is not {k} numbers below a million")
    table = np.array(rows, float).reshape(-1, k)
    if width is None:
        return table
    pixels, inside = f"the {width} x {height} pixels of the image", table.clip(0, [width, height] * (k // 2))
    overhang = max(width, height) / 10 if predicted else 1
    require((abs(table - inside) <= overhang).all(axis=1), f"is outside {pixels}")
    sides = inside[:, 2:] - inside[:, : k - 2]
    require(((sides > 0) | predicted & (sides == 0)).all(axis=1), "does not have x1 < x2 and y1 < y2")
    if len(table) and table.max() <= 1 and (table % 1).any():
        raise ValueError(f"{name} are all between 0 and 1: fractions, where {pixels} are expected")
    return inside


def check_count(number, points):
    """ValueError unless the number of instances is a whole one, and that of the points, if there are any."""
    if type(number) is not int or number < 0 or points is not None and len(points) != number:
        raise ValueError(f"count is {number!r}, but there are {len([] if points is None else points)} points")


def check_size(size):
    """ValueError for an image of (width, height) that Qwen's image processor refuses."""
    if max(size) > 200 * min(size):
        raise ValueError("{} x {} pixels: a ratio above 200".format(*size))


@contextlib.contextmanager
def opened(path):
    """Pillow's image, not decoded yet. OSError says why opening it, or using it, fails."""
    try:
        with Image.open(path) as image:
            check_size(image.size)
            yield image
    except Exception as error:
        raise OSError(reason(error)) from None


def open_image(path):
    """An image as people see it: upright, 8 bits, on white where it is transparent, RGB; or OSError."""
    with opened(path) as image:
        image.load()  # first, since some formats keep EXIF behind the pixels
        with contextlib.suppress(Exception):  # damaged EXIF
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":  # grey of 16 bits or floats: Pillow's own conversion cuts it at 255
            grey = np.nan_to_num(np.array(image, float), posinf=0, neginf=0)
            whites = (1, 255, 65535) if image.mode == "F" else (65535,)  # floats do not say their range
            white = next((white for white in whites if grey.max() <= white), grey.max())
            image = Image.fromarray((grey * 255 / white).clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def draw_rows(picture, rows, color, line):
    """Outline boxes (x1, y1, x2, y2) that have an area, or circle points (x, y), on a picture."""
    pen = ImageDraw.Draw(picture)
    for row in map(tuple, rows):
        if len(row) == 2:
            pen.circle(row, 2 * line, outline=color, width=line)
        elif row[0] < row[2] and row[1] < row[3]:
            pen.rectangle(row, outline=color, width=line)


def on_every_core(function, items):
    """Yield function(item) of each, in order; a block of items at a time, so that memory stays small."""
    items = iter(items)
    with ProcessPoolExecutor() as pool:
        while block := list(itertools.islice(items, 256)):
            yield from pool.map(function, block, chunksize=8)


# ------------------------------------------------------------------------------------------------------------
# Synthetic crowds: people who occlude each other, in front of a textured street

OPAQUE = [255 * (alpha > 127) for alpha in range(256)]  # pixels of a figure are those mostly opaque
VIVID, GREYISH, NIGHT = (0.6, 1.0), (0.0, 0.3), (10, 12, 26)  # saturations of clothes; the colour of darkness
CROWDS = {  # how many people are tried (some find no place), their size, the largest IoU; light 1 is day
    "sparse": dict(people=(2, 5), scale=1.0, overlap=0.4, saturation=VIVID, light=1.0),
    "dense": dict(people=(5, 8), scale=0.8, overlap=0.5, saturation=VIVID, light=1.0),
    "night": dict(people=(3, 6), scale=0.9, overlap=0.45, saturation=GREYISH, light=0.6)}


def colorful(rng, saturation, low=0.3, high=1.0):
    """The colour of clothes: any hue, of this saturation, brightness from `low` to `high`."""
    color = rng.random(), rng.uniform(*saturation), rng.uniform(low, high)
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(*color))


def muted(rng, low, high):
    """The colour of a street: nearly grey, brightness from `low` to `high` of 255."""
    return tuple(int(c) for c in rng.integers(low, high) + rng.integers(-12, 13, 3))


def draw_person(rng, height, saturation=VIVID):
    """A standing or walking person, `height` pixels tall, on a transparent layer cut to the outline."""
    h = 2 * height  # scaled down at the end, so that limbs a pixel wide stay smooth
    layer = Image.new("RGBA", (h, h))
    pen = ImageDraw.Draw(layer)
    skin = tuple(int(c) for c in np.array([236, 188, 150]) * rng.uniform(0.4, 1.0))
    shirt, trousers = colorful(rng, saturation), colorful(rng, saturation, 0.1, 0.5)
    hair = muted(rng, 15, 70)
    head, shoulder, lean = 0.13 * h, h * rng.uniform(0.09, 0.13), h * rng.uniform(-0.03, 0.03)
    middle, hip, neck = h / 2, 0.52 * h, 0.14 * h
    stride, swing = h * rng.uniform(0.02, 0.12), h * rng.uniform(0.02, 0.12)
    for side in (-1, 1):  # a leg and an arm on each side
        foot = (middle + side * stride, h - 1)
        pen.line([(middle + side * 0.04 * h, hip), foot], fill=trousers, width=max(3, int(0.075 * h)))
        hand = (middle + lean + side * (shoulder + swing), 0.45 * h)
        pen.line([(middle + lean + side * shoulder, 0.2 * h), hand], fill=shirt, width=max(3, int(0.055 * h)))
    if rng.random() < 0.3:  # a coat or a skirt
        pen.polygon([(middle - shoulder, 0.4 * h), (middle + shoulder, 0.4 * h),
                     (middle + 1.3 * shoulder, 0.72 * h), (middle - 1.3 * shoulder, 0.72 * h)], fill=shirt)
    chest = [middle + lean - shoulder, neck, middle + lean + shoulder, hip + 0.03 * h]
    pen.rounded_rectangle(chest, 0.05 * h, fill=shirt)
    x = middle + 1.3 * lean
    pen.ellipse([x - head / 2, 0, x + head / 2, 1.15 * head], fill=skin)
    pen.pieslice([x - head / 2, 0, x + head / 2, 1.15 * head], 180, 360, fill=hair)
    layer = layer.reduce(2)
    return layer.crop(layer.getchannel("A").point(OPAQUE).getbbox())


def draw_street(rng, size):
    """A street with texture, and at most two objects that are not people -> (image, y of the horizon)."""
    street = Image.new("RGB", (size, size), muted(rng, 150, 230))
    pen = ImageDraw.Draw(street)
    horizon, window = int(size * rng.uniform(0.25, 0.45)), muted(rng, 90, 160)
    for x in range(int(rng.integers(0, 12)), size, int(rng.integers(14, 26))):
        pen.rectangle([x, 0.25 * horizon, x + 7, 0.6 * horizon], fill=window)
    pen.rectangle([0, horizon, size, size], fill=muted(rng, 130, 215))
    for y in np.geomspace(horizon, size, 5)[1:-1]:
        pen.line([0, y, size, y], fill=muted(rng, 90, 160))
    blotches = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8), dtype=np.uint8))
    street = Image.blend(street, blotches.resize(street.size).convert("RGB"), 0.2)
    pen = ImageDraw.Draw(street)
    for _ in range(rng.integers(0, 3)):
        x, y, color = int(rng.integers(0, size)), int(rng.integers(size // 2, size)), muted(rng, 30, 160)
        if rng.random() < 0.5:
            pen.line([x, y - size // 2, x, y], fill=color, width=2)
            pen.ellipse([x - 3, y - size // 2 - 3, x + 3, y - size // 2 + 3], fill=(250, 240, 190))
        else:
            pen.rounded_rectangle([x, y, x + 9, y + 7], 2, fill=color)
            pen.arc([x + 2, y - 4, x + 7, y + 4], 180, 360, fill=color)
    return street, horizon


def iou(a, b):
    """Intersection over union of two boxes."""
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def draw_scene(out, seed, size, crowd, index):
    """Draw and save scene `index`, whatever the others are -> its record. It is a street with one to three
    clusters of people, nearer ones larger (perspective); less than a fifth visible, they are in `ignore`."""
    rng, kind = np.random.default_rng([seed, index, list(CROWDS).index(crowd)]), CROWDS[crowd]
    scene, horizon = draw_street(rng, size)
    centers = rng.uniform(0.15 * size, 0.85 * size, rng.integers(1, 4))
    figures = []
    for _ in range(rng.integers(*kind["people"], endpoint=True)):
        sole = int(rng.uniform(horizon + 0.2 * size, size))
        depth = (sole - horizon) / (size - horizon)
        height = int((0.32 + 0.36 * depth) * size * rng.uniform(0.85, 1.1) * kind["scale"])
        figure = draw_person(rng, height, kind["saturation"])
        left = int(rng.choice(centers) + rng.normal(0, 0.13 * size) - figure.width / 2)
        left, top = min(max(left, 0), size - figure.width), max(sole - figure.height, 0)
        box = [left, top, left + figure.width, top + figure.height]
        if all(iou(box, other) < kind["overlap"] for _, other, _ in figures):
            figures.append((figure, box, np.array(figure.getchannel("A").point(OPAQUE), bool)))
    figures.sort(key=lambda item: item[1][3])  # back to front
    owner = np.zeros((size, size), int)
    for number, (figure, (x1, y1, x2, y2), outline) in enumerate(figures, 1):
        scene.paste(figure, (x1, y1), figure)
        owner[y1:y2, x1:x2][outline] = number
    boxes, ignore = [], []
    for number, (_, box, outline) in enumerate(figures, 1):
        (boxes if (owner == number).sum() >= 0.2 * outline.sum() else ignore).append(box)
    scene = Image.blend(scene, Image.new("RGB", scene.size, NIGHT), 1 - kind["light"])
    name = f"images/{index:06d}.png"
    scene.save(out / name, compress_level=1)
    return dict(image=name, width=size, height=size, target="person", boxes=boxes, ignore=ignore)


def synthetic(out: Path, train: count = 1800, val: count = 200, seed: int = 0, size: count = 112,
              crowd: Literal["sparse", "dense", "night"] = "sparse"):
    """Draw `train` scenes of a `crowd` for train.jsonl and `val` for val.jsonl, of `size` x `size` pixels."""
    if size < 56:
        raise SystemExit(f"--size {size} is too small for a scene: at least 56 pixels")
    (out / "images").mkdir(parents=True, exist_ok=True)
    draw = functools.partial(draw_scene, out, seed, size, crowd)
    records = list(tqdm(on_every_core(draw, range(train + val)), "drawing scenes", train + val))
    for name, part in ("train.jsonl", records[:train]), ("val.jsonl", records[train:]):
        with written_whole(out / name) as file:
            file.writelines(json.dumps(record) + "\n" for record in part)
    print(f"Written: {out}/train.jsonl, val.jsonl and images")


# ------------------------------------------------------------------------------------------------------------
# A tiny checkpoint: every part of a Qwen2.5-VL folder, at a size that learns on a laptop


def tiny_tokenizer(size, texts):
    """256 bytes, which write any text, and one token for whatever is written often, such as a number with its
    comma: a box costs 5 tokens (some 21 with the real tokenizer), which makes the demo quick."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special_tokens = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
        <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
        <|image_pad|> <|video_pad|>""".split()  # Qwen's
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=special_tokens, model_max_length=32768)
    fixed = re.split(r"<\|.*?\|>|\{.*?\}", "<|im_end|>".join(texts))  # without special tokens and {target}
    sentences = [sentence for sentence in fixed if len(sentence) > 1]
    tags = [f"<{slash}{name}>" for name in ("think", "look", "answer") for slash in ("", "/")]
    numbers = [f"{number}{comma}" for number in range(size + 1) for comma in ("", ", ")]
    glue = ["[[", "], [", "]]", "[]", "person", " in sight, ", " to look at"]
    tokenizer.add_tokens(sentences + tags + numbers + glue)
    return tokenizer


def tiny(out: Path, seed: int = 0, size: int = 112):
    """Write a random Qwen2.5-VL for images of about `size` x `size` pixels as a complete Hugging Face folder.
    Each fixed piece of dipr1.py's prompts is one token of it."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    from dipr1 import CHAT, TASKS  # which imports this file

    tokenizer = tiny_tokenizer(size, [CHAT, *(task.question for task in TASKS.values())])
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32768, initializer_range=0.05,
        # M-RoPE gives the width its lowest frequencies: at Qwen's base of 1e6, with heads this small, the
        # picture's four columns of tokens would all look like one.
        rope_parameters=dict(rope_type="default", rope_theta=10.0, mrope_section=[4, 6, 6]),
        bos_token_id=token("<|endoftext|>"), pad_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"))
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
                  fullatt_block_indexes=[1], initializer_range=0.05)
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    # Neighbouring numbers get similar embeddings, as a pretrained model knows that 41 is close to 42, and the
    # demo is too short to learn it: a random walk, smoothed over a few pixels; a direction of their own sets
    # numbers with a comma apart.
    embeddings, rng = model.get_input_embeddings().weight.data, np.random.default_rng(seed)
    walk = gaussian_filter1d(rng.standard_normal((size + 1, embeddings.shape[1])), sigma=3, axis=0)
    walk *= embeddings.std().item() / walk.std()
    for comma in ("", ", "):
        ids = token([f"{number}{comma}" for number in range(size + 1)])
        kind = rng.standard_normal(embeddings.shape[1]) * embeddings.std().item()
        embeddings[ids] = 0.3 * embeddings[ids] + embeddings.new_tensor(walk + kind)
    model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]  # two, as Qwen's
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    Qwen2VLImageProcessorPil().save_pretrained(out)
    print(f"Written: {out}, a model for --model")


# ------------------------------------------------------------------------------------------------------------
# Readers: a function per source yields (image path, fields of its line); its parameters become options. For
# an annotation whose image is not listed it yields (None, None): it is counted.


def find(root, *patterns):
    """The paths below `root` that match, of the first pattern first; SystemExit says what was expected."""
    found = [path for pattern in patterns for path in root.glob(pattern)]
    if not found:
        raise SystemExit(f"{root}: unknown layout, looked there for " + ", or ".join(patterns))
    return found


def detection(target, people):
    """[(is it a target?, [x, y, width, height] in pixels), ...] -> the fields of a line. Coordinates are
    0-based: no shift by one. ValueError for a box that is not four finite numbers."""
    is_target = np.array([is_target for is_target, _ in people], bool)
    table = check_rows("boxes", [box for _, box in people], 4)
    corners = np.hstack([table[:, :2], table[:, :2] + table[:, 2:]])
    boxes, ignore = corners[is_target].tolist(), corners[~is_target].tolist()
    return {"target": check_text(target), "boxes": boxes, "ignore": ignore}


def crowdhuman(root: Path, split: Literal["train", "val"], target: str = "person"):
    """`annotation_<split>.odgt`, an image per line; images in `Images` or `CrowdHuman_<split>*`.

    The box is `fbox`, the whole person with occluded parts, as the benchmark evaluates it. Tag "mask" and
    extra.ignore mark ignore regions; `head_attr.ignore` concerns heads only.
    """
    path = find(root, f"annotation_{split}.odgt")[0]
    images = {path.name: path for path in find(root, "Images/*.jpg", f"CrowdHuman_{split}*/**/*.jpg")}
    for place, entry in text_lines(path, json_object):
        with reading(path, place):
            people = [(person["tag"] == "person" and not person.get("extra", {}).get("ignore"),
                       person["fbox"]) for person in entry["gtboxes"]]
            name = f"{entry['ID']}.jpg"
            yield images.get(name, root / "Images" / name), detection(target, people)


def citypersons(root: Path, split: Literal["train", "val"], target: str = "pedestrian"):
    """`annotations/anno_<split>.mat` or `gtBboxCityPersons/<split>/*/*.json`, images in `leftImg8bit`.

    As in the standard protocol, the full boxes of pedestrians are the targets; riders, sitting people, groups
    and all else are ignore regions.
    """
    images = find(root, f"leftImg8bit/{split}")[0]
    path = find(root, f"annotations/anno_{split}.mat", f"gtBboxCityPersons/{split}")[0]
    for file in sorted(path.glob("*/*_gtBboxCityPersons.json")):
        with reading(file):
            data = json.loads(file.read_bytes())
            people = [(thing["label"] == "pedestrian", thing["bbox"]) for thing in data["objects"]]
            image = images / file.parent.name / file.name.replace("gtBboxCityPersons.json", "leftImg8bit.png")
            yield image, {"size": (data.get("imgWidth"), data.get("imgHeight")), **detection(target, people)}
    with reading(path):
        cells = [] if path.is_dir() else loadmat(path, simplify_cells=True)[f"anno_{split}_aligned"]
    for number, cell in enumerate(np.ravel(cells), 1):
        with reading(path, f"image {number}"):
            # As Python's integers: in the file's own type, often uint8, 200 + 100 would be 44.
            people = [(row[0] == 1, row[1:5]) for row in np.reshape(cell["bbs"], (-1, 10)).tolist()]
            yield images / cell["cityname"] / cell["im_name"], detection(target, people)


def widerpedestrian(root: Path, split: Literal["train", "val"], target: str = "person"):
    """`<split>_annotations.txt` of 2018, in lines of `imgNNNNN.jpg (class x y w h)*`, or
    `Annotations/<split>_bbox.txt` of 2019, in lines of `surNNNNN.jpg (x y w h)*`.

    Images are below folders that have the split in their names. Pedestrians and cyclists are merged. A
    split's files beside it, named `*ignore*`, hold its ignore regions, which have no class.
    """
    path = find(root, f"{split}_annotations.txt", f"Annotations/{split}_bbox.txt", f"{split}_bbox.txt")[0]
    ignore = [file for file in path.parent.glob(f"*{split}*.txt") if "ignore" in file.name]
    images, people = {path.name: path for path in find(root, f"*{split}*/**/*.jpg")}, defaultdict(list)
    for file in (path, *ignore):
        for place, line in text_lines(file):
            with reading(file, place):
                name, *numbers = line.split()
                prefix = re.match("img|sur|ad", name)
                if prefix is None:
                    raise ValueError(f"{name!r} is neither of 2018 (img...) nor of 2019 (sur..., ad...)")
                columns = 5 if prefix[0] == "img" and file == path else 4  # 20 numbers: 4 boxes, or 5?
                if len(numbers) % columns:
                    raise ValueError(f"{len(numbers)} numbers after {name}, where every box has {columns}")
                rows = check_rows("boxes", np.reshape(numbers, (-1, columns)).astype(float).tolist(), columns)
                if columns == 5 and not np.isin(rows[:, 0], (1, 2)).all():
                    raise ValueError("a class that is neither 1 (pedestrian) nor 2 (cyclist)")
            if file == path or name in people:  # a bare name is an empty image
                people[name] += [(file == path, box) for box in rows[:, -4:].tolist()]
            else:
                yield None, None
    for name, boxes in people.items():
        yield images.get(name, root / name), detection(target, boxes)


def uavdt(root: Path, split: Literal["train", "test"], target: str = "vehicle", stride: count = 1):
    """Sequences `UAV-benchmark-M/M0101/img000001.jpg` with `GT/M0101_gt_whole.txt` and `_gt_ignore.txt`.

    A line is `frame,target,left,top,width,height,out of view,occlusion,category`. Cars, trucks and buses are
    one class. `stride` N takes every N-th frame: neighbours are nearly the same.
    """
    images, truths = find(root, "UAV-benchmark-M")[0], find(root, "GT", "UAV-benchmark-MOTD_v1.0/GT")[0]
    of_test = """M0203 M0205 M0208 M0209 M0403 M0601 M0602 M0606 M0701 M0801 M0802 M1001 M1004 M1007 M1009
        M1101 M1301 M1302 M1303 M1401""".split()  # the other sequences are for training
    names = sorted({path.name.split("_")[0] for folder in (images, truths) for path in folder.glob("M*")})
    of_split = [name for name in names if (name in of_test) == (split == "test")]
    if not of_split:
        raise SystemExit(f"{root}: no sequence of --split {split}, found {', '.join(names) or 'none'}")
    for name in of_split:
        people, whole = defaultdict(list), find(truths, f"{name}_gt_whole.txt")[0]  # _gt.txt has no classes
        for path in (whole, *truths.glob(f"{name}_gt_ignore.txt")):  # sorted by target, not by frame
            for place, line in text_lines(path):
                with reading(path, place):
                    frame, _, *box, _, _, category = map(int, line.split(","))
                    if path == whole and category not in (1, 2, 3):
                        raise ValueError(f"category {category}: the form of *_gt_whole.txt has 1, 2 or 3")
                    check_rows("boxes", [box], 4)
                    people[frame].append((path == whole, box))
        files = (images / name).glob("img" + 6 * "[0-9]" + ".jpg")  # frames without a box, too
        for frame in sorted({int(file.stem[3:]) for file in files} | people.keys())[::stride]:
            yield images / name / f"img{frame:06d}.jpg", detection(target, people[frame])


def coco(root: Path, split: Literal["train", "val", "test"] = None, target: str = None,
         category: str = "person", annotations: Path = None, image_folder: Path = None):
    """`annotations/instances_<split>2017.json` with images in `<split>2017`, or any file in its form.

    Without --split, `annotations` names the file, and images are in ROOT; `image_folder` names another folder
    of images. The targets are one `category`, which may be called `target`; "all" writes a line for each
    class that an image has, and one for a class that it has not. `iscrowd` and `ignore` mark ignore regions.
    """
    if not (split or annotations) or target and category == "all":
        raise SystemExit("coco needs --split or --annotations, and no --target beside --category all")
    path = annotations or find(root, f"annotations/instances_{split}2017.json")[0]
    folder = image_folder or (find(root, f"{split}2017")[0] if split else root)
    with reading(path):
        data = json.loads(path.read_bytes())
        for key in ("id", "file_name"):  # listed twice, each would have a part of the boxes
            for value, times in Counter(image[key] for image in data["images"]).items():
                if times > 1:
                    raise ValueError(f"{times} images have the {key} {value!r}")
        people = {image["id"]: defaultdict(list) for image in data["images"]}
        classes = {entry["id"]: check_text(entry["name"]) for entry in data["categories"]}
        images = sorted((image["id"], folder / image["file_name"], (image.get("width"), image.get("height")))
                        for image in data["images"])
        entries = list(data["annotations"])
    names = list(dict.fromkeys(classes.values()))  # two ids of one name are one class
    if category not in ("all", *names):
        raise SystemExit(f"{path} has no category {category!r}, but " + ", ".join(map(repr, names)))
    for number, entry in enumerate(entries, 1):
        with reading(path, f"annotation {number}"):
            if entry["image_id"] not in people:
                yield None, None
                continue
            check_rows("bbox", [entry["bbox"]], 4)
            is_target = not (entry.get("iscrowd") or entry.get("ignore"))
            people[entry["image_id"]][classes[entry["category_id"]]].append((is_target, entry["bbox"]))
    if entries and not any(people.values()):
        raise SystemExit(f"{path}: no annotation refers to an image that is listed")
    for number, image, size in images:
        truths, asked = people[number], [category]
        if category == "all":  # what it has, and one class that it has not: to invent a box of it must cost
            absent = [name for name in names if name not in truths]
            drawn = random.Random(str(number)).sample(absent, min(1, len(absent)))
            asked = [name for name in names if name in truths] + drawn
        for name in asked:
            yield image, {"size": size, **detection(target or name, truths.get(name, []))}


class PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers only: a pickle that names a class or function could run any code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, and plain data needs no class")


def refcoco(root: Path, split: Literal["train", "val", "test", "testA", "testB"], image_folder: Path = None):
    """RefCOCO, RefCOCO+, RefCOCOg, a phrase per line: ROOT is a file `refs(*).p`, beside `instances.json`.

    Its images, COCO's of train2014, are the files of `image_folder` (default: `train2014` beside ROOT).
    """
    instances = find(root.parent, "instances.json")[0]
    folder = image_folder or find(root.parent, "train2014")[0]
    with reading(root), open(root, "rb") as file:
        entries = PlainUnpickler(file, encoding="latin1").load()
        entries = [entry for entry in entries if entry["split"] == split]
        entries.sort(key=lambda entry: entry["image_id"])  # so that an image is opened once
    with reading(instances):
        data = json.loads(instances.read_bytes())
        images = {entry["id"]: entry["file_name"] for entry in data["images"]}
        boxes = {entry["id"]: entry["bbox"] for entry in data["annotations"]}
    for entry in entries:
        with reading(root, f"reference {entry.get('ref_id')}"):
            if entry["image_id"] not in images:
                yield None, None
                continue
            image, truth = folder / images[entry["image_id"]], [(True, boxes[entry["ann_id"]])]
            for sentence in entry["sentences"]:
                fields = detection(sentence["sent"], truth)
                yield image, {"task": "grounding", "target": fields["target"], "boxes": fields["boxes"]}


def pixmo_count(root: Path, image_folder: Path = None):
    """PixMo-Count as JSON lines, {"image" or "image_sha256", "count", "points", "label"}, points in pixels.

    Images are in `image_folder` (default: beside ROOT): `image` is a path there, `image_sha256` a name with
    any suffix. (PixMo-Points, another data set, is in percent of the image: scale it first.)
    """
    folder = image_folder or root.parent
    downloads = {path.stem: path.name for path in folder.glob("*")}
    for place, entry in text_lines(root, json_object):
        with reading(root, place):
            points, number = entry.get("points") or [], entry["count"]
            if isinstance(points, dict):  # a pair of lists, as published
                points = [{"x": x, "y": y} for x, y in zip(points["x"], points["y"], strict=True)]
            check_count(number, points or None)
            points = check_rows("points", [[point["x"], point["y"]] for point in points], 2).tolist()
            # Of val and test only the count is published.
            truth = {"count": number} if number and not points else {"points": points}
            image = entry.get("image") or downloads.get(entry["image_sha256"], entry["image_sha256"])
            yield folder / image, {"task": "counting", "target": check_text(entry["label"]), **truth}


def ocr(root: Path, image_folder: Path = None):
    """Pages of text: `[{"image": path, "conversations": [{"from": "gpt", "value": the text}, ...]}]`, paths
    from `image_folder` (default: beside ROOT)."""
    with reading(root):
        entries = list(json.loads(root.read_bytes()))
    for number, entry in enumerate(entries, 1):
        with reading(root, f"entry {number}"):
            (text,) = [turn["value"] for turn in entry["conversations"] if turn["from"] == "gpt"]
            image = (image_folder or root.parent) / entry["image"]
            yield image, {"task": "ocr", "target": "text", "transcript": check_text(text)}


# ------------------------------------------------------------------------------------------------------------
# From annotations to the JSONL, and the command line: a command per function, an option per parameter


def fitted(actual, size=(None, None), **fields):
    """A line from its fields, fitted to the image of `actual` (width, height). ValueError says why it is left
    out, as where its annotation states another `size`."""
    if all(size) and size != actual:
        raise ValueError("the image has {} x {} pixels, the annotation {!r} x {!r}".format(*actual, *size))
    for name in sorted({"boxes", "ignore"} & fields.keys()):
        # Many boxes run beyond the image: cut there. Those without area inside are dropped.
        rows = np.reshape(fields[name], (-1, 4)).astype(float).round(4).clip(0, actual * 2)
        rows = rows[(rows[:, 2:] > rows[:, :2]).all(axis=1)].tolist()
        fields[name] = check_rows(name, rows, 4, *actual).tolist()
    if "points" in fields:
        fields["points"] = check_rows("points", fields["points"], 2, *actual).tolist()
    if fields.get("task") == "grounding" and not fields["boxes"]:
        raise ValueError("the box of the phrase has no area inside the image")
    return {"width": actual[0], "height": actual[1], **fields}


def fitted_to_image(questions):
    """Decode an image, once, and fit what is asked about it: [(image, fields), ...] -> [(image, fields, line,
    or the error why it is left out), ...]."""
    lines, image_size = [], functools.cache(lambda image: open_image(image).size)
    for image, fields in questions:
        try:
            line = fitted(image_size(image), **fields) if image else None
        except (OSError, ValueError) as error:
            line = error
        lines.append((image, fields, line))
    return lines


def convert(annotations, out: Path, max_boxes: count = None, draw: count = 0):
    """Write the JSONL `out`, which refers to the images, and count what is left out.

    An image with more than `max_boxes` (40 for train, else no limit) is left out whole: with some of its
    boxes cut, right answers would be punished. So is an image that does not open, or that contradicts its
    annotation. What cannot be read ends the conversion. `draw` N saves N images with their boxes.
    """
    counts, crowds, folder = Counter(), [], out.parent.resolve()  # links would mislead ".." in a path
    groups = itertools.groupby(annotations, key=lambda annotation: annotation[0])
    lines = on_every_core(fitted_to_image, (list(group) for _, group in groups))
    with written_whole(out) as file:
        for image, fields, line in itertools.chain.from_iterable(tqdm(lines, "converting", unit=" images")):
            if image is None:
                counts["left out: annotations of images that are not listed"] += 1
            elif isinstance(line, Exception):
                unreadable = isinstance(line, OSError)
                why = "unreadable images" if unreadable else "lines that contradict their image"
                counts[f"left out: {why}"] += 1
                tqdm.write(f"left out: {image}: {line}", file=sys.stderr)
            elif max_boxes and len(line.get("boxes", [])) > max_boxes:
                counts[f"left out: images with more than {max_boxes} boxes"] += 1
            else:
                file.write(json.dumps({"image": os.path.relpath(image, folder), **line}) + "\n")
                counts.update({name: len(line.get(name, [])) for name in ("boxes", "ignore", "points")})
                crowds.append(len(line.get("boxes", [])))
                without_area = len(fields.get("boxes", [])) - crowds[-1]
                counts["left out: boxes without area inside their image"] += without_area
        if not crowds:
            reasons = ", ".join(f"{number} {name}" for name, number in counts.items())
            raise SystemExit(f"nothing converted, {out} not written: {reasons or 'nothing is annotated'}")
    print(f"{out}: {len(crowds):,} lines, boxes per line: median {np.median(crowds):g}, max {max(crowds)}")
    for name, number in (+counts).items():  # those above 0
        print(f"{number:>10,}  {name}")
    records = read_jsonl(out, dict) if draw else []
    for k, record in enumerate(random.Random(0).sample(records, min(draw, len(records)))):
        path, orange = out.with_name(f"{out.stem}-{k}.png"), (255, 140, 0)
        picture = open_image(out.parent / record["image"])
        for name, color in ("ignore", (150, 150, 150)), ("boxes", orange), ("points", orange):
            draw_rows(picture, record.get(name, []), color, line=max(1, picture.width // 300))
        picture.save(path)
        print(path)


def main(argv=None):
    """Read the command line and do what it says. A parameter's annotation is the type of its option, or
    Literal for a choice; without one it has no option. A source has `convert`'s options, too."""
    sources = crowdhuman, citypersons, widerpedestrian, uavdt, coco, refcoco, pixmo_count, ocr
    raw = argparse.RawDescriptionHelpFormatter  # docstrings as they are
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True)
    for function in (synthetic, tiny, *sources):
        called = (function, convert) if function in sources else (function,)
        about = "\n\n".join(map(inspect.getdoc, called))
        command = commands.add_parser(function.__name__, help=about.split("\n\n")[0], description=about,
                                      formatter_class=raw, allow_abbrev=False)
        command.set_defaults(function=function)
        options = itertools.chain(*(inspect.signature(call).parameters.items() for call in called))
        for name, parameter in options:
            kind, default = parameter.annotation, parameter.default
            required = default is parameter.empty
            if name == "root":
                command.add_argument(name, type=kind)
            elif kind is not parameter.empty:
                how = {"choices": get_args(kind)} if get_args(kind) else {"type": kind}
                shown = "required" if required else f"default: {'see above' if default is None else default}"
                command.add_argument(f"--{name}", default=default, required=required, help=shown, **how)
    args = vars(parser.parse_args(argv))
    function, out = args.pop("function"), args["out"]
    own = {name: args.pop(name) for name in inspect.signature(function).parameters if name in args}
    try:
        made = function(**own)
        if function in sources:
            read = [value.resolve() for value in own.values() if isinstance(value, Path)]
            if out.is_dir() or out.resolve() in read or out.exists() and out.suffix != ".jsonl":
                raise SystemExit(f"--out {out} is a folder or a file to read; only a .jsonl is replaced")
            if own.get("split") == "train" and not args["max_boxes"]:
                args["max_boxes"] = 40  # a box costs some 21 tokens, and a completion has 1,280
            convert(made, **args)
    except (OSError, ValueError, BrokenExecutor) as error:  # reading has its own messages
        raise SystemExit(f"{out}: {error}") from None


if __name__ == "__main__":
    main()
