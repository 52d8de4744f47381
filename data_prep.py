"""Prepares all that dipr1.py reads: scenes, a tiny checkpoint, and real annotations as one JSONL.

    python data_prep.py synthetic --out data/synthetic --images 2000          crowds drawn by Pillow
    python data_prep.py tiny --out data/tiny                                  a random Qwen2.5-VL, 1M
    python data_prep.py crowdhuman CROWDHUMAN --split train --out data/train.jsonl --draw 4
    python data_prep.py --help                                                all sources

One line of the JSONL is one image, in pixels of the original image, boxes as x1, y1, x2, y2:

    {"image": path relative to the file, "width": W, "height": H, "target": "person",
     "boxes": [[x1, y1, x2, y2], ...], "ignore": [...]}

In an `ignore` region an unmatched detection is neither right nor wrong (a crowd too dense to annotate).
"labels" and "ignore_labels" name the classes where there are several. Perception-R1's other tasks name their
"task": "grounding" has one box, "counting" has "points" or only a "count", "ocr" has a "transcript".
Files in one folder may be concatenated: each line has its own target.
"""
import argparse
import colorsys
import contextlib
import functools
import hashlib
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

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps
from scipy.io import loadmat
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Files: what enters or leaves is checked here, and an error says where it is

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


def text_lines(path):
    """Yield ("line N", text) of a file, without blank lines; one line in memory at a time."""
    with reading(path), open(path, "rb") as file:  # bytes: a line ends at a line feed, at no other separator
        for number, line in enumerate(file, 1):
            with reading(path, f"line {number}"):
                line = line.decode("utf-8-sig").strip()  # without a byte order mark
            if line:
                yield f"line {number}", line


def json_entries(path):
    """Yield ("line N", object) of JSON lines, or ("entry N", object) of a file that is one JSON list."""
    is_list = next(text_lines(path), ("", ""))[1].startswith("[")
    with reading(path):
        listed = enumerate(json.loads(Path(path).read_bytes()), 1) if is_list else ()
    for place, value in ((f"entry {k}", value) for k, value in listed) if is_list else text_lines(path):
        with reading(path, place):
            value = value if is_list else json.loads(value)
            if not isinstance(value, dict):
                raise ValueError(f"a JSON object is expected, not {value!r:.40}")
        yield place, value


def read_jsonl(path, check):
    """Read JSON lines -> [check(object), ...]. SystemExit names a line that is malformed or that fails."""
    checked = []
    for place, entry in json_entries(path):
        with reading(path, place):
            checked.append(check(entry))
    return checked


def count(number):
    """A whole number of at least 1, from the command line."""
    if int(number) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return int(number)


