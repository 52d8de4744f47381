"""Everything that dipr1.py reads, made here: scenes, a tiny checkpoint, and real annotations as one JSONL.

    python data_prep.py synthetic --out data/synthetic --images 2000 --seed 0      crowds drawn by Pillow
    python data_prep.py tiny --out data/tiny                                       a random Qwen2.5-VL, 1M
    python data_prep.py crowdhuman CROWDHUMAN --split train --out data/train.jsonl
    python data_prep.py citypersons CITYSCAPES --split train --out data/citypersons.jsonl
    python data_prep.py widerpedestrian WIDER --split train --out data/wider.jsonl
    python data_prep.py uavdt UAVDT --split train --stride 10 --out data/uavdt.jsonl
    python data_prep.py coco COCO --split train --category person --out data/coco.jsonl
    python data_prep.py refcoco REFCOCO --split train --out data/refcoco.jsonl     for Perception-R1: a phrase
    python data_prep.py pixmo_count FILE.jsonl --out data/count.jsonl              a point on each
    python data_prep.py ocr FILE.json --out data/ocr.jsonl                         a page

One line of the JSONL is one image, in pixels of the original image, boxes as x1, y1, x2, y2:

    {"image": path relative to the file, "width": W, "height": H, "target": "person",
     "boxes": [[x1, y1, x2, y2], ...], "ignore": [...]}

`ignore` holds regions in which an unmatched detection is neither right nor wrong (a crowd too dense to
annotate). Such files may be concatenated if they lie in one folder: each line has its own target. Other tasks
than detection are named: "task" "grounding" has one box, "counting" has "points", "ocr" a "transcript".
"""
import argparse
import colorsys
import contextlib
import functools
import heapq
import itertools
import json
import math
import os
import pickle
import random
import re
import sys
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from scipy.io.matlab import MatReadError
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm


@contextlib.contextmanager
def written_whole(path):
    """A text file to write beside `path`, renamed when it is complete: a reader sees the old file or the
    whole new one, and after an error nothing of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            yield file
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_jsonl(path, records):
    """One record a line."""
    with written_whole(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


# ------------------------------------------------------------------------------------------------------------
# Synthetic crowds: people who occlude each other, before a street that is not flat


OPAQUE = [255 * (alpha > 127) for alpha in range(256)]  # a pixel is the figure's where it is mostly there


def vivid(rng, low=0.3, high=1.0):
    """The colour of clothes: any hue, well saturated, brightness from `low` to `high`."""
    hue, saturation, value = rng.random(), rng.uniform(0.6, 1.0), rng.uniform(low, high)
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))


def muted(rng, low, high):
    """The colour of a street: nearly grey, brightness from `low` to `high` of 255."""
    return tuple(int(c) for c in rng.integers(low, high) + rng.integers(-12, 13, 3))


def draw_person(rng, height):
    """One standing or walking person, `height` pixels from crown to sole, on a transparent layer cut to its
    outline.

    Drawn twice too large and scaled down, so that limbs a pixel wide stay smooth.
    """
    h = 2 * height
    layer = Image.new("RGBA", (h, h))
    pen = ImageDraw.Draw(layer)
    skin = tuple(int(c) for c in np.array([236, 188, 150]) * rng.uniform(0.4, 1.0))
    shirt, trousers, hair = vivid(rng), vivid(rng, 0.1, 0.5), muted(rng, 15, 70)
    head, shoulder, lean = 0.13 * h, h * rng.uniform(0.09, 0.13), h * rng.uniform(-0.03, 0.03)
    middle, hip, neck = h / 2, 0.52 * h, 0.14 * h
    stride, swing = h * rng.uniform(0.02, 0.12), h * rng.uniform(0.02, 0.12)

    for side in (-1, 1):  # legs, then arms, one a side
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
    """A background with texture: a wall with windows, a pavement, and blotches over both."""
    street = Image.new("RGB", (size, size), muted(rng, 150, 230))
    pen = ImageDraw.Draw(street)
    horizon, window = int(size * rng.uniform(0.25, 0.45)), muted(rng, 90, 160)
    for x in range(int(rng.integers(0, 12)), size, int(rng.integers(14, 26))):
        pen.rectangle([x, 0.25 * horizon, x + 7, 0.6 * horizon], fill=window)
    pen.rectangle([0, horizon, size, size], fill=muted(rng, 130, 215))
    for y in np.geomspace(max(horizon, 1), size, 5)[1:-1]:
        pen.line([0, y, size, y], fill=muted(rng, 90, 160))
    blotches = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8), dtype=np.uint8))
    return Image.blend(street, blotches.resize(street.size).convert("RGB"), 0.2), horizon


def draw_distractor(rng, scene):
    """Upright or small things that are nobody: a lamp post or a bag left behind."""
    pen, size = ImageDraw.Draw(scene), scene.width
    x, y, color = int(rng.integers(0, size)), int(rng.integers(size // 2, size)), muted(rng, 30, 160)
    if rng.random() < 0.5:
        pen.line([x, y - size // 2, x, y], fill=color, width=2)
        pen.ellipse([x - 3, y - size // 2 - 3, x + 3, y - size // 2 + 3], fill=(250, 240, 190))
    else:
        pen.rounded_rectangle([x, y, x + 9, y + 7], 2, fill=color)
        pen.arc([x + 2, y - 4, x + 7, y + 4], 180, 360, fill=color)


def overlap(a, b):
    """IoU of two boxes."""
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def place_people(rng, size, horizon):
    """Figures with their boxes, back to front: one to three clusters, and nearer people larger (perspective).
    """
    centers = rng.uniform(0.15 * size, 0.85 * size, rng.integers(1, 4))
    figures = []
    for _ in range(rng.integers(2, 6)):
        sole = int(rng.uniform(horizon + 0.2 * size, size))
        height = int((0.32 + 0.36 * (sole - horizon) / (size - horizon)) * size * rng.uniform(0.85, 1.1))
        figure = draw_person(rng, height)
        left = int(rng.choice(centers) + rng.normal(0, 0.13 * size) - figure.width / 2)
        left, top = min(max(left, 0), size - figure.width), max(sole - figure.height, 0)
        box = [left, top, left + figure.width, top + figure.height]
        if all(overlap(box, other) < 0.4 for _, other in figures):  # nobody stands inside somebody else
            figures.append((figure, box))
    return sorted(figures, key=lambda item: item[1][3])


def draw_scene(rng, size):
    """A street with up to five people: (image, boxes, ignore). Whoever is less than a fifth visible is an
    ignore region."""
    scene, horizon = draw_street(rng, size)
    for _ in range(rng.integers(0, 3)):
        draw_distractor(rng, scene)
    figures, areas, owner = place_people(rng, size, horizon), [], np.zeros((size, size), int)
    for number, (figure, (x1, y1, x2, y2)) in enumerate(figures, 1):
        scene.paste(figure, (x1, y1), figure)
        outline = np.array(figure.getchannel("A").point(OPAQUE), bool)
        owner[y1:y2, x1:x2][outline] = number
        areas.append(outline.sum())
    boxes, ignore = [], []
    for number, (area, (_, box)) in enumerate(zip(areas, figures), 1):
        (boxes if (owner == number).sum() >= 0.2 * area else ignore).append(box)
    return scene, boxes, ignore


LETTERS = "ABCDEFGHJK"
PHRASES = {  # of grounding: whoever of the boxes has the least of this
    "the person furthest left": lambda box: box[0],
    "the person furthest right": lambda box: -box[2],
    "the tallest person": lambda box: box[1] - box[3],
}


def draw_page(rng, size, cell=28):
    """A page of a few short words, one a line: (image, text). Each letter stands in one 28-pixel cell, which
    is a visual token: a model this small does not learn in minutes to piece letters together."""
    page, cells = Image.new("RGB", (size, size), muted(rng, 225, 243)), size // cell
    lengths = rng.integers(1, cells + 1, rng.integers(1, cells))  # the last line stays empty
    words = ["".join(rng.choice(list(LETTERS), length)) for length in lengths]
    pen, font, color = ImageDraw.Draw(page), ImageFont.load_default(0.9 * cell), vivid(rng, 0.1, 0.4)
    for row, word in enumerate(words):
        for column, letter in enumerate(word):
            pen.text((cell * (column + 0.5), cell * (row + 0.5)), letter, font=font, fill=color, anchor="mm")
    return page, "\n".join(words)


def save_scene(job):
    """Draw scene `number` of `seed` (its own generator: the scene depends on nothing else), save it, and
    return its record, as the task asks."""
    folder, seed, number, size, task = job
    rng, name = np.random.default_rng([seed, number]), f"images/{number:06d}.png"
    about = {"image": name, "width": size, "height": size, "target": "person", "task": task}
    if task == "ocr":
        scene, about["transcript"] = draw_page(rng, size)
    else:
        scene, boxes, ignore = draw_scene(rng, size)
    scene.save(folder / name, compress_level=1)
    if task == "grounding":
        phrase = str(rng.choice(list(PHRASES)))
        about |= {"target": phrase, "boxes": [min(boxes, key=PHRASES[phrase])]}
    if task == "counting":
        about["points"] = [[(x1 + x2) / 2, (y1 + y2) / 2] for x1, y1, x2, y2 in boxes]
    if task == "detection":
        about |= {"boxes": boxes, "ignore": ignore}
    return about


def synthetic(out, images, seed, size=112, val=None, task="detection"):
    """Draw `images` scenes into `out`: train.jsonl, and the last `val` of them (default a tenth) into
    val.jsonl, each with what the task asks for."""
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    val = max(1, images // 10) if val is None else val
    jobs = [(out, seed, number, size, task) for number in range(images)]
    with ProcessPoolExecutor() as pool:
        records = list(tqdm(pool.map(save_scene, jobs, chunksize=64), "drawing scenes", len(jobs)))
    write_jsonl(out / "train.jsonl", records[: images - val])
    write_jsonl(out / "val.jsonl", records[images - val :])


# ------------------------------------------------------------------------------------------------------------
# A tiny checkpoint: every part of a Qwen2.5-VL folder, at a size that learns on a laptop

QWEN_SPECIAL_TOKENS = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
    <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
    <|image_pad|> <|video_pad|>""".split()

