"""Everything that dipr1.py reads, made here: scenes, a tiny checkpoint, and real annotations as one JSONL.

    python data_prep.py synthetic  --out data/synthetic --images 2000 --seed 0     crowds drawn by Pillow
    python data_prep.py tiny       --out data/tiny                                 a random Qwen2.5-VL of 1M
    parameters python data_prep.py crowdhuman CROWDHUMAN --split train --out data/train.jsonl real crowds,
    from the official files

One line of the JSONL is one image, in pixels of the original image, boxes as x1, y1, x2, y2:

    {"image": path relative to the file, "width": W, "height": H, "target": "person", "boxes": [...],
    "ignore": [...]}

`ignore` holds regions in which an unmatched detection is neither right nor wrong (a crowd too dense to
annotate).
"""
import argparse
import colorsys
import json
import os
import re
import sys
from collections import Counter
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm


def write_jsonl(path, records):
    """Write the records beside `path` and rename: a reader sees the old file or the whole new one, never half
    of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    os.replace(beside, path)


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


def save_scene(job):
    """Draw scene `number` of `seed` (its own generator: the scene depends on nothing else) and save it."""
    folder, seed, number, size = job
    scene, boxes, ignore = draw_scene(np.random.default_rng([seed, number]), size)
    name = f"images/{number:06d}.png"
    scene.save(folder / name, compress_level=1)
    about = {"image": name, "width": size, "height": size, "target": "person"}
    return about | {"boxes": boxes, "ignore": ignore}


def synthetic(out, images, seed, size=112, val=None):
    """Draw `images` scenes into `out`: train.jsonl, and the last `val` of them (default a tenth) into
    val.jsonl."""
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    val = max(1, images // 10) if val is None else val
    jobs = [(out, seed, number, size) for number in range(images)]
    with Pool() as pool:
        records = list(tqdm(pool.imap(save_scene, jobs, chunksize=64), "drawing scenes", len(jobs)))
    write_jsonl(out / "train.jsonl", records[: images - val])
    write_jsonl(out / "val.jsonl", records[images - val :])


# ------------------------------------------------------------------------------------------------------------
# A tiny checkpoint: every part of a Qwen2.5-VL folder, at a size that learns on a laptop

QWEN_SPECIAL_TOKENS = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
<|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|>
    <|video_pad|>""".split()

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