def as_text(value):
    """A non-empty string, without surrounding space; ValueError for everything else."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"a text is expected, not {value!r:.40}")
    value.encode()  # ValueError for half a surrogate pair, which no tokenizer can encode
    return value.strip()


def check_rows(name, rows, k, width=None, height=None):
    """Check that each row has k numbers below 10^6 -> (n, k) array. ValueError names the first at fault.

    With the size of an image, rows are boxes (k = 4) or points (k = 2) in its pixels: boxes have x1 < x2 and
    y1 < y2, and a pixel of overhang, as rounding causes it, is clipped.
    """
    def require(good, why):
        for number, (row, is_good) in enumerate(zip(rows, good), 1):
            if not is_good:
                raise ValueError(f"{name}, row {number}: {row!r:.80} {why}")

    if not isinstance(rows, (list, tuple)):
        raise ValueError(f"{name} must be a list of rows, not {rows!r:.80}")
    require((isinstance(row, (list, tuple)) and len(row) == k
             and all(type(v) in (int, float) and abs(v) < 1e6 for v in row)  # no NaN, no True
             for row in rows), f"is not {k} numbers below a million")
    table = np.array(rows, float).reshape(-1, k)
    if width is None:
        return table
    pixels, inside = f"the {width} x {height} pixels of the image", table.clip(0, [width, height] * (k // 2))
    require((abs(table - inside) <= 1).all(axis=1), f"is outside {pixels}")
    require((inside[:, 2:] > inside[:, : k - 2]).all(axis=1), "does not have x1 < x2 and y1 < y2")
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


# ------------------------------------------------------------------------------------------------------------
# Images: opened in one way, here and in dipr1.py


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
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def image_size(path, no_verify=False):
    """(width, height) of what `open_image` returns, or its OSError; no_verify: from the header alone."""
    try:
        if not no_verify:
            return open_image(path).size
        with opened(path) as image:
            orientation = None
            with contextlib.suppress(Exception):  # damaged EXIF; PNG's own getexif would decode the image
                orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
            on_its_side = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # whose size is upright
            return image.size[::-1] if on_its_side else image.size
    except OSError as error:
        return error


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


def draw_scene(rng, size, people, scale, overlap, saturation, light):
    """A street with a crowd of one to three clusters, nearer people larger (perspective) -> (image, boxes,
    ignore). Whoever is less than a fifth visible is in `ignore`."""
    scene, horizon = draw_street(rng, size)
    centers = rng.uniform(0.15 * size, 0.85 * size, rng.integers(1, 4))
    figures = []
    for _ in range(rng.integers(people[0], people[1] + 1)):
        sole = int(rng.uniform(horizon + 0.2 * size, size))
        depth = (sole - horizon) / (size - horizon)
        height = int((0.32 + 0.36 * depth) * size * rng.uniform(0.85, 1.1) * scale)
        figure = draw_person(rng, height, saturation)
        left = int(rng.choice(centers) + rng.normal(0, 0.13 * size) - figure.width / 2)
        left, top = min(max(left, 0), size - figure.width), max(sole - figure.height, 0)
        box = [left, top, left + figure.width, top + figure.height]
        if all(iou(box, other) < overlap for _, other, _ in figures):
            figures.append((figure, box, np.array(figure.getchannel("A").point(OPAQUE), bool)))
    figures.sort(key=lambda item: item[1][3])  # back to front
    owner = np.zeros((size, size), int)
    for number, (figure, (x1, y1, x2, y2), outline) in enumerate(figures, 1):
        scene.paste(figure, (x1, y1), figure)
        owner[y1:y2, x1:x2][outline] = number
    boxes, ignore = [], []
    for number, (_, box, outline) in enumerate(figures, 1):
        (boxes if (owner == number).sum() >= 0.2 * outline.sum() else ignore).append(box)
    return Image.blend(scene, Image.new("RGB", scene.size, NIGHT), 1 - light), boxes, ignore


def save_scene(out, seed, number, size, crowd):
    """Draw and save scene `number`, which does not depend on the other scenes -> its record."""
    rng, name = np.random.default_rng([seed, number, list(CROWDS).index(crowd)]), f"images/{number:06d}.png"
    scene, boxes, ignore = draw_scene(rng, size, **CROWDS[crowd])
    scene.save(out / name, compress_level=1)
    about = {"image": name, "width": size, "height": size, "target": "person"}
    return about | {"boxes": boxes, "ignore": ignore}


def synthetic(out: Path, images: count = 2000, seed: int = 0, size: int = 112, val: count = None,
              crowd: tuple(CROWDS) = "sparse"):
    """Draw scenes of a `crowd`, `size` pixels wide and high: val.jsonl has the last `val` (default a tenth),
    train.jsonl the rest."""
    if size < 56:
        raise SystemExit(f"--size {size} is too small for a scene: at least 56 pixels")
    train = images - (max(1, images // 10) if val is None else val)
    if train < 0:
        raise SystemExit(f"--images {images} is too few: val.jsonl takes {val}")
    (out / "images").mkdir(parents=True, exist_ok=True)
    draw = functools.partial(save_scene, out, seed, size=size, crowd=crowd)
    with ProcessPoolExecutor() as pool:
        records = list(tqdm(pool.map(draw, range(images), chunksize=64), "drawing scenes", images))
    for name, part in ("train.jsonl", records[:train]), ("val.jsonl", records[train:]):
        with written_whole(out / name) as file:
            file.writelines(json.dumps(record) + "\n" for record in part)


# ------------------------------------------------------------------------------------------------------------
# A tiny checkpoint: every part of a Qwen2.5-VL folder, at a size that learns on a laptop

QWEN_SPECIAL_TOKENS = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
    <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
    <|image_pad|> <|video_pad|>""".split()