QWEN_CHAT_TEMPLATE = (  # Qwen2.5-VL's own, less its tools, videos and numbered pictures
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(size, questions):
    """256 bytes, so that any text can be written, and one token for whatever the template writes often.

    The prompt's fixed sentences are a token each, and so is a number with the comma after it: a box costs 5
    tokens (the real tokenizer spends 15 to 35). Short sequences are what makes the demo quick.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from dipr1 import CHAT

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=QWEN_SPECIAL_TOKENS, model_max_length=32768,
    )
    prompt = CHAT + "<|im_end|>".join(questions)
    fixed = re.split(r"<\|.*?\|>|\{.*?\}", prompt)  # without special tokens and {target}
    sentences = [sentence for sentence in fixed if len(sentence) > 1]
    tags = [f"<{slash}{name}>" for name in ("think", "look", "answer") for slash in ("", "/")]
    numbers = [f"{number}{comma}" for number in range(size + 1) for comma in ("", ", ")]
    glue = ["[[", "], [", "]]", "[]", "person", " people, ", " to look at"]
    tokenizer.add_tokens(sentences + tags + numbers + glue)
    tokenizer.chat_template = QWEN_CHAT_TEMPLATE
    return tokenizer


def smooth_numbers(embeddings, tokenizer, size, rng):
    """Start neighbouring numbers as neighbours: a random walk, smoothed over a few pixels, through embedding
    space; and numbers with a comma apart from numbers without by one direction that all of them share.

    A pretrained model knows that 41 is close to 42. Without that, the demo would spend its minutes on
    learning it.
    """
    import torch

    walk = gaussian_filter1d(rng.standard_normal((size + 1, embeddings.shape[1])), sigma=3, axis=0)
    walk *= embeddings.std().item() / walk.std()
    for comma in ("", ", "):
        ids = tokenizer.convert_tokens_to_ids([f"{number}{comma}" for number in range(size + 1)])
        kind = rng.standard_normal(embeddings.shape[1]) * embeddings.std().item()
        with torch.no_grad():
            embeddings[ids] = 0.3 * embeddings[ids] + torch.from_numpy(walk + kind).to(embeddings)


def tiny(out, seed=0, size=112, questions=None):
    """Write a random Qwen2.5-VL for images of about `size` x `size` pixels as a complete Hugging Face folder.
    It knows the words of `questions` (default: DIP-R1's).
    """
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
    )

    from dipr1 import QUESTION

    tokenizer = tiny_tokenizer(size, [QUESTION] if questions is None else questions)
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32768, initializer_range=0.05,
        # M-RoPE gives the width its lowest frequencies: at Qwen's base of 1e6, with heads this small, the
        # picture's four columns of tokens would all look like one.
        rope_parameters=dict(rope_type="default", rope_theta=10.0, mrope_section=[4, 6, 6]),
        bos_token_id=token("<|endoftext|>"), pad_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
    )
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
        fullatt_block_indexes=[1], initializer_range=0.05,
    )
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    smooth_numbers(model.get_input_embeddings().weight, tokenizer, size, np.random.default_rng(seed))
    model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]  # two, as Qwen's
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    Qwen2VLImageProcessorPil().save_pretrained(out)
    return model


# ------------------------------------------------------------------------------------------------------------
# Real annotations: a function a source, each yields (image path, boxes, ignore regions), all x1, y1, x2, y2


def corners(x, y, w, h):
    """A box given by its corner and size -> x1, y1, x2, y2. Coordinates are 0-based: no shift by one."""
    x, y, w, h = map(float, (x, y, w, h))
    return [x, y, x + w, y + h]


def find(root, *names):
    """The first of these paths that exists below `root`, or SystemExit says what was looked for and where."""
    for name in names:
        if (Path(root) / name).exists():
            return Path(root) / name
    raise SystemExit(f"{root}: unknown layout, looked there for " + ", or ".join(names))


MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, OSError,
             NotImplementedError, MatReadError, zlib.error, pickle.UnpicklingError)


@contextlib.contextmanager
def reading(path, place=""):
    """Turn whatever a malformed annotation raises into one line that says where it stands."""
    try:
        yield
    except MALFORMED as error:
        raise SystemExit(f"{path}{place and ', '}{place}: {type(error).__name__}: {error}") from None


def numbered_lines(path):
    """(line number from 1, line) of a text file, blank lines left out; one line in memory at a time."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def images_by_name(root, split):
    """{base name: paths} of the files below `root`, without folders that belong to another split alone."""
    found = {}
    for folder, _, files in os.walk(root):
        named_splits = re.findall("train|val|test", os.path.relpath(folder, root))
        if not named_splits or split in named_splits:
            for file in files:
                found.setdefault(file, []).append(Path(folder, file))
    return found


def locate(name, images, root):
    """The path of an image that annotations call `name`: as it stands below `root`, or by its base name."""
    paths = images.get(Path(name).name, [])
    if (Path(root) / name).is_file() or not paths:
        return Path(root) / name
    if len(paths) > 1:
        raise SystemExit(f"{name} could be {paths[0]} or {paths[1]}: remove one of them from below {root}")
    return paths[0]


def crowdhuman(root, split):
    """`annotation_<split>.odgt`, an image a line, beside the folder `Images`.

    The box is `fbox`, the whole person with what others hide, as the benchmark evaluates it. Tag "mask" and
    extra.ignore are ignore regions; `head_attr.ignore` concerns heads only.
    """
    path, images = find(root, f"annotation_{split}.odgt"), find(root, "Images")
    for number, line in numbered_lines(path):
        boxes, ignore = [], []
        with reading(path, f"line {number}"):
            entry = json.loads(line)
            for person in entry["gtboxes"]:
                masked = person["tag"] != "person" or person.get("extra", {}).get("ignore", 0) != 0
                (ignore if masked else boxes).append(corners(*person["fbox"]))
            image = images / f"{entry['ID']}.jpg"
        yield image, boxes, ignore


def citypersons_mat(path, split):
    """Yield (city, image name, [(is pedestrian, x, y, w, h)]) from `anno_<split>.mat`."""
    from scipy.io import loadmat

    with reading(path):
        cells = loadmat(path)[f"anno_{split}_aligned"][0]
    for number, cell in enumerate(cells, 1):
        with reading(path, f"image {number}"):
            city, name, rows = (np.ravel(cell)[0][part] for part in ("cityname", "im_name", "bbs"))
            # uint8 here, int16 there, as the image's largest number needs: 200 + 100 would be 44.
            labelled = [(row[0] == 1, *row[1:5]) for row in rows.astype(np.int64).reshape(-1, 10)]
        yield city.item(), name.item(), labelled


def citypersons_json(folder, split):
    """The same from `gtBboxCityPersons/<split>/<city>/<name>_gtBboxCityPersons.json`."""
    for path in sorted(folder.glob("*/*_gtBboxCityPersons.json")):
        with reading(path):
            entries = json.loads(path.read_text(encoding="utf-8"))["objects"]
            labelled = [(entry["label"] == "pedestrian", *entry["bbox"]) for entry in entries]
        yield path.parent.name, path.name.replace("gtBboxCityPersons.json", "leftImg8bit.png"), labelled


def citypersons(root, split):
    """Either form of the annotations, with the images in `leftImg8bit/<split>/<city>`.

    The full boxes of pedestrians are the targets; riders, sitting people, other postures, groups and what is
    marked so are ignore regions, as in the standard protocol.
    """
    images = find(root, f"leftImg8bit/{split}")
    path = find(root, f"annotations/anno_{split}.mat", f"gtBboxCityPersons/{split}")
    for city, name, labelled in (citypersons_json if path.is_dir() else citypersons_mat)(path, split):
        with reading(path, name):
            boxes = [corners(*box) for is_pedestrian, *box in labelled if is_pedestrian]
            ignore = [corners(*box) for is_pedestrian, *box in labelled if not is_pedestrian]
        yield images / city / name, boxes, ignore


def wider_line(line, numbers_a_box=None):
    """`imgNNNNN.jpg (c x y w h)*` of 2018 or `surNNNNN.jpg (x y w h)*` of 2019 -> (name, boxes).

    Twenty numbers may be four boxes of 2018 or five of 2019: the name's prefix tells. A bare name is an empty
    image.
    """
    name, *numbers = line.split()
    prefix = re.match("img|sur|ad", name)
    if prefix is None:
        raise ValueError(f"{name!r} is no image of 2018 (img...) nor of 2019 (sur..., ad...)")
    width = numbers_a_box or (5 if prefix[0] == "img" else 4)
    if len(numbers) % width:
        raise ValueError(f"{len(numbers)} numbers behind {name}, where every box has {width}")
    rows = [[float(number) for number in numbers[k : k + width]] for k in range(0, len(numbers), width)]
    if width == 5 and any(row[0] not in (1, 2) for row in rows):
        raise ValueError("a class that is neither 1 (pedestrian) nor 2 (cyclist)")
    return name, [corners(*row[-4:]) for row in rows]


def widerpedestrian(root, split):
    """The text files of 2018 or 2019, images anywhere below `root`. Pedestrians and cyclists are merged."""
    path = find(root, f"{split}_annotations.txt", f"Annotations/{split}_bbox.txt", f"{split}_bbox.txt")
    beside = [p for p in path.parent.glob("*.txt") if "ignore" in p.name and split in p.name]
    images, ignore = images_by_name(root, split), {}
    for ignore_path in beside:
        for number, line in numbered_lines(ignore_path):
            with reading(ignore_path, f"line {number}"):
                name, regions = wider_line(line, numbers_a_box=4)
            ignore.setdefault(name, []).extend(regions)
    for number, line in numbered_lines(path):
        with reading(path, f"line {number}"):
            name, boxes = wider_line(line)
        yield locate(name, images, root), boxes, ignore.get(name, [])


UAVDT_TEST = """M0203 M0205 M0208 M0209 M0403 M0601 M0602 M0606 M0701 M0801 M0802 M1001 M1004 M1007 M1009
    M1101 M1301 M1302 M1303 M1401""".split()  # the other sequences are for training


def uavdt_rows(path, categories):
    """{frame: boxes} of a file whose rows are `frame,target,left,top,width,height,_,_,category`, sorted by
    target and not by frame."""
    frames = {}
    for number, line in numbered_lines(path):
        with reading(path, f"line {number}"):
            frame, _, left, top, width, height, _, _, category = map(int, line.split(","))
            if category not in categories:
                raise ValueError(f"category {category}: wanted is the form of *_gt_whole.txt, with 1, 2 or 3")
            frames.setdefault(frame, []).append(corners(left, top, width, height))
    return frames


def uavdt(root, split, stride=1):
    """Sequences `UAV-benchmark-M/M0101/img000001.jpg` with `GT/M0101_gt_whole.txt`; cars, trucks and buses
    are one class. Every `stride`-th frame: neighbours are all but the same picture."""
    images, truths = find(root, "UAV-benchmark-M"), find(root, "GT", "UAV-benchmark-MOTD_v1.0/GT")
    names = {path.name.split("_")[0] for folder in (images, truths) for path in folder.glob("M*")}
    for name in sorted(name for name in names if (name in UAVDT_TEST) == (split == "test")):
        if not (truths / f"{name}_gt_whole.txt").is_file():
            raise SystemExit(f"{truths} lacks {name}_gt_whole.txt ({name}_gt.txt has no classes: not enough)")
        boxes, ignore = uavdt_rows(truths / f"{name}_gt_whole.txt", (1, 2, 3)), {}
        if (truths / f"{name}_gt_ignore.txt").is_file():
            ignore = uavdt_rows(truths / f"{name}_gt_ignore.txt", (-1,))
        on_disk = {int(p.stem[3:]) for p in (images / name).glob("img[0-9]*.jpg")}  # frames without a box too
        for frame in sorted(on_disk | boxes.keys())[::stride]:
            yield images / name / f"img{frame:06d}.jpg", boxes.get(frame, []), ignore.get(frame, [])


def coco(root, split, category="person", annotations=None):
    """Any COCO-form JSON, images found by base name below `root`: one category; `iscrowd` is an ignore
    region. Images without it stay in, as empty ones."""
    path = Path(annotations) if annotations else find(root, f"annotations/instances_{split}2017.json")
    if not path.is_file():
        raise SystemExit(f"{path} is not there")
    with reading(path):
        data = json.loads(path.read_text(encoding="utf-8"))
        ids = {entry["name"]: entry["id"] for entry in data["categories"]}
        names = {entry["id"]: str(entry["file_name"]) for entry in data["images"]}
        entries = data["annotations"]
    if category not in ids:
        raise SystemExit(f"{path} has no category {category!r}, but " + ", ".join(map(repr, ids)))
    boxes, ignore = {image: [] for image in names}, {image: [] for image in names}
    for number, entry in enumerate(entries, 1):
        with reading(path, f"annotation {number}"):
            if entry["category_id"] == ids[category]:
                kind = ignore if entry.get("iscrowd", 0) else boxes
                kind[entry["image_id"]].append(corners(*entry["bbox"]))
    images = images_by_name(root, split)
    for image, name in names.items():
        yield locate(name, images, root), boxes[image], ignore[image]


# ------------------------------------------------------------------------------------------------------------
# Perception-R1's other tasks: a function a source, each yields (image path, what its line says beside that)


class PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers only: a pickle that names a class or function could run any code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, and plain data needs no class")


def refcoco(root, split, refs=None):
    """RefCOCO, RefCOCO+, RefCOCOg: `refs(*).p`, `instances.json`, COCO's images below. A phrase is a line."""
    candidates = sorted(Path(root).glob(refs or "refs(*).p"))
    if len(candidates) != 1:
        found = ", ".join(path.name for path in candidates) or "none"
        raise SystemExit(f"{root}: one file refs(*).p is needed, found {found}; --refs names it")
    path, instances = candidates[0], find(root, "instances.json")
    with reading(path), open(path, "rb") as file:
        entries = PlainUnpickler(file, encoding="latin1").load()
    with reading(instances):
        data = json.loads(instances.read_text(encoding="utf-8"))
        names = {entry["id"]: str(entry["file_name"]) for entry in data["images"]}
        boxes = {entry["id"]: corners(*entry["bbox"]) for entry in data["annotations"]}
    images = images_by_name(root, "train")  # all of RefCOCO's are from COCO's train2014
    for number, entry in enumerate(entries, 1):
        with reading(path, f"reference {number}"):
            wanted, image, box = entry["split"] == split, names[entry["image_id"]], boxes[entry["ann_id"]]
            phrases = [str(sentence["sent"]) for sentence in entry["sentences"]]
        for phrase in phrases if wanted else ():
            yield locate(image, images, root), {"task": "grounding", "target": phrase, "boxes": [box]}


def pixmo_count(root):
    """PixMo-Count exported as JSONL, {"image": path, "points": [{"x": .., "y": ..}], "count": n, "label": ..}
    a line, points in pixels. (PixMo-Points, a sister of it, is in percent of the image: scale it first.)"""
    path = find(Path(root).parent, Path(root).name)
    for number, line in numbered_lines(path):
        with reading(path, f"line {number}"):
            entry = json.loads(line)
            points = [[float(point["x"]), float(point["y"])] for point in entry["points"]]
            if len(points) != entry["count"]:
                raise ValueError(f"count is {entry['count']}, but there are {len(points)} points")
            asked = {"task": "counting", "target": str(entry["label"]), "points": points}
            image = path.parent / entry["image"]
        yield image, asked


def ocr(root):
    """`[{"image": path, "conversations": [{"from": "human", ..}, {"from": "gpt", "value": the text}]}]`."""
    path = find(Path(root).parent, Path(root).name)
    with reading(path):
        entries = list(json.loads(path.read_text(encoding="utf-8")))
    for number, entry in enumerate(entries, 1):
        with reading(path, f"entry {number}"):
            (text,) = [turn["value"] for turn in entry["conversations"] if turn["from"] == "gpt"]
            image = path.parent / entry["image"]
            asked = {"task": "ocr", "target": "text", "transcript": str(text)}
        yield image, asked


# ------------------------------------------------------------------------------------------------------------
# From annotations to the JSONL

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # by Pillow, of broken files


def image_size(path, verify=True):
    """(width, height) of an image as people see it, upright. With `verify` it is decoded to the last pixel;
    one of UNREADABLE is raised if that fails."""
    with Image.open(path) as image:
        if verify:
            image.load()
        lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size[::-1] if lies_on_its_side else image.size


def measure(annotation, verify):
    """(image, ...) -> the same, the image's size (None: unreadable) and the reason."""
    try:
        return *annotation, image_size(annotation[0], verify), ""
    except UNREADABLE as error:
        return *annotation, None, str(error)


def measured(annotations, verify):
    """`measure` all, in order. Decoding uses every core, a block at a time, so that memory stays small."""
    if not verify:
        yield from (measure(annotation, verify) for annotation in annotations)
        return
    with ProcessPoolExecutor() as pool:
        while block := list(itertools.islice(annotations, 512)):
            yield from pool.map(functools.partial(measure, verify=verify), block, chunksize=8)


def sample(items, n, seed):
    """n of the items, each as likely as the next, in their order: one pass, n in memory."""
    rng = random.Random(seed)
    drawn = heapq.nsmallest(n, ((rng.random(), number, item) for number, item in enumerate(items)))
    return [item for _, number, item in sorted(drawn, key=lambda entry: entry[1])]


def clip_to_image(boxes, width, height):
    """Boxes cut to the image (many annotators run beyond it); what has no area there, or never had, goes."""
    clipped = np.clip(np.reshape(boxes, (-1, 4)), 0, [width, height, width, height])
    return clipped[(clipped[:, 2:] > clipped[:, :2]).all(axis=1)].round(2).tolist()


def readable(annotations, out, verify, changed):
    """(image, ...) -> (the start of its record, ...); an image that cannot be read is named and counted."""
    for image, *rest, size, reason in tqdm(measured(annotations, verify), "converting", unit=" images"):
        if size is None:
            tqdm.write(f"left out: {image}: {reason}", file=sys.stderr)
            changed["images left out: missing or unreadable"] += 1
            continue
        yield {"image": os.path.relpath(image, out.parent), "width": size[0], "height": size[1]}, *rest


def nothing_converted(out, changed):
    """The error, with its reasons."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in changed.items())
    return SystemExit(f"nothing converted, {out} not written: {reasons or 'no image is annotated'}")


def convert(annotations, out, target, max_boxes=60, min_size=0, verify=True):
    """Annotated images -> the JSONL `out`, images referenced and not copied; prints what became of each.

    An image with more than `max_boxes` is dropped whole: with some of its boxes cut, right answers would be
    punished. For the same reason a box whose longer side is under `min_size` becomes an ignore region.
    """
    out, written, changed, histogram = Path(out), Counter(), Counter(), Counter()
    with written_whole(out) as file:
        for about, boxes, ignore in readable(annotations, out, verify, changed):
            size = about["width"], about["height"]
            inside, ignore = clip_to_image(boxes, *size), clip_to_image(ignore, *size)
            large = [box for box in inside if max(box[2] - box[0], box[3] - box[1]) >= min_size]
            ignore += [box for box in inside if box not in large]
            if len(large) > max_boxes:
                changed[f"images left out: more than {max_boxes} boxes"] += 1
                continue
            file.write(json.dumps(about | {"target": target, "boxes": large, "ignore": ignore}) + "\n")
            histogram[len(large)] += 1
            written.update({"images": 1, "boxes": len(large), "ignore regions": len(ignore)})
            changed["boxes left out: no area inside the image"] += len(boxes) - len(inside)
            changed[f"boxes under {min_size:g} pixels made ignore regions"] += len(inside) - len(large)
        if not written:
            raise nothing_converted(out, changed)
    report(out, written, changed, histogram)


def convert_asked(annotations, out, verify=True):
    """Images with what is asked of each -> the JSONL `out`, a question a line; prints what became of each."""
    out, written, changed = Path(out), Counter(), Counter()
    with written_whole(out) as file:
        for about, asked in readable(annotations, out, verify, changed):
            size = about["width"], about["height"]
            if "boxes" in asked:
                asked["boxes"] = clip_to_image(asked["boxes"], *size)
            outside = any(not (0 <= x <= size[0] and 0 <= y <= size[1]) for x, y in asked.get("points", []))
            if outside or asked.get("boxes") == []:
                changed["questions left out: the truth is outside the image"] += 1
                continue
            file.write(json.dumps(about | asked) + "\n")
            written.update({"questions": 1, "points": len(asked.get("points", []))})
        if not written:
            raise nothing_converted(out, changed)
    print(out)
    for name, number in (+written | +changed).items():
        print(f"{number:>10,}  {name}")


def report(out, written, changed, histogram):
    """Print the counts, and how many images have how many boxes."""
    print(out)
    for name, number in (written | +changed).items():
        print(f"{number:>10,}  {name}")
    counts = sorted(histogram.elements())
    print(f"boxes an image: median {np.median(counts):g}, max {counts[-1]}")
    edges = [0, 1, 2, 5, 10, 20, 40, 60, 100, 10**9]
    bins, _ = np.histogram(counts, edges)
    for low, high, number in zip(edges, edges[1:], bins):
        if number:
            name = f"{low}" if high == low + 1 else f"{low}-{high - 1}" if high < 10**9 else f"{low}+"
            print(f"{name:>8}  {number:>7,}  {'#' * math.ceil(50 * number / bins.max())}")


def draw_records(out, number, seed):
    """Pictures to look at, of records drawn at random: boxes and points orange, ignore regions grey."""
    out = Path(out)
    with open(out, encoding="utf-8") as lines:
        records = sample(map(json.loads, lines), number, seed)
    for number, record in enumerate(records):
        with Image.open(out.parent / record["image"]) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
        pen, line = ImageDraw.Draw(picture), max(1, picture.width // 300)
        dots = [[x - 2 * line, y - 2 * line, x + 2 * line, y + 2 * line] for x, y in record.get("points", [])]
        boxes = record.get("boxes", []) + dots
        for boxes, color in ((record.get("ignore", []), (150, 150, 150)), (boxes, (255, 140, 0))):
            for box in boxes:
                pen.rectangle(box, outline=color, width=line)
        path = out.with_name(f"{out.stem}-{number}.png")
        picture.save(path)
        print(path)


# ------------------------------------------------------------------------------------------------------------
# The command line: a subcommand a source

SOURCES = {  # name: (reader, splits, what the question asks for, what is looked for below the root)
    "crowdhuman": (crowdhuman, ["train", "val"], "person",
                   "annotation_<split>.odgt beside the folder Images"),
    "citypersons": (citypersons, ["train", "val"], "pedestrian",
                    "annotations/anno_<split>.mat or gtBboxCityPersons/<split>, and leftImg8bit/<split>"),
    "widerpedestrian": (widerpedestrian, ["train", "val"], "person",
                        "<split>_annotations.txt (2018) or Annotations/<split>_bbox.txt (2019), and images"),
    "uavdt": (uavdt, ["train", "test"], "vehicle",
              "UAV-benchmark-M/<sequence>/*.jpg and GT/<sequence>_gt_whole.txt"),
    "coco": (coco, ["train", "val", "test"], None,
             "annotations/instances_<split>2017.json (or any --annotations), and images"),
}


ASKED = {  # Perception-R1's other tasks, name: (reader, splits, what is read)
    "refcoco": (refcoco, ["train", "val", "test", "testA", "testB"],
                "a folder with refs(*).p and instances.json, COCO's images below"),
    "pixmo_count": (pixmo_count, [], "a JSONL with image, points in pixels, count and label"),
    "ocr": (ocr, [], "a JSON list with image and conversations"),
}


def add_parser(commands, name, splits, layout):
    """A subcommand with the options that all sources share -> the function that adds more."""
    parser = commands.add_parser(name, help=layout, description=f"Reads {layout}.")
    option = parser.add_argument
    option("root", help="the data set's folder, or file")
    if splits:
        option("--split", choices=splits, required=True)
    option("--out", required=True, help="the JSONL to write")
    option("--limit", type=int, metavar="N", help="convert N images only, drawn at random (default: all)")
    option("--seed", type=int, default=0, help="of what --limit and --draw pick (default 0)")
    option("--draw", type=int, default=0, metavar="N", help="draw N images with their boxes (default 0)")
    option("--no_verify", action="store_true", help="trust that images decode: read their headers only")
    return option


def add_source(commands, name):
    """The subcommand of a data set of detection, with the options that those share."""
    _, splits, target, layout = SOURCES[name]
    option = add_parser(commands, name, splits, layout)
    option("--target", default=target, help=f"what to ask for (default {target or 'the category'})")
    option("--max_boxes", type=int, default=60, help="drop images with more, never single boxes (default 60)")
    option("--min_size", type=float, default=0, metavar="PIXELS",
           help="boxes whose longer side is shorter become ignore regions (default 0: none)")
    if name == "uavdt":
        option("--stride", type=int, default=1, help="take every so many-th frame (default 1)")
    if name == "coco":
        option("--category", default="person", help="by its name in the file (default person)")
        option("--annotations", metavar="JSON", help="another file than the official one")


def run_source(args):
    """One data set, as its subcommand says."""
    reader = (SOURCES | ASKED)[args.command][0]
    given = ("split", "stride", "category", "annotations", "refs")
    annotations = reader(args.root, **{name: getattr(args, name) for name in given if name in args})
    if args.limit:
        annotations = iter(sample(annotations, args.limit, args.seed))
    if args.command in ASKED:
        convert_asked(annotations, args.out, not args.no_verify)
    else:
        target = args.target or args.category
        convert(annotations, args.out, target, args.max_boxes, args.min_size, not args.no_verify)
    draw_records(args.out, args.draw, args.seed)


def main(argv=None):
    """Read the command line and do what it says."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(dest="command", required=True)

    draws = commands.add_parser("synthetic", help="crowds drawn by Pillow: images, train.jsonl and val.jsonl")
    draws.add_argument("--out", required=True, help="folder to write")
    draws.add_argument("--images", type=int, default=2000, help="a tenth becomes val.jsonl (default 2000)")
    draws.add_argument("--seed", type=int, default=0, help="the same seed draws the same scenes (default 0)")
    draws.add_argument("--size", type=int, default=112, help="side in pixels (default 112, the tiny model's)")
    draws.add_argument("--task", choices=["detection", "grounding", "counting", "ocr"], default="detection",
                       help="what is asked: the last three are Perception-R1's (default detection)")

    small = commands.add_parser("tiny", help="a tiny random Qwen2.5-VL as a Hugging Face folder")
    small.add_argument("--out", required=True, help="folder to write")
    small.add_argument("--seed", type=int, default=0, help="of its random weights (default 0)")
    small.add_argument("--size", type=int, default=112, help="numbers up to it are a token (default 112)")

    for name in SOURCES:
        add_source(commands, name)
    for name, (_, splits, layout) in ASKED.items():
        option = add_parser(commands, name, splits, layout)
        if name == "refcoco":
            option("--refs", metavar="NAME", help="which refs file, if there are several, as 'refs(umd).p'")

    args = parser.parse_args(argv)
    if args.command == "synthetic":
        synthetic(args.out, args.images, args.seed, args.size, task=args.task)
    elif args.command == "tiny":
        model = tiny(args.out, args.seed, args.size)
        print(f"{args.out}: a Qwen2.5-VL of {sum(p.numel() for p in model.parameters()):,} random parameters")
    else:
        run_source(args)


if __name__ == "__main__":
    main()