def tiny_tokenizer(size):
    """256 bytes, so that any text can be written, and one token for whatever DIP-R1's template writes often.

    The prompt's fixed sentences are a token each, and so is a number with the comma after it: a box costs 5
    tokens (the real tokenizer spends 15 to 35). Short sequences are what makes the demo quick.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from dipr1 import CHAT, QUESTION

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=QWEN_SPECIAL_TOKENS, model_max_length=32768,
    )
    fixed = re.split(r"<\|.*?\|>|\{.*?\}", CHAT + QUESTION)  # the prompt without special tokens and {target}
    sentences = [sentence for sentence in fixed if len(sentence) > 1]
    tags = [f"<{slash}{name}>" for name in ("think", "look", "answer") for slash in ("", "/")]
    numbers = [f"{number}{comma}" for number in range(size + 1) for comma in ("", ", ")]
    glue = ["[[", "], [", "]]", "[]", "person", " people, ", " overlap"]
    tokenizer.add_tokens(sentences + tags + numbers + glue)
    tokenizer.chat_template = QWEN_CHAT_TEMPLATE
    return tokenizer


def smooth_numbers(embeddings, tokenizer, size, rng):
    """Start neighbouring numbers as neighbours: a random walk, smoothed over a few pixels, through embedding
    space.

    A pretrained model knows that 41 is close to 42. Without that, the demo would spend its minutes on
    learning it.
    """
    import torch

    walk = gaussian_filter1d(rng.standard_normal((size + 1, embeddings.shape[1])), sigma=3, axis=0)
    walk *= embeddings.std().item() / walk.std()
    for comma in ("", ", "):
        ids = tokenizer.convert_tokens_to_ids([f"{number}{comma}" for number in range(size + 1)])
        with torch.no_grad():
            embeddings[ids] = 0.3 * embeddings[ids] + torch.from_numpy(walk).to(embeddings)


def tiny(out, seed=0, size=112):
    """Write a random Qwen2.5-VL for images of about `size` x `size` pixels as a complete Hugging Face folder.
    """
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    tokenizer = tiny_tokenizer(size)
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
# Real annotations


def crowdhuman(root, split):
    """CrowdHuman: yield (image path, boxes, ignore) for each line of `annotation_<split>.odgt`, boxes as x1,
    y1, x2, y2.

    The box is `fbox`, the whole person with what others hide, as the benchmark evaluates it. Tag "mask" and
    extra.ignore are ignore regions; `head_attr.ignore` concerns heads only.
    """
    path = Path(root) / f"annotation_{split}.odgt"
    if not path.is_file():
        raise SystemExit(f"{path} is not there: looked for annotation_{split}.odgt beside the folder Images")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry, boxes, ignore = json.loads(line), [], []
            for person in entry["gtboxes"]:
                x, y, w, h = map(float, person["fbox"])
                masked = person["tag"] != "person" or person.get("extra", {}).get("ignore", 0) != 0
                (ignore if masked else boxes).append([x, y, x + w, y + h])
            image = Path(root) / "Images" / f"{entry['ID']}.jpg"
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SystemExit(f"{path}, line {number}: {type(error).__name__}: {error}") from None
        yield image, boxes, ignore


def clip_to_image(boxes, width, height):
    """Boxes cut to the image (CrowdHuman's run beyond it); what has no area left, or never had one, is
    dropped."""
    clipped = np.clip(np.reshape(boxes, (-1, 4)), 0, [width, height, width, height])
    return clipped[(clipped[:, 2:] > clipped[:, :2]).all(axis=1)].round(2).tolist()


def image_size(path):
    """(width, height) of an image as people see it, decoded to the last pixel. OSError if it is missing or
    cut short."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).size


def convert(annotations, out, target, max_boxes, draw):
    """Annotated images -> the JSONL `out`, images referenced and not copied, and a count of what happened to
    each.

    An image with more than `max_boxes` is dropped whole: with some of its boxes cut, right answers would be
    punished.
    """
    out, records, dropped = Path(out), [], Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    for image, boxes, ignore in tqdm(annotations, "converting"):
        try:
            width, height = image_size(image)
        except (OSError, Image.DecompressionBombError) as error:
            tqdm.write(f"left out: {image}: {error}", file=sys.stderr)
            dropped["image missing or unreadable"] += 1
            continue
        kept, ignore = clip_to_image(boxes, width, height), clip_to_image(ignore, width, height)
        dropped["box without area"] += len(boxes) - len(kept)
        if len(kept) > max_boxes:
            dropped[f"image with more than {max_boxes} boxes"] += 1
            continue
        about = {"image": os.path.relpath(image, out.parent), "width": width, "height": height}
        records.append(about | {"target": target, "boxes": kept, "ignore": ignore})
    if not records:
        raise SystemExit(f"nothing converted, {out} not written: {dict(dropped)}")
    write_jsonl(out, records)
    counts = [len(record["boxes"]) for record in records]
    print(f"{out}: {len(records)} images, {sum(counts)} boxes, "
          f"{sum(len(record['ignore']) for record in records)} ignore regions; "
          f"boxes an image: median {np.median(counts):g}, max {max(counts)}")
    for reason, number in dropped.items():
        if number:
            print(f"dropped: {number} x {reason}")
    draw_records(out, records[:draw])


def draw_records(out, records):
    """Pictures to look at: truth orange, ignore regions grey."""
    for number, record in enumerate(records):
        with Image.open(out.parent / record["image"]) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
        pen, line = ImageDraw.Draw(picture), max(1, picture.width // 300)
        for boxes, color in ((record["ignore"], (150, 150, 150)), (record["boxes"], (255, 140, 0))):
            for box in boxes:
                pen.rectangle(box, outline=color, width=line)
        picture.save(out.with_name(f"{out.stem}-{number}.png"))
        print(out.with_name(f"{out.stem}-{number}.png"))


def main(argv=None):
    """The command line: one subcommand a source."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(dest="command", required=True)

    draws = commands.add_parser("synthetic", help="crowds drawn by Pillow: images, train.jsonl and val.jsonl")
    draws.add_argument("--out", required=True, help="folder to write")
    draws.add_argument("--images", type=int, default=2000, help="a tenth becomes val.jsonl (default 2000)")
    draws.add_argument("--seed", type=int, default=0, help="the same seed draws the same scenes (default 0)")
    draws.add_argument("--size", type=int, default=112, help="side in pixels (default 112, the tiny model's)")

    small = commands.add_parser("tiny", help="a tiny random Qwen2.5-VL as a Hugging Face folder")
    small.add_argument("--out", required=True, help="folder to write")
    small.add_argument("--seed", type=int, default=0, help="of its random weights (default 0)")
    small.add_argument("--size", type=int, default=112, help="numbers up to it are a token (default 112)")

    real = commands.add_parser("crowdhuman", help="annotation_<split>.odgt beside the folder Images")
    real.add_argument("root", help="the folder that holds both")
    real.add_argument("--split", choices=["train", "val"], required=True)
    real.add_argument("--out", required=True, help="the JSONL to write")
    real.add_argument("--max_boxes", type=int, default=60, help="drop images with more people (default 60)")
    real.add_argument("--draw", type=int, default=0, help="also draw so many images with their boxes")

    args = parser.parse_args(argv)
    if args.command == "synthetic":
        synthetic(args.out, args.images, args.seed, args.size)
    elif args.command == "tiny":
        model = tiny(args.out, args.seed, args.size)
        print(f"{args.out}: a Qwen2.5-VL of {sum(p.numel() for p in model.parameters()):,} random parameters")
    else:
        convert(crowdhuman(args.root, args.split), args.out, "person", args.max_boxes, args.draw)


if __name__ == "__main__":
    main()