def tiny_tokenizer(size, texts):
    """256 bytes, which write any text, and one token for whatever is written often, such as a number with its
    comma: a box costs 5 tokens (some 21 with the real tokenizer), which makes the demo quick."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=QWEN_SPECIAL_TOKENS, model_max_length=32768)
    fixed = re.split(r"<\|.*?\|>|\{.*?\}", "<|im_end|>".join(texts))  # without special tokens and {target}
    sentences = [sentence for sentence in fixed if len(sentence) > 1]
    tags = [f"<{slash}{name}>" for name in ("think", "look", "answer") for slash in ("", "/")]
    numbers = [f"{number}{comma}" for number in range(size + 1) for comma in ("", ", ")]
    glue = ["[[", "], [", "]]", "[]", "person", " in sight, ", " to look at"]
    tokenizer.add_tokens(sentences + tags + numbers + glue)
    return tokenizer


def smooth_numbers(embeddings, tokenizer, size, rng):
    """Give neighbouring numbers similar embeddings: a random walk, smoothed over a few pixels; a direction of
    their own sets numbers with a comma apart. A pretrained model knows that 41 is close to 42, and the demo
    is too short to learn it."""
    walk = gaussian_filter1d(rng.standard_normal((size + 1, embeddings.shape[1])), sigma=3, axis=0)
    walk *= embeddings.std().item() / walk.std()
    for comma in ("", ", "):
        ids = tokenizer.convert_tokens_to_ids([f"{number}{comma}" for number in range(size + 1)])
        kind = rng.standard_normal(embeddings.shape[1]) * embeddings.std().item()
        embeddings[ids] = 0.3 * embeddings[ids] + embeddings.new_tensor(walk + kind)


def tiny(out: Path, seed: int = 0, size: int = 112, texts=()):
    """Write a random Qwen2.5-VL for images of about `size` x `size` pixels as a complete Hugging Face folder.
    From Python, `texts` are templates of its prompts: each fixed piece of them becomes one token."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    tokenizer = tiny_tokenizer(size, texts)
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
    smooth_numbers(model.get_input_embeddings().weight.data, tokenizer, size, np.random.default_rng(seed))
    model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]  # two, as Qwen's
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    Qwen2VLImageProcessorPil().save_pretrained(out)


# ------------------------------------------------------------------------------------------------------------
# Readers: a function per source yields (image path, fields of its line); its parameters become options


def corners(row):
    """[x, y, width, height] -> [x1, y1, x2, y2]. Coordinates are 0-based: no shift by one."""
    ((x, y, w, h),) = check_rows("box", [row], 4).tolist()
    return [x, y, x + w, y + h]


def detection(target, people):
    """The fields of an image from (is it a target?, [x, y, width, height]) pairs."""
    fields = {"target": target, "boxes": [], "ignore": []}
    for is_target, row in people:
        fields["boxes" if is_target else "ignore"].append(corners(row))
    return fields


def boxes_by_key(paths, parse):
    """{key: boxes} of text files whose lines `parse` turns into (key, boxes)."""
    table = defaultdict(list)
    for path in paths:
        for place, line in text_lines(path):
            with reading(path, place):
                key, boxes = parse(line)
                table[key].extend(boxes)
    return table


def find(root, *names):
    """The first of these paths that exists below `root`; SystemExit says what was expected and where."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise SystemExit(f"{root}: unknown layout, looked there for " + ", or ".join(names))


def image_finder(root, split):
    """A function from an image's name in the annotations to the path below `root` that ends in all of it.

    Folders of another split are passed over: "train", "val" or "test" is a word of their names, as in val2017
    or sur_train (and not in contest).
    """
    root, paths, seen = Path(os.path.abspath(root)), {}, set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        splits = {"train", "val", "test"} & set(re.findall("[a-z]+", os.path.relpath(folder, root).lower()))
        searched = split in splits or not splits
        if (os.path.realpath(folder), searched) in seen:  # a link to where we have been, perhaps a circle
            subfolders.clear()
            continue
        seen.add((os.path.realpath(folder), searched))
        subfolders.sort()
        for name in names if searched else ():
            paths.setdefault(name, []).append(Path(folder, name))

    def locate(name):
        parts = Path(as_text(name).replace("\\", "/")).parts
        exact = root.joinpath(*parts)
        ends = [path for path in paths.get(exact.name, []) if path.parts[-len(parts) :] == parts]
        if len(ends) > 1 and exact not in ends:
            raise SystemExit(f"{name} may be {ends[0]} or {ends[1]}: remove one of them from below {root}")
        return ends[0] if len(ends) == 1 else exact

    return locate


def crowdhuman(root: Path, split: ("train", "val"), target: str = "person"):
    """`annotation_<split>.odgt`, an image per line, beside the folder `Images`.

    The box is `fbox`, the whole person with occluded parts, as the benchmark evaluates it. Tag "mask" and
    extra.ignore mark ignore regions; `head_attr.ignore` concerns heads only.
    """
    path, images = find(root, f"annotation_{split}.odgt"), find(root, "Images")
    for place, entry in json_entries(path):
        with reading(path, place):
            people = [(person["tag"] == "person" and not person.get("extra", {}).get("ignore"),
                       person["fbox"]) for person in entry["gtboxes"]]
            yield images / f"{entry['ID']}.jpg", detection(target, people)


def citypersons(root: Path, split: ("train", "val"), target: str = "pedestrian"):
    """`annotations/anno_<split>.mat` or `gtBboxCityPersons/<split>/*/*.json`, images in `leftImg8bit`.

    As in the standard protocol, the full boxes of pedestrians are the targets; riders, sitting people, groups
    and all else are ignore regions.
    """
    images = find(root, f"leftImg8bit/{split}")
    path = find(root, f"annotations/anno_{split}.mat", f"gtBboxCityPersons/{split}")
    for file in sorted(path.glob("*/*_gtBboxCityPersons.json")):
        with reading(file):
            data = json.loads(file.read_bytes())
            people = [(entry["label"] == "pedestrian", entry["bbox"]) for entry in data["objects"]]
            image = images / file.parent.name / file.name.replace("gtBboxCityPersons.json", "leftImg8bit.png")
            size = data.get("imgWidth"), data.get("imgHeight")
            yield image, {**detection(target, people), "size": size}
    if path.is_dir():
        return
    with reading(path):
        cells = loadmat(path)[f"anno_{split}_aligned"][0]
    for number, cell in enumerate(cells, 1):
        with reading(path, f"image {number}"):
            city, name, rows = (np.ravel(cell)[0][part] for part in ("cityname", "im_name", "bbs"))
            # As Python's integers: in the file's own type, often uint8, 200 + 100 would be 44.
            people = [(row[0] == 1, row[1:5]) for row in rows.reshape(-1, 10).tolist()]
            yield images / city.item() / name.item(), detection(target, people)


def wider_line(line, columns=None):
    """`imgNNNNN.jpg (c x y w h)*` of 2018 or `surNNNNN.jpg (x y w h)*` of 2019 -> (name, boxes).

    Twenty numbers may be four boxes or five: the name's prefix decides. A bare name is an empty image.
    """
    name, *numbers = line.split()
    prefix = re.match("img|sur|ad", name)
    if prefix is None:
        raise ValueError(f"{name!r} is an image neither of 2018 (img...) nor of 2019 (sur..., ad...)")
    columns = columns or (5 if prefix[0] == "img" else 4)
    if len(numbers) % columns:
        raise ValueError(f"{len(numbers)} numbers after {name}, where every box has {columns}")
    rows = np.reshape([float(number) for number in numbers], (-1, columns)).tolist()
    if columns == 5 and any(row[0] not in (1, 2) for row in rows):
        raise ValueError("a class that is neither 1 (pedestrian) nor 2 (cyclist)")
    return name, [corners(row[-4:]) for row in rows]


def widerpedestrian(root: Path, split: ("train", "val"), target: str = "person"):
    """`<split>_annotations.txt` of 2018 or `Annotations/<split>_bbox.txt` of 2019, images anywhere below.

    Pedestrians and cyclists are merged. A split's files beside it, named `*ignore*`, hold its ignore regions.
    """
    path = find(root, f"{split}_annotations.txt", f"Annotations/{split}_bbox.txt", f"{split}_bbox.txt")
    beside = [file for file in path.parent.glob(f"*{split}*.txt") if "ignore" in file.name]
    ignore = boxes_by_key(beside, functools.partial(wider_line, columns=4))
    locate = image_finder(root, split)
    for name, boxes in boxes_by_key([path], wider_line).items():
        yield locate(name), {"target": target, "boxes": boxes, "ignore": ignore[name]}


UAVDT_TEST = """M0203 M0205 M0208 M0209 M0403 M0601 M0602 M0606 M0701 M0801 M0802 M1001 M1004 M1007 M1009
    M1101 M1301 M1302 M1303 M1401""".split()  # the other sequences are for training


def uavdt(root: Path, split: ("train", "test"), target: str = "vehicle", stride: count = 1):
    """Sequences `UAV-benchmark-M/M0101/img000001.jpg` with `GT/M0101_gt_whole.txt` and `_gt_ignore.txt`.

    Cars, trucks and buses are one class. `stride` N takes every N-th frame: neighbours are nearly the same.
    """
    def parse(categories, line):  # lines are sorted by the target, not by the frame
        frame, _, *box, _, _, category = map(int, line.split(","))
        if category not in categories:
            raise ValueError(f"category {category}: the form of *_gt_whole.txt is needed, with 1, 2 or 3")
        return frame, [corners(box)]

    images, truths = find(root, "UAV-benchmark-M"), find(root, "GT", "UAV-benchmark-MOTD_v1.0/GT")
    names = {path.name.split("_")[0] for folder in (images, truths) for path in folder.glob("M*")}
    for name in sorted(name for name in names if (name in UAVDT_TEST) == (split == "test")):
        whole = find(truths, f"{name}_gt_whole.txt")  # and not _gt.txt, which has no classes
        boxes = boxes_by_key([whole], functools.partial(parse, (1, 2, 3)))
        ignore = boxes_by_key(truths.glob(f"{name}_gt_ignore.txt"), functools.partial(parse, (-1,)))
        files = (images / name).glob("img" + 6 * "[0-9]" + ".jpg")  # frames without a box, too
        for frame in sorted({int(file.stem[3:]) for file in files} | boxes.keys())[::stride]:
            fields = {"target": target, "boxes": boxes[frame], "ignore": ignore[frame]}
            yield images / name / f"img{frame:06d}.jpg", fields


def by_id(entries):
    """{id: entry}. Two different entries of one id are an error: one would be lost."""
    table = {}
    for entry in entries:
        if table.setdefault(entry["id"], entry) != entry:
            raise ValueError(f"two entries have the id {entry['id']!r}")
    return table


def coco(root: Path, split: ("train", "val", "test"), target: str = None, category: str = "person",
         annotations: Path = None):
    """`annotations/instances_<split>2017.json`, or `annotations` in its form, with images anywhere below.

    The targets are one `category`, or "all" of them with a label for each box. `iscrowd` and `ignore` mark
    ignore regions. Images without a box stay in. Folders of another split are not searched: for a val file
    whose images lie in a folder `train`, name that folder as ROOT.
    """
    path = annotations or find(root, f"annotations/instances_{split}2017.json")
    with reading(path):
        data = json.loads(path.read_bytes())
        images = dict(sorted(by_id(data["images"]).items()))  # in the order of the official toolkit
        entries = list(data["annotations"])
        listed = Counter(entry.get("file_name") for entry in images.values())
        names = {number: as_text(entry["name"]) for number, entry in by_id(data["categories"]).items()}
    wanted = [name for name in dict.fromkeys(names.values()) if category in (name, "all")]
    if not wanted:
        raise SystemExit(f"{path} has no category {category!r}, but " + ", ".join(map(repr, names.values())))
    kinds = ("boxes", "ignore", "labels", "ignore_labels")[: 4 if category == "all" else 2]
    truths = {number: {kind: [] for kind in kinds} for number in images}
    for number, entry in enumerate(entries, 1):
        with reading(path, f"annotation {number}"):
            fields = truths.setdefault(entry["image_id"], {kind: [] for kind in kinds})
        try:
            label, ignored = names[entry["category_id"]], entry.get("iscrowd") or entry.get("ignore")
            if label in wanted:
                fields["ignore" if ignored else "boxes"].append(corners(entry["bbox"]))
                fields.get("ignore_labels" if ignored else "labels", []).append(label)
        except Exception as error:
            fields["fault"] = f"annotation {number}: {reason(error)}"
    if entries and not images.keys() & {entry["image_id"] for entry in entries}:
        raise SystemExit(f"{path}: no annotation refers to an image that is listed")
    for number in (number for number in truths if number not in images):
        yield path, {"fault": f"it annotates image {number!r}, which is not listed"}
    locate = image_finder(root, split)
    for number, entry in images.items():
        with reading(path, f"image {number}"):
            image, size = locate(entry["file_name"]), (entry.get("width"), entry.get("height"))
            if listed[entry["file_name"]] > 1:  # each would have a part of the boxes
                truths[number]["fault"] = f"listed {listed[entry['file_name']]} times, under different ids"
        yield image, {"target": target or ", ".join(wanted), "size": size, **truths[number]}


class PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers only: a pickle that names a class or function could run any code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, and plain data needs no class")


def refcoco_refs(path, split, image_folder):
    """A file `refs(*).p`, with `instances.json` beside it and COCO's images anywhere below."""
    instances = find(path.parent, "instances.json")
    with reading(path), open(path, "rb") as file:
        entries = PlainUnpickler(file, encoding="latin1").load()
        entries = [entry for entry in entries if entry["split"] == split]
    with reading(instances):
        data = json.loads(instances.read_bytes())
        images, annotations = by_id(data["images"]), by_id(data["annotations"])
    locate = image_finder(image_folder or path.parent, "train")  # all of its images are from train2014
    for entry in entries:
        with reading(path, f"reference {entry.get('ref_id')}"):
            image = locate(images[entry["image_id"]]["file_name"])
            box = corners(annotations[entry["ann_id"]]["bbox"])
            phrases = [as_text(sentence["sent"]) for sentence in entry["sentences"]]
        for phrase in phrases:
            yield image, {"task": "grounding", "target": phrase, "boxes": [box]}


@functools.cache
def files_by_hash(folder):
    """{sha256 of the content: path} of the files below `folder`."""
    table = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        with reading(path), open(path, "rb") as file:
            table[hashlib.file_digest(file, "sha256").hexdigest()] = path
    return table


def image_of(entry, path, image_folder):
    """The image of an entry of the list `path`: by name, or by `image_sha256` where only a URL is given."""
    if "image" in entry:
        return (image_folder or path.parent) / as_text(entry["image"])
    if not image_folder:
        raise ValueError("it has no image: for image_url, --image_folder says where the downloads are")
    digest = as_text(entry["image_sha256"])
    return files_by_hash(image_folder).get(digest, image_folder / digest)


def said_by(speaker, entry):
    """What the only turn of this speaker says in a conversation."""
    (text,) = [turn["value"] for turn in entry["conversations"] if turn["from"] == speaker]
    return text


def refcoco_list(path, image_folder, scale):
    """JSON lines or a JSON list, as Perception-R1 and VLM-R1 have it."""
    for place, entry in json_entries(path):
        with reading(path, place):
            phrase = entry.get("normal_caption") or entry.get("problem") or said_by("human", entry)
            phrase = phrase.rpartition("sentence describes:")[2]  # of VLM-R1
            phrase = phrase.replace("<image>", "").strip(" \n.")
            answer = entry["solution"] if "solution" in entry else said_by("gpt", entry)
            # The box is a list or the only one in a text: {"bbox_2d": [1, 2, 3, 4]}, <answer>[1, 2]</answer>.
            boxes = re.findall(r"\[[^][]*\]", answer if isinstance(answer, str) else json.dumps(answer))
            if len(boxes) != 1:
                raise ValueError(f"one box is expected, not {answer!r:.80}")
            boxes = check_rows("box", [json.loads(boxes[0])], 4).tolist()
            fields = {"task": "grounding", "target": as_text(phrase), "boxes": boxes, "scale": scale}
            yield image_of(entry, path, image_folder), fields


def refcoco(root: Path, split: ("train", "val", "test", "testA", "testB") = None, image_folder: Path = None,
            scale: count = None):
    """RefCOCO, RefCOCO+, RefCOCOg, a phrase per line: `refs(*).p`, its folder, or a list as VLM-R1 has it.

    Images of `refs(*).p` are looked for below its folder, or below `image_folder`. A list is in pixels, or
    goes from 0 to `scale` (Perception-R1: 1000); its paths start in `image_folder`.
    """
    found = sorted(root.glob("refs(*).p")) if root.is_dir() else [root]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise SystemExit(f"{root}: one file refs(*).p is needed, found {names}; name it as ROOT")
    is_list = found[0].suffix != ".p"
    if is_list == bool(split) or scale and not is_list:
        raise SystemExit(f"{root}: refs(*).p needs --split and no --scale; a list of one split, no --split")
    questions = (refcoco_list(root, image_folder, scale) if is_list else
                 refcoco_refs(found[0], split, image_folder))
    return sorted(questions, key=lambda question: question[0])  # so that an image is opened once


def pixmo_count(root: Path, image_folder: Path = None):
    """PixMo-Count as JSON lines, {"image" or "image_url", "count", "points", "label"}, points in pixels.

    Files in `image_folder` may have any name: they are known by their `image_sha256`. (PixMo-Points, another
    data set, is in percent of the image: scale it first.)
    """
    for place, entry in json_entries(root):
        with reading(root, place):
            points, number = entry.get("points") or [], entry["count"]
            if isinstance(points, dict):  # a pair of lists, as published
                points = [{"x": x, "y": y} for x, y in zip(points["x"], points["y"], strict=True)]
            check_count(number, points or None)
            points = check_rows("points", [[point["x"], point["y"]] for point in points], 2).tolist()
            # Of val and test only the count is published.
            truth = {"count": number} if number and not points else {"points": points}
            fields = {"task": "counting", "target": as_text(entry["label"]), **truth}
            yield image_of(entry, root, image_folder), fields


def ocr(root: Path, image_folder: Path = None):
    """Pages of text: `[{"image": path, "conversations": [{"from": "gpt", "value": the text}, ...]}]`."""
    for place, entry in json_entries(root):
        with reading(root, place):
            fields = {"task": "ocr", "target": "text", "transcript": as_text(said_by("gpt", entry))}
            yield image_of(entry, root, image_folder), fields


# ------------------------------------------------------------------------------------------------------------
# From annotations to the JSONL

MAX_BOXES = 40  # of an image to train on: a box costs some 21 tokens, and a completion has 1,280


def measured(annotations, no_verify):
    """Yield (image, fields, size or OSError) in order. Every core opens images, a block at a time, so that
    memory stays small; an image with several questions in a block is opened once."""
    annotations = iter(annotations)
    with ProcessPoolExecutor() as pool:
        while block := list(itertools.islice(annotations, 256)):
            images = list(dict.fromkeys(image for image, _ in block))
            sizes = dict(zip(images, pool.map(image_size, images, itertools.repeat(no_verify), chunksize=8)))
            yield from ((image, fields, sizes[image]) for image, fields in block)


def fitted(fields, size):
    """The fields of a line, fitted to the image. OSError or ValueError says why the line is left out."""
    if "fault" in fields:
        raise ValueError(fields["fault"])
    if isinstance(size, OSError):
        raise size
    fields = dict(fields)
    stated, scale = fields.pop("size", size), fields.pop("scale", None)
    if all(stated) and stated != size:
        raise ValueError("the image has {} x {} pixels, the annotation {!r} x {!r}".format(*size, *stated))
    if scale:
        fields["boxes"] = (np.multiply(fields["boxes"], size * 2) / scale).tolist()
    for name, labels in (("boxes", "labels"), ("ignore", "ignore_labels")) if "ignore" in fields else ():
        # Detection. Many boxes run beyond the image: cut there. Those without area inside are dropped.
        rows = np.reshape(fields[name], (-1, 4)).astype(float).round(4).clip(0, size * 2)
        stays = (rows[:, 2:] > rows[:, :2]).all(axis=1)
        fields[name] = rows[stays].tolist()
        if labels in fields:
            fields[labels] = list(itertools.compress(fields[labels], stays))
    for name, k in ("boxes", 4), ("ignore", 4), ("points", 2):
        if name in fields:
            fields[name] = check_rows(name, fields[name], k, *size).tolist()
    return {"width": size[0], "height": size[1], **fields}


def convert(annotations, out: Path, max_boxes: count = None, no_verify: bool = False, draw: count = 0):
    """Write the JSONL `out`, which refers to the images, and count what is left out.

    An image with more than `max_boxes` (40 for train, else no limit) is left out whole: with some of its
    boxes cut, right answers would be punished. For that reason a faulty annotation, too, leaves out its
    image. A line that cannot be read ends the conversion, except in COCO's form. Images are decoded, unless
    `no_verify`: headers only. `draw` N saves N of them with their boxes.
    """
    counts, crowds, folder = Counter(), [], out.parent.resolve()  # links would mislead ".." in a path
    with written_whole(out) as file:
        for image, fields, size in tqdm(measured(annotations, no_verify), "converting", unit=" lines"):
            annotated = len(fields.get("boxes", []))
            try:
                fields = fitted(fields, size)
            except (OSError, ValueError) as error:
                if fields.get("scale", 1) is None and "is outside" in str(error):  # the unit is unknown
                    raise SystemExit(f"{image}: {error}; --scale N if the list goes from 0 to N") from None
                counts[f"left out: {'unreadable images' if error is size else 'faulty annotations'}"] += 1
                tqdm.write(f"left out: {image}: {error}", file=sys.stderr)
                continue
            boxes = len(fields.get("boxes", []))
            if max_boxes and boxes > max_boxes:
                counts[f"left out: images with more than {max_boxes} boxes"] += 1
                continue
            file.write(json.dumps({"image": os.path.relpath(image, folder), **fields}) + "\n")
            counts.update({name: len(fields.get(name, [])) for name in ("boxes", "ignore", "points")})
            counts["left out: boxes without area inside their image"] += annotated - boxes
            crowds.append(boxes)
        if not crowds:
            reasons = ", ".join(f"{number} {name}" for name, number in counts.items())
            raise SystemExit(f"nothing converted, {out} not written: {reasons or 'nothing is annotated'}")
    print(f"{out}: {len(crowds):,} lines, boxes per line: median {np.median(crowds):g}, max {max(crowds)}")
    for name, number in (+counts).items():  # those above 0
        print(f"{number:>10,}  {name}")
    draw_records(out, draw)


def draw_rows(picture, rows, color, line):
    """Outline boxes (x1, y1, x2, y2) that have an area, or circle points (x, y), on a picture."""
    pen = ImageDraw.Draw(picture)
    for row in map(tuple, rows):
        if len(row) == 2:
            pen.circle(row, 2 * line, outline=color, width=line)
        elif row[0] < row[2] and row[1] < row[3]:
            pen.rectangle(row, outline=color, width=line)


def draw_records(out, number):
    """Save pictures of records drawn at random: boxes and points orange, ignore regions grey."""
    records = read_jsonl(out, dict) if number else []
    for k, record in enumerate(random.Random(0).sample(records, min(number, len(records)))):
        path, orange = out.with_name(f"{out.stem}-{k}.png"), (255, 140, 0)
        with reading(out.parent / record["image"]):
            picture = open_image(out.parent / record["image"])
        for name, color in ("ignore", (150, 150, 150)), ("boxes", orange), ("points", orange):
            draw_rows(picture, record.get(name, []), color, line=max(1, picture.width // 300))
        picture.save(path)
        print(path)


# ------------------------------------------------------------------------------------------------------------
# The command line: a command per function, an option per parameter

SOURCES = crowdhuman, citypersons, widerpedestrian, uavdt, coco, refcoco, pixmo_count, ocr


def add_command(commands, function):
    """The command that calls `function`, described by its docstring; a source has `convert`'s options too."""
    called = (function, convert) if function in SOURCES else (function,)
    about = "\n\n".join(map(inspect.getdoc, called))
    command = commands.add_parser(function.__name__, help=about.split("\n\n")[0], description=about,
                                  formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    command.set_defaults(function=function)
    for name, parameter in itertools.chain(*(inspect.signature(call).parameters.items() for call in called)):
        kind, default = parameter.annotation, parameter.default
        if name == "root":
            command.add_argument(name, type=kind)
        elif kind is bool:
            command.add_argument(f"--{name}", action="store_true")
        elif kind is not parameter.empty:  # a type, or a tuple of choices
            how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            command.add_argument(f"--{name}", default=default, required=default is parameter.empty, **how)


def main(argv=None):
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (synthetic, tiny, *SOURCES):
        add_command(commands, function)
    args = vars(parser.parse_args(argv))
    function, out = args.pop("function"), args["out"]
    own = {name: args.pop(name) for name in inspect.signature(function).parameters if name in args}
    try:
        made = function(**own)
        if function in SOURCES:
            read = [value.resolve() for value in own.values() if isinstance(value, Path)]
            if out.is_dir() or out.resolve() in read or out.exists() and out.suffix != ".jsonl":
                raise SystemExit(f"--out {out} is a folder or a file to read; only a .jsonl is replaced")
            if own.get("split") == "train" and not args["max_boxes"]:
                args["max_boxes"] = MAX_BOXES
            convert(made, **args)
    except (OSError, ValueError, BrokenExecutor) as error:  # reading has its own messages
        raise SystemExit(f"{out}: {error}") from None


if __name__ == "__main__":
    main()
